import hashlib
import json

import pytest
import torch

from pipeline.errors import Failure
from pipeline.models.build import build
from pipeline.training import checkpoint


@pytest.fixture
def spec(tiny_spec):
    return tiny_spec("vqmoe", "classifier", vocabulary=50)


@pytest.fixture
def saved(tmp_path, spec, seeded):
    model = build(spec)
    checkpoint.save(tmp_path, model, spec)
    return tmp_path, model


def test_round_trip_gives_identical_scores_and_identical_bytes(saved, spec, tmp_path):
    folder, model = saved
    loaded = checkpoint.load(folder, spec)
    tokens_BT, lengths_B = torch.randint(50, (3, 9)), torch.tensor([9, 4, 1])
    assert torch.equal(loaded(tokens_BT, lengths_B, "discrete")[0], model.eval()(tokens_BT, lengths_B, "discrete")[0])
    again = tmp_path / "again"
    again.mkdir()
    checkpoint.save(again, loaded, spec)
    for name in ("model.safetensors", "model.json"):
        assert (folder / name).read_bytes() == (again / name).read_bytes()


def test_a_language_model_with_memory_and_adaptive_scores_round_trips(tmp_path, tiny_spec, tiny_params, seeded):
    section = tiny_params("model.positions=relative", "model.memory=8", "model.cutoffs=[10, 30]").model
    spec = tiny_spec("smoe", model=section, vocabulary=50)
    model = build(spec).eval()
    checkpoint.save(tmp_path, model, spec)
    loaded, tokens_BT = checkpoint.load(tmp_path, spec), torch.randint(50, (2, 9))
    one, other = (made.nats(made(tokens_BT[:, :-1], "router").state_BTD, tokens_BT[:, 1:]) for made in (model, loaded))
    assert torch.equal(one, other)
    with pytest.raises(Failure, match=r"model\.cutoffs is \[10, 30\] there and \[10\] here"):
        checkpoint.load(tmp_path, tiny_spec("smoe", model=section.model_copy(update={"cutoffs": (10,)}), vocabulary=50))


def test_another_configuration_names_the_key(saved, spec):
    folder, _ = saved
    other = spec.model_copy(update={"model": spec.model.model_copy(update={"width": 32})})
    with pytest.raises(Failure, match=r"model\.json: model\.width is 16 there and 32 here; run the stage"):
        checkpoint.load(folder, other)
    with pytest.raises(Failure, match="labels is"):
        checkpoint.load(folder, spec.model_copy(update={"labels": ("a", "c")}))


def changed(folder, change):
    path = folder / "model.safetensors"
    path.write_bytes(change(path.read_bytes()))


def flipped(content):
    """One bit of one weight."""
    return content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]


def signed(folder, content):
    """Weights that are no weights, though model.json has their digest."""
    (folder / "model.safetensors").write_bytes(content)
    described = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(described | {"sha256": hashlib.sha256(content).hexdigest()}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors: not found"),
        (lambda folder: changed(folder, lambda content: content[:-7]), "not the weights that model.json describes"),
        (lambda folder: changed(folder, lambda content: b""), "not the weights"),
        (lambda folder: changed(folder, flipped), "not the weights"),
        (lambda folder: signed(folder, b""), "damaged"),
        (lambda folder: signed(folder, (1 << 62).to_bytes(8, "little") + b"{}"), "damaged"),
        (
            lambda folder: signed(
                folder, b"\x4c" + bytes(7) + b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}' + bytes(25)
            ),
            "damaged",
        ),
        (lambda folder: (folder / "model.json").unlink(), "model.json: not found"),
        (lambda folder: (folder / "model.json").write_text("{"), "cannot be read as JSON"),
        (lambda folder: (folder / "model.json").write_text("[]"), "holds list"),
    ],
)
def test_damage_is_one_line(saved, spec, damage, words):
    folder, _ = saved
    damage(folder)
    with pytest.raises(Failure, match=words) as caught:
        checkpoint.load(folder, spec)
    assert "\n" not in str(caught.value)


def test_a_missing_field_is_named(saved, spec):
    folder, _ = saved
    content = json.loads((folder / "model.json").read_text())
    del content["vocabulary"]
    (folder / "model.json").write_text(json.dumps(content))
    with pytest.raises(Failure, match="vocabulary is None there and 50"):
        checkpoint.load(folder, spec)
