"""The whole experiment on images, tiny: the stages are those of text."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from pipeline import config
from pipeline.data.images import Images, ImageSet, open_set, write_set
from pipeline.moe.layer import SETTINGS
from pipeline.training import checkpoint
from stages import finetune, prepare, pretrain, problems, report, robustness, warmup
from stages.paths import SECTIONS, Cell, Paths
from tests.conftest import REPOSITORY

TINY = (
    "model.layers=2",
    "model.expert_blocks=[1]",
    "model.width=16",
    "model.heads=2",
    "model.head_width=8",
    "model.experts=4",
    "model.expert_width=16",
    "model.dense_width=16",
    "methods.vqmoe.codes=4",
    "methods.vqmoe_released.codes=4",
    *(f"{stage}.batch=8" for stage in ("pretrain", "warmup", "finetune")),
    *(f"{stage}.validate_images=16" for stage in ("pretrain", "warmup", "finetune")),
    "pretrain.steps=6",
    "pretrain.validate_every=3",
    "warmup.steps=2",
    "warmup.validate_every=2",
    "warmup.kmeans_images=16",
    "finetune.steps=4",
    "finetune.validate_every=2",
    "robustness.kinds=[gaussian_noise, jpeg]",
    "robustness.severities=[1, 5]",
    "robustness.images=12",
    "robustness.attack_eps=[2, 8]",
    "robustness.attack_steps=2",
    "robustness.attack_images=5",
    "compute.repeats=6",
    "report.dpi=60",
    "report.resamples=200",
)


MODES = {
    "vqmoe": ["both", "discrete"],
    "vqmoe_released": ["both", "discrete", "router"],
    "smoe_dropout": ["dense", "router"],
}


def load(*overrides):
    return config.load(REPOSITORY / "presets/vision/digits.yaml", SETTINGS, (*TINY, *overrides))


def random_set(classes, count=24, channels=1, size=8, seed=0):
    rng = np.random.default_rng(seed)

    def split(many):
        labels = np.arange(many) % len(classes)
        return Images(rng.integers(0, 256, (many, channels, size, size), dtype=np.uint8), labels.astype(np.int64))

    return ImageSet(tuple(classes), {"train": split(count), "valid": split(12), "test": split(12)}, 0)


@pytest.fixture
def paths(tmp_path):
    """Random images of three classes, and a task with two of its own, as `prepare` leaves them."""
    paths = Paths(tmp_path, tmp_path)
    write_set(paths.source, random_set("abc"))
    write_set(paths.task("digits"), random_set("xy", seed=1))
    (paths.data / "shifts").mkdir()
    return paths


def log(values, step=None):
    pass


def trained(paths, method, *overrides):
    """Runs the training stages of a cell and robustness; their metrics by stage."""
    params, cell = load(*overrides), Cell(method, 0)
    task, found = cell._replace(task="digits"), {}
    for stage, module, one in [
        ("pretrain", pretrain, cell),
        ("warmup", warmup, task),
        ("finetune", finetune, task),
        ("robustness", robustness, cell),
    ]:
        found[stage] = module.run(params.select(SECTIONS[stage], method), paths, one, log)
    return found


@pytest.mark.parametrize(
    "method", ["vqmoe", "smoe", "xmoe", "vmoe", "softmoe", "dense", "competesmoe", "smoe_dropout", "vqmoe_released"]
)
def test_every_method_goes_through_all_stages(paths, method):
    found = trained(paths, method)
    test, modes = found["pretrain"]["test"], MODES.get(method)
    assert {"nats", "accuracy", "macro_f1"} <= test.keys()
    units = load_file(paths.output("pretrain", Cell(method, 0)) / "units.safetensors")
    for mode, correct_U in units.items():
        name = "accuracy" if mode == next(iter(modes or units)) else f"accuracy_{mode}"
        assert correct_U.mean() == pytest.approx(test[name])
    assert set(units) == set(modes) if modes else len(units) == 1
    assert set(found["robustness"]) == {"images", "digits"}
    for by_mode in found["robustness"].values():
        for summary in by_mode.values():
            assert set(summary) == {"clean", "noise", "attack"}


def test_a_task_with_other_labels_has_a_new_head_on_the_same_backbone(paths):
    params, cell = load(), Cell("smoe", 0, "digits")
    pretrain.run(params.select(SECTIONS["pretrain"], "smoe"), paths, cell._replace(task=None), log)
    chosen = params.select(SECTIONS["warmup"], "smoe")
    problem = problems.domain(chosen, paths, cell)
    model = problem.begin(paths.output("pretrain", cell))
    source = checkpoint.load(paths.output("pretrain", cell), problems.image_classifier(chosen, cell, open_set(paths.source)))
    same = {name for name, tensor in source.state_dict().items() if torch.equal(tensor, model.state_dict().get(name))}
    assert {name for name in source.state_dict() if "head" not in name} <= same
    assert model(torch.rand(2, 1, 8, 8), model.infer_mode)[0].shape == (2, 2)


def test_a_task_with_the_same_labels_keeps_the_head(paths):
    write_set(paths.task("same"), random_set("abc", seed=2))
    params, cell = load("data.tasks={same: digits}"), Cell("smoe", 0, "same")
    pretrain.run(params.select(SECTIONS["pretrain"], "smoe"), paths, cell._replace(task=None), log)
    chosen = params.select(SECTIONS["warmup"], "smoe")
    model = problems.domain(chosen, paths, cell).begin(paths.output("pretrain", cell))
    source = checkpoint.load(paths.output("pretrain", cell), problems.image_classifier(chosen, cell, open_set(paths.source)))
    pixels_BCHW = torch.rand(3, 1, 8, 8)
    assert torch.equal(model(pixels_BCHW, "router")[0], source(pixels_BCHW, "router")[0])


def test_same_seed_same_bits(paths, tmp_path):
    cell = Cell("vqmoe", 0)
    trained(paths, "vqmoe")
    first = (paths.output("finetune", cell._replace(task="digits")) / "model.safetensors").read_bytes()
    trained(paths, "vqmoe")
    assert (paths.output("finetune", cell._replace(task="digits")) / "model.safetensors").read_bytes() == first


def test_digits_are_prepared_with_what_to_compare_with(tmp_path):
    paths, params = Paths(tmp_path, tmp_path), load()
    metrics = prepare.run(params.select(SECTIONS["prepare"]), paths)
    found = open_set(paths.source)
    assert found.classes == tuple("0123456789")
    assert sum(len(images.labels_N) for images in found.splits.values()) == 1797
    assert metrics["references"]["tasks"]["digits"]["accuracy"] > 0.9
    manifest = json.loads((paths.data / "manifest.json").read_text())
    assert manifest["corpus"] == "digits" and manifest["view"] == "grey"


def test_the_report_of_images(paths):
    from stages.execute import execute

    (paths.root / "odd/cat").mkdir(parents=True)
    for shade in range(9):
        Image.new("L", (8, 8), 20 * shade).save(paths.root / f"odd/cat/{shade}.png")
    params = load("grid.methods=[vqmoe, smoe, dense]", "grid.seeds=[0]", "data.outside={odd: odd}")
    execute("prepare", params, paths)
    for method in params.grid.methods:
        for stage in ("pretrain", "warmup", "finetune", "robustness", "compute"):
            execute(stage, params, paths, Cell(method, 0, "digits" if stage in ("warmup", "finetune") else None))
    report.run(params.select(SECTIONS["report"]), paths)
    page, text = (paths.report / "index.html").read_text(), (paths.report / "report.md").read_text()
    figures = {path.stem for path in (paths.report / "figures").iterdir()}
    assert {"patches-expert-vqmoe", "patches-expert-smoe", "codes-1-vqmoe", "severity-images", "attack"} <= figures
    assert not {"patches-expert-dense", "codes-1-smoe"} & figures
    assert "mean corruption error %" in text and "logistic regression on pixels" in text
    assert "images: told from odd by confidence %" in text and "Images of other classes: odd." in page
    assert "28 % more robust than smoe: pre-trained classifier under noise" in text
    assert "language model" not in page.replace("a language model", "")
    dense = next(line for line in text.splitlines() if line.startswith("| mean corruption error %") or "mean corruption" in line)
    assert dense.split("|")[4].strip() == "100.0"
