"""Every preset: its form, the sizes its page gives, and steps of every method of its grid at reduced size; `vqmoe preset`."""

import json
import lzma
import re
import runpy
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import cli
from pipeline import config
from pipeline.data.batches import Examples
from pipeline.data.corpora import view
from pipeline.data.images import Images
from pipeline.data.published import VALID_SHARE
from pipeline.data.tokenizers import Tokenizer
from pipeline.models.build import Spec, build
from pipeline.moe.layer import SETTINGS
from pipeline.training.objectives import LanguageObjective, classification_objective, image_objective
from pipeline.training.optim import adam
from pipeline.training.validation import held_out, score_tokens
from tests.conftest import REPOSITORY

PAGE = SimpleNamespace(**runpy.run_path(str(REPOSITORY / "docs/presets.py")))
PARAMS = PAGE.load()
FILES = {name: REPOSITORY / f"presets/{name}.yaml" for name in PARAMS}
TEXTS, IMAGES = list(PAGE.texts(PARAMS)), list(PAGE.images(PARAMS))
PAPER = [name for name in TEXTS if name.startswith("paper/")]
TEXT = (REPOSITORY / "docs/presets.md").read_text()

# Small, and no less a model with heads, experts and a memory; three cutoffs ask for a width of 64.
SMALL = ["layers=1", "width=64", "heads=2", "head_width=8", "expert_width=16", "context=8", "evaluate_context=8"]
WORDS = [f"{first}{second}" for first in "abcdefg" for second in "hijklmn"]


def form(path, methods):
    """Keys with their comments, without the head, without values, and without the sections of other methods."""
    text = re.sub(rf"^  (?!({'|'.join(methods)}):)\w+:\n( {{4}}.*\n)+", "", path.read_text(), flags=re.M)
    lines = re.findall(r"^( *\w+:)(?: +[^#\n]*?)?( *#.*)?$", text, re.M)
    # Tasks and shifts have names of their own.
    return [(key, comment.strip()) for key, comment in lines if not comment.endswith("# name: source")]


@pytest.mark.parametrize("name", FILES)
def test_keys_and_comments_are_those_of_the_params_file(name):
    pattern = REPOSITORY / ("params.yaml" if name in TEXTS else "presets/vision/digits.yaml")
    methods = PARAMS[name].methods
    assert form(FILES[name], methods) == form(pattern, methods)
    first, *lines = FILES[name].read_text().splitlines()
    assert re.fullmatch("# .+", first)
    for line in lines:
        if match := re.fullmatch(r"( .*?) *(#.*)", line):
            assert line == f"{match[1]:<26} {match[2]}"


def test_the_page_has_the_sizes_that_the_presets_have():
    # All of it but the costs of the large models, which take a minute to count.
    fixed = re.split(r"{\w+}", PAGE.TEXT)
    known = PAGE.sizes(PAGE.texts(PARAMS)), PAGE.costs({name: PARAMS[name] for name in ("tiny", "toy")}), PAGE.tasks()
    digits = PAGE.vision({"vision/digits": PARAMS["vision/digits"]}).partition("---:|\n")[2]
    for part in (*fixed, *known, digits):
        assert part in TEXT, "run python docs/presets.py"
    for name in FILES:
        assert TEXT.count(f"`{name}`") >= 2, name


def test_active_parameters_by_hand():
    params, m = PARAMS["paper/enwik8-transformer"], PARAMS["tiny"].model
    norms, attention = 2 * 2 * m.width, 4 * m.width**2 + 4 * m.width
    expert, router = 2 * m.width * m.expert_width + m.width + m.expert_width, m.experts * (m.width + 1)
    codes, gate = 2 * params.method("vqmoe").codes * m.width, 2 * (m.width + 1)
    wanted = {
        ("smoe", "router"): 2 * expert + router,
        ("smoe_dropout", "router"): 2 * expert,
        ("smoe_dropout", "dense"): m.experts * expert,
        ("vqmoe", "both"): 2 * expert + router + codes + gate,
        ("vqmoe", "discrete"): expert + codes,
        ("dense", "dense"): 2 * expert - m.width,
    }
    for (method, mode), layer in wanted.items():
        model = PAGE.language_model(m, method, params.method(method), 50)
        assert PAGE.active(model, mode) == m.layers * (norms + attention + layer), (method, mode)


def test_sizes_of_the_tasks(shared_data):
    for name in ("sst2", "sst5", "banking77"):
        with lzma.open(shared_data / f"{name}.jsonl.xz", "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        labels = Counter(row["label"] for row in rows if row["split"] != "test")
        # BANKING77's validation split there is another than ours, which holds a share of each class out.
        train = sum(row["split"] == "train" for row in rows)
        if name == "banking77":
            train = sum(count - round(VALID_SHARE * count) for count in labels.values())
        assert (len(labels), train) == PAGE.TASKS[name][:2]


@pytest.mark.parametrize("name", PAPER)
def test_settings_of_the_paper(name):
    corpus, _, model = name.removeprefix("paper/").rpartition("-transformer")
    tokenizer, batch, vocabulary, cutoffs = {
        "enwik8": ("bytes", 44, 257, []),
        "text8": ("characters", 44, 28, []),
        "wikitext-103": ("words", 22, 267_736, [20_000, 40_000, 200_000]),
        "lm1b": ("words", 11, 793_472, [60_000, 100_000, 640_000]),
    }[corpus]
    xl, large = model.startswith("-xl"), model.endswith("-large")
    params = PARAMS[name]
    assert PAGE.vocabulary(params.data) == vocabulary
    wanted = {
        "grid.methods": sorted(params.methods),
        "grid.seeds": [1111],
        "data.corpus": corpus,
        "data.tokenizer": tokenizer,
        "model.layers": 8 if large else 4,
        "model.width": 512 if large else 256,
        "model.heads": 8,
        "model.head_width": 64,
        "model.experts": 16,
        "model.expert_width": 1024 if large else 512,
        "model.context": 512,
        "model.memory": 512 if xl else 0,
        "model.evaluate_context": 128,
        "model.evaluate_memory": 896 if xl else 0,
        "model.dropout": 0.1,
        "model.norm": "post",
        "model.positions": "relative" if xl else "learned",
        "model.cutoffs": cutoffs,
        "methods.vqmoe.top_k": 1,
        "methods.vqmoe.balance": 0.01,
        "methods.vqmoe.codes": 16,
        "methods.vqmoe.input": "residual",
        "methods.vqmoe.beta": 0.08,
        "methods.vqmoe.combine": "gate",
        "methods.vqmoe.drop_routed": 0.0,
        "methods.vqmoe_released.codes": 16,
        "methods.smoe.top_k": 2,
        "pretrain.steps": 100_000,
        "pretrain.batch": batch,
        "pretrain.learning_rate": 3.5e-4,
        "finetune.pooling": "last",
        "finetune.weight_decay": 0.0,
    }
    for stage in ("pretrain", "warmup", "finetune"):
        wanted |= {f"{stage}.beta2": 0.999, f"{stage}.ramp": 0.0, f"{stage}.clip": 0.25}
    found = config.flat(params) | {"grid.methods": sorted(params.grid.methods)}
    assert {key: found[key] for key in wanted} == wanted


@pytest.mark.parametrize("name", PAPER)
def test_epochs_of_the_paper(name):
    _, examples, rate, epochs, batch = PAGE.TASKS[PARAMS[name].data.tasks["sst2"]]
    found = PARAMS[name].finetune
    assert (found.learning_rate, found.batch) == (float(rate), batch)
    assert found.steps == epochs * found.validate_every
    assert 0 <= found.validate_every * batch - examples < batch


def reduced(name):
    """The preset at small size; positions, memory, norm, number of cutoffs, methods and training stay what they are."""
    whole = PARAMS[name].model
    model = [*SMALL, f"cutoffs={[10, 20, 30][: len(whole.cutoffs)]}"]
    model += [f"{key}=8" for key in ("memory", "evaluate_memory") if getattr(whole, key)]
    return config.load(FILES[name], SETTINGS, [f"model.{key}" for key in model] + ["finetune.crop=8"])


def step(model, training, objective, steps):
    """Train; the names of the parameters that changed."""
    optimizer = adam(model, training.learning_rate, training.beta2)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for number in range(1, steps + 1):
        loss, parts = objective(number)
        assert all(value.isfinite() for value in (loss, *parts.values()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


@pytest.mark.parametrize(("name", "method"), [(name, method) for name in TEXTS for method in PARAMS[name].grid.methods])
def test_steps_of_pre_training_and_fine_tuning(name, method, seeded):
    params = reduced(name)
    text = view("\n".join(" ".join(WORDS[i % 7 :: i % 5 + 1]) for i in range(40)), params.data.view)
    tokenizer = Tokenizer.make(params.data.tokenizer, [text], params.data.vocabulary)
    tokens, unit = tokenizer.encode(text), tokenizer.unit
    spec = Spec(
        kind="language-model", method=method, settings=params.method(method), model=params.model, vocabulary=tokenizer.size
    )
    model = build(spec).train()
    # The second step is the first that can remember.
    objective = LanguageObjective(
        model, tokens, batch=2, seed=params.grid.seeds[0], mode=model.train_mode, unit=unit, steps=params.pretrain.steps
    )
    changed = step(model, params.pretrain, objective, steps=2)
    assert (learning(model) | ({"adaptive.head.weight"} if params.model.cutoffs else set())) <= changed
    assert unit == ("perplexity" if params.data.tokenizer in ("words", "bpe") else "bpc")
    assert 0 < score_tokens(model.eval(), held_out(model, tokens, 64), model.infer_mode, unit) < float("inf")

    head = {"kind": "classifier", "labels": ("a", "b"), "pooling": params.finetune.pooling, "head_dropout": 0.1}
    tuned = build(spec.model_copy(update=head)).train()
    tuned.backbone.load_state_dict(model.state_dict())
    for layer in tuned.backbone.moe_layers:
        layer.freeze_assignment()
    examples = Examples([tokens[:20], tokens[20:25]], torch.tensor([0, 1]).numpy())
    objective = classification_objective(
        tuned, examples, batch=2, crop=params.finetune.crop, seed=0, pad=tokenizer.pad, mode=tuned.backbone.infer_mode
    )
    changed = step(tuned, params.finetune, objective, steps=1)
    assert learning(tuned) | {"features.0.weight", "scores.1.weight"} <= changed


@pytest.mark.parametrize(("name", "method"), [(name, method) for name in IMAGES for method in PARAMS[name].grid.methods])
def test_steps_on_images(name, method, seeded):
    small = ["layers=2", "expert_blocks=[1]", "width=16", "heads=2", "head_width=8", "expert_width=16", "dense_width=16"]
    patch = PARAMS[name].model.patch
    params = config.load(FILES[name], SETTINGS, [f"prepare.size={max(8, 2 * patch)}", *(f"model.{key}" for key in small)])
    model = PAGE.image_classifier(params, method, labels=3).train()
    pixels = np.random.default_rng(0).integers(0, 256, (6, *model.shape), dtype=np.uint8)
    images = Images(pixels, np.array([0, 1, 2, 0, 1, 2]))
    for settings, mode, steps in ((params.pretrain, model.train_mode, 100), (params.finetune, model.infer_mode, None)):
        given = settings.model_copy(update={"batch": 4})
        changed = step(model, given, image_objective(model, images, given, seed=0, mode=mode, steps=steps), steps=2)
        # In the first step nothing but the head, which starts at zero, gets a gradient.
        assert {
            key for key, _ in model.named_parameters() if re.search(r"embedding\.weight|attention|head|experts\.", key)
        } <= changed


@pytest.mark.parametrize("name", FILES)
def test_a_preset_is_printed_as_it_is(name):
    result = CliRunner().invoke(cli.main, ["preset", name])
    assert result.exit_code == 0
    assert result.stdout_bytes == FILES[name].read_bytes()


def test_presets_are_listed_with_a_line_each(monkeypatch):
    monkeypatch.chdir(REPOSITORY / "docs")
    result = CliRunner().invoke(cli.main, ["preset"])
    assert result.exit_code == 0
    for line, (name, path) in zip(result.output.splitlines(), FILES.items(), strict=True):
        assert line.split(maxsplit=1) == [name, path.read_text().splitlines()[0].removeprefix("# ")]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tinny", " (did you mean tiny?)"),
        ("enwik8-transformer-xl", " (did you mean paper/enwik8-transformer-xl?)"),
        ("tiny.yaml", " (did you mean tiny?)"),
        ("../params", ""),
    ],
)
def test_a_name_that_no_preset_has_is_one_line_with_the_nearest(name, said):
    result = CliRunner().invoke(cli.main, ["preset", name])
    assert result.exit_code == 2
    (line,) = result.output.splitlines()
    assert line == f"vqmoe: there is no preset '{name}'{said}; `vqmoe preset` lists them all"


def test_outside_of_a_repository_there_are_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments in (["preset"], ["preset", "tiny"]):
        result = CliRunner().invoke(cli.main, arguments)
        assert (result.exit_code, len(result.output.splitlines())) == (2, 1)
        assert "holds no presets; run inside the repository" in result.output


def learning(model):
    """Names of the parameters that every method teaches: embeddings, attention and experts."""
    return {name for name, _ in model.named_parameters() if re.search(r"embedding\.weight|attention|\.experts\.", name)}
