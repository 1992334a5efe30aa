import json

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import serving
from pipeline.data.tokenizers import Tokenizer
from pipeline.errors import Failure, UsageError
from pipeline.models.build import build
from pipeline.serving import Sampling
from pipeline.serving.served import _Decoded
from pipeline.training import checkpoint
from tests.models.test_vit import spec as vision_spec

FREE, GREEDY = Sampling(), Sampling(temperature=0)


def text(model, prompt, length=20, sampling=FREE, seed=0):
    return "".join(model.generate(prompt, length, sampling, seed))


def test_a_seed_gives_one_text_and_others_others(served):
    model = serving.load(served())
    assert text(model, "Once") == text(model, "Once") != text(model, "Once", seed=1)


def test_the_most_likely_tokens_against_a_loop_over_whole_passes(served):
    folder = served()
    model, spec = checkpoint.open_model(folder)
    ids = list("Öne ".encode())
    for _ in range(spec.model.context + 5):  # past the end of what the model sees
        state_1TD = model(torch.tensor([ids[-spec.model.context :]]), "discrete").state_BTD
        ids.append(int((state_1TD[0, -1] @ model.embedding.weight.T)[:256].argmax()))
    wanted = bytes(ids).decode("utf-8", "replace")
    assert "Öne " + text(serving.load(folder), "Öne ", spec.model.context + 5, GREEDY) == wanted


def test_draws_follow_the_probabilities_of_the_nucleus():
    score_V = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()
    for sampling, wanted in (
        (Sampling(), [0.1, 0.5, 0.15, 0.25]),
        (Sampling(top_p=0.7), [0, 2 / 3, 0, 1 / 3]),
        (Sampling(top_p=0.49), [0, 1, 0, 0]),
        (Sampling(temperature=1e-45), [0, 1, 0, 0]),
        # Beyond what float32 can tell from 0, or from infinity.
        (Sampling(temperature=1e-50), [0, 1, 0, 0]),
        (Sampling(temperature=5e-324), [0, 1, 0, 0]),
        (Sampling(top_p=1e-50), [0, 1, 0, 0]),
        (Sampling(temperature=1e39), [0.25, 0.25, 0.25, 0.25]),
        (Sampling(temperature=0.5), [0.01 / 0.345, 0.25 / 0.345, 0.0225 / 0.345, 0.0625 / 0.345]),
    ):
        generator = torch.Generator().manual_seed(0)
        drawn = [sampling.draw(score_V, generator) for _ in range(4000)]
        shares = np.bincount(drawn, minlength=4) / len(drawn)
        assert np.abs(shares - wanted).max() < 0.03
        assert ((shares > 0) == (np.array(wanted) > 0)).all()


@pytest.mark.parametrize("temperature", [1e-50, 0.8, 1e39])
def test_padding_is_never_drawn(temperature):
    score_V, generator = torch.tensor([0.0, 1.0, -torch.inf]), torch.Generator().manual_seed(0)
    assert {Sampling(temperature).draw(score_V, generator) for _ in range(200)} <= {0, 1}


def test_a_seed_draws_what_it_always_drew():
    score_NV = torch.randn(100, 50, generator=torch.Generator().manual_seed(1))
    generators = [torch.Generator().manual_seed(2) for _ in range(2)]
    for score_V in score_NV:
        share_V, id_V = (score_V / 0.8).softmax(0).sort(descending=True, stable=True)
        assert Sampling(0.8).draw(score_V, generators[0]) == id_V[torch.multinomial(share_V, 1, generator=generators[1])]


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.1}])
def test_impossible_sampling_is_refused(wrong):
    with pytest.raises(UsageError, match=str(next(iter(wrong.values())))):
        Sampling(**wrong)


def test_a_character_waits_for_its_last_byte():
    decoded = _Decoded(Tokenizer.bytes(), list(b"a"))
    assert [decoded.add(byte) for byte in "é€".encode()] == ["", "é", "", "", "€"]
    assert decoded.add(0xE2) == "" and decoded.rest() == "\ufffd"
    # What the prompt ends with is not said again.
    decoded = _Decoded(Tokenizer.bytes(), list("a\ufffd".encode()))
    assert "".join(decoded.add(byte) for byte in "é".encode()) == "é"


@pytest.mark.parametrize("kind", ["bytes", "words"])
def test_what_comes_in_parts_is_the_whole(kind):
    tokenizer = Tokenizer.bytes() if kind == "bytes" else Tokenizer.from_vocabulary(["one", "two"])
    ids = np.random.default_rng(0).integers(0, tokenizer.pad, 400).tolist()
    decoded = _Decoded(tokenizer, ids[:20])
    parts = [decoded.add(one) for one in ids[20:]] + [decoded.rest()]
    whole, before = (tokenizer.decode(np.array(some)) for some in (ids, ids[:20]))
    # A character that the prompt leaves unfinished may read otherwise once it goes on.
    assert "".join(parts)[1:] and whole.endswith("".join(parts)[1:])
    assert abs(len(before) + len("".join(parts)) - len(whole)) <= 1


def test_words_are_parted_from_the_prompt_by_a_blank(served):
    tokenizer = Tokenizer.from_vocabulary(["one", "two"])
    model = serving.load(served(tokenizer=tokenizer))
    out = text(model, "one two", 6)
    assert out[0] in " \n"
    assert set(out.split()) <= {"one", "two", "<unk>"}


def test_the_prompt_is_read_in_the_view_of_training(served):
    model = serving.load(served(view="text27"))
    assert model.read("The 2 Dogs, ") == "the two dogs "
    assert model.read("The 2 Dogs,") == "the two dogs"
    assert text(model, "A, b") == text(model, "a b")
    assert text(model, "") == text(model, " ")
    with pytest.raises(UsageError, match=r"prompt '日本': nothing of it is left in the view of this model \(text27: letters a-z"):
        text(model, "日本")


def test_classified_one_by_one_or_together_is_the_same(served):
    model = serving.load(served("classifier"))
    texts = ["short", "", "long " * 100, "Ünï"]
    together_PL = model.classify(texts)
    np.testing.assert_allclose(together_PL.sum(1), 1, rtol=1e-5)
    alone_PL = np.concatenate([model.classify([one]) for one in texts])
    np.testing.assert_allclose(together_PL, alone_PL, atol=1e-5)
    # Only what the model sees at once counts.
    context = model.model.backbone.context
    np.testing.assert_array_equal(model.classify(["x" * context]), model.classify(["x" * context + "y"]))
    assert model.classify([]).shape == (0, 2)


def test_images_of_any_size_are_classified_as_training_saw_them(tmp_path, seeded):
    described = vision_spec("vqmoe").model_copy(update={"view": "rgb"})
    model = build(described).eval()
    checkpoint.save(tmp_path, model, described)
    pixels = np.random.default_rng(0).integers(0, 256, (described.size, described.size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "same.png")
    Image.fromarray(pixels[..., 0]).resize((40, 50)).save(tmp_path / "grey.png")
    found_PL = serving.load(tmp_path).classify([tmp_path / "same.png", tmp_path / "grey.png"])
    wanted_L = model(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255, model.infer_mode)[0].softmax(1)[0]
    np.testing.assert_allclose(found_PL[0], wanted_L.detach(), atol=1e-6)
    assert found_PL.shape == (2, len(described.labels))
    with pytest.raises(Failure, match=r"model\.json: cannot be decoded"):
        serving.load(tmp_path).classify([tmp_path / "model.json"])


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda found: found.pop("view"), "does not say what its texts or images looked like"),
        (lambda found: found.update(method="future"), "another version \\(method 'future'\\)"),
        (lambda found: found["model"].update(layers="many"), "another version \\(model"),
        (lambda found: found.update(sha256="0"), "not the weights"),
    ],
)
def test_a_model_that_cannot_be_used_is_one_line(served, change, line):
    folder = served()
    found = json.loads((folder / "model.json").read_text())
    change(found)
    (folder / "model.json").write_text(json.dumps(found))
    with pytest.raises(Failure, match=line):
        serving.load(folder)


def test_another_tokenizer_or_no_folder_is_one_line(served, tmp_path):
    folder = served()
    Tokenizer.characters().save(folder / "tokenizer.json")
    with pytest.raises(Failure, match=r"tokenizer\.json: not the tokenizer"):
        serving.load(folder)
    for missing in ("missing", "a" * 300):
        with pytest.raises(Failure, match=f"{missing}: no such folder"):
            serving.load(tmp_path / missing)


def test_the_models_in_a_folder_are_named(served, tmp_path):
    folder, stage = served("classifier"), tmp_path / "finetune"
    (stage / "s0").mkdir(parents=True)
    folder.rename(stage / "s0/era")
    for above in (stage / "s0", stage):
        with pytest.raises(Failure) as refused:
            serving.load(above)
        assert str(refused.value) == f"{above}/model.json: not found; name one of its models: {stage}/s0/era"
    (tmp_path / "empty").mkdir()
    with pytest.raises(Failure, match=r"model\.json: not found; run the stage"):
        serving.load(tmp_path / "empty")
