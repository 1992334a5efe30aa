import json

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from pipeline import config
from pipeline.data.images import Images
from pipeline.evaluation import image_bench
from pipeline.evaluation.image_bench import ImageBench, image_trace, pictures, told_apart
from pipeline.evaluation.pictures import Pictures
from pipeline.evaluation.records import Record
from pipeline.models.build import Spec, build
from pipeline.moe.layer import SETTINGS
from pipeline.progress import Progress
from tests.conftest import REPOSITORY

SMALL = [
    "layers=2",
    "expert_blocks=[0, 1]",
    "width=16",
    "heads=2",
    "head_width=8",
    "experts=4",
    "expert_width=16",
    "dense_width=16",
]
CHECKS = [
    "kinds=[gaussian_noise, contrast]",
    "severities=[1, 4]",
    "images=20",
    "attack_eps=[8, 64]",
    "attack_steps=4",
    "attack_images=9",
]
RNG = np.random.default_rng(0)
TEST = Images(RNG.integers(0, 256, (24, 1, 8, 8), dtype=np.uint8), np.arange(24) % 3)


@pytest.fixture
def params():
    overrides = [*(f"model.{one}" for one in SMALL), *(f"robustness.{one}" for one in CHECKS)]
    codes = [f"methods.{method}.codes=8" for method in ("vqmoe", "vqmoe_released")]
    return config.load(REPOSITORY / "presets/vision/digits.yaml", SETTINGS, [*overrides, *codes])


@pytest.fixture
def model_of(params, seeded):
    """A function from a method and a pooling to a model that does not answer every image alike, its codes started."""

    def make(method="vqmoe", pooling="mean"):
        shape = params.model.model_copy(update={"pooling": pooling})
        described = {"method": method, "settings": params.method(method), "model": shape, "channels": 1, "size": 8}
        model = build(Spec(kind="image-classifier", labels=("a", "b", "c"), **described))
        torch.nn.init.normal_(model.head.weight)
        pixels_NCHW = torch.from_numpy(TEST.pixels_NCHW) / 255
        model.train()(pixels_NCHW, model.train_mode)
        model.eval()
        with torch.no_grad():
            model.head.bias -= model(pixels_NCHW, model.infer_mode)[0].mean(0)
        return model

    return make


def rows(params, model, shifts=None, outside=None):
    record = Record("images", model.infer_mode)
    with Progress("", 1) as progress:
        ImageBench(params.robustness, 0, progress).test(model, model.infer_mode, record, TEST, shifts or {}, outside or {})
    return record


@pytest.mark.parametrize("pooling", ["mean", "class"])
def test_conditions_scores_and_units(params, model_of, pooling):
    record = rows(params, model_of(pooling=pooling))
    found = {(row["kind"], row["rate"]): row for row in record.rows}
    noises = {(kind, float(severity)) for kind in params.robustness.kinds for severity in params.robustness.severities}
    attacks = {(kind, eps) for kind in ("fgsm", "pgd") for eps in (8.0, 64.0)}
    assert found.keys() == {("clean", 0.0)} | noises | attacks
    clean = found["clean", 0.0]
    for (kind, rate), row in found.items():
        key = f"images/discrete/{kind}/{rate!r}"
        assert record.units[f"{key}/score"].mean() == row["score"]
        assert record.units[f"{key}/lost"].mean() == row["degradation"]
        assert len(record.units[f"{key}/score"]) == (9 if kind in ("fgsm", "pgd") else 20)
        if (kind, rate) in noises:
            assert row["degradation"] == pytest.approx(clean["score"] - row["score"])
            assert 0 < row["consistency"] <= 1
    assert found["pgd", 64.0]["degradation"] > 0


def test_noise_that_changes_nothing_costs_nothing(params, model_of, monkeypatch):
    monkeypatch.setattr(image_bench, "corrupt_images", lambda pixels, kind, severity, seed: pixels)
    for row in rows(params, model_of("smoe")).rows:
        if row["family"] == "noise":
            assert (row["degradation"], row["consistency"], row["flips"]) == (0, 1, 0)


def test_a_shift_is_scored_among_its_classes(params, model_of):
    """Where a class is the only one left, every answer is right; among all classes few would be."""
    model, only_b = model_of("smoe"), Images(TEST.pixels_NCHW[:8], np.ones(8, dtype=np.int64))
    record = rows(params, model, {"other": only_b})
    (shift,) = (row for row in record.rows if row["family"] == "shift")
    assert (shift["kind"], shift["score"], shift["degradation"]) == ("other", 1.0, 0.0)
    assert record.units["images/router/other/0.0/clean"].tolist() == [1.0] * 8
    scores = image_trace(model, torch.from_numpy(TEST.pixels_NCHW[:8]) / 255, "router").scores
    assert (scores.argmax(1) == 1).double().mean() < 1
    two = Images(TEST.pixels_NCHW, np.array([0, 2] * 12))
    (shift,) = (row for row in rows(params, model, {"two": two}).rows if row["family"] == "shift")
    seen = image_trace(model, torch.from_numpy(TEST.pixels_NCHW[np.linspace(0, 23, 20).astype(int)]) / 255, "router").scores
    labels = two.labels_N[np.linspace(0, 23, 20).astype(int)]
    assert shift["score"] == np.mean(
        [(0 if s[0] >= s[2] else 2) == label for s, label in zip(seen.tolist(), labels, strict=True)]
    )


def test_what_is_told_from_other_images_is_the_area_under_the_curve():
    rng = np.random.default_rng(0)
    # Few levels, so that there are ties.
    clean, outside = (torch.from_numpy(rng.integers(0, 4, (count, 3)).astype(np.float32)) for count in (30, 20))
    confidence = torch.cat([clean, outside]).double().softmax(1).amax(1).numpy()
    effect = told_apart(clean, outside)
    area = roc_auc_score(np.arange(50) < 30, confidence)
    assert effect.score_S.shape == (20,) and effect.clean_S.shape == (30,)
    assert effect.score_S.mean() == pytest.approx(area) and effect.clean_S.mean() == pytest.approx(area)
    assert (effect.lost_S == 1 - effect.score_S).all()


def test_other_images_are_a_condition_of_their_own(params, model_of):
    model = model_of("smoe")
    same = rows(params, model, outside={"odd": TEST})
    (found,) = (row for row in same.rows if row["family"] == "outside")
    assert (found["kind"], found["score"], found["consistency"]) == ("odd", pytest.approx(0.5, abs=0.05), None)
    assert same.summary()["odd"]["score"] == found["score"]
    assert same.units["images/router/odd/0.0/clean"].mean() == pytest.approx(found["score"])


@pytest.mark.parametrize("pooling", ["mean", "class"])
def test_pictures_hold_the_first_choice_of_every_patch_and_the_nearest_patches_of_codes(params, model_of, pooling, tmp_path):
    model = model_of(pooling=pooling)
    found = pictures(model, "discrete", TEST, params.robustness, 0)
    assert found.conditions == ("clean", "gaussian_noise 4", "contrast 4")
    assert found.expert_LSVRK.shape == found.code_LSVRK.shape == (2, len(found.label_S), 3, 4, 4)
    assert (found.code_LSVRK % 4 == found.expert_LSVRK).all()
    traced = image_trace(model, torch.from_numpy(found.pixels_SVCHW[:, 0]) / 255, "discrete")
    assert (traced.index[1][..., 0].view(-1, 4, 4).numpy() == found.expert_LSVRK[1, :, 0]).all()
    assert set(found.nearest) == {0, 1}
    for codes in found.nearest.values():
        assert sum(coded.share for coded in codes.values()) == pytest.approx(1)
        assert len(codes) == 8
    found.save(tmp_path)
    again = Pictures.load(tmp_path)
    assert again.conditions == found.conditions and again.blocks == found.blocks
    for name in ("pixels_SVCHW", "label_S", "predicted_SV", "expert_LSVRK", "code_LSVRK"):
        assert (getattr(again, name) == getattr(found, name)).all()
    for block, codes in found.nearest.items():
        for code, coded in codes.items():
            assert again.nearest[block][code].share == coded.share
            assert np.array_equal(again.nearest[block][code].nearest_MCSS, coded.nearest_MCSS)


def test_damaged_pictures_are_one_line(params, model_of, tmp_path):
    from pipeline.errors import Failure

    pictures(model_of("smoe"), "router", TEST, params.robustness, 0).save(tmp_path)
    assert Pictures.load(tmp_path).code_LSVRK is None
    path, named = tmp_path / "pictures.safetensors", json.loads((tmp_path / "pictures.json").read_text())
    for name in named:
        (tmp_path / "pictures.json").write_text(json.dumps(named | {name: named[name][1:]}))
        with pytest.raises(Failure, match=r"pictures\.safetensors: damaged, not the images and blocks .*run `dvc repro`"):
            Pictures.load(tmp_path)
        (tmp_path / "pictures.json").write_text(json.dumps({other: named[other] for other in named if other != name}))
        with pytest.raises(Failure, match=rf"pictures\.safetensors: missing or damaged \('{name}'\); run `dvc repro`"):
            Pictures.load(tmp_path)
    (tmp_path / "pictures.json").write_text(json.dumps(named))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(Failure, match=r"pictures\.safetensors: missing or damaged .*run `dvc repro`"):
        Pictures.load(tmp_path)


def test_a_shift_whose_classes_the_test_split_lacks_is_one_line(params, model_of):
    from pipeline.errors import Failure

    with pytest.raises(Failure, match=r"data\.shifts: the test split has no image of the classes of other; drop it"):
        rows(params, model_of("smoe"), {"other": Images(TEST.pixels_NCHW, np.full(24, 7))})


def test_an_attack_that_may_change_nothing_costs_nothing_whoever_the_neighbours_are(params, model_of):
    """The answer to an image is its own: attacked images have other neighbours than clean ones had."""
    tiny = params.robustness.model_copy(update={"attack_eps": (1e-6,)})
    for method in ("vmoe", "softmoe"):
        model, record = model_of(method), Record("images", "router")
        with Progress("", 1) as progress:
            ImageBench(tiny, 0, progress).test(model, "router", record, TEST)
        for row in record.rows:
            if row["family"] == "attack":
                assert (row["degradation"], row["consistency"], row["flips"]) == (0, 1, 0)
