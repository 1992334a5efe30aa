"""A tiny experiment, whole but quick: for stages and the command line."""

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline import config
from pipeline.data import archives
from pipeline.data.corpora import PUBLISHED
from pipeline.data.tokenizers import Tokenizer
from pipeline.models.build import Spec, build
from pipeline.moe.layer import SETTINGS
from pipeline.tracking.store import ENVIRONMENT
from pipeline.training import checkpoint
from tests.data.server import Server

REPOSITORY = Path(__file__).parent.parent

TINY = (
    "model.layers=2",
    "model.width=16",
    "model.heads=2",
    "model.head_width=8",
    "model.experts=4",
    "model.expert_width=16",
    "model.context=32",
    "model.evaluate_context=32",
    "methods.vqmoe.codes=4",
    "prepare.passage=60",
    "prepare.vocabulary=500",
    "pretrain.steps=12",
    "pretrain.batch=4",
    "pretrain.validate_every=6",
    "pretrain.validate_tokens=512",
    "warmup.steps=4",
    "warmup.batch=4",
    "warmup.validate_every=2",
    "warmup.validate_tokens=512",
    "warmup.kmeans_tokens=512",
    "finetune.steps=4",
    "finetune.batch=4",
    "finetune.crop=16",
    "finetune.validate_every=2",
    "finetune.validate_passages=8",
    "robustness.segments=4",
    "robustness.passages=8",
    "robustness.rates=[0.05, 0.2]",
    "robustness.attack_rates=[0.1]",
    "robustness.attack_queries=8",
    "robustness.attack_texts=3",
    "resume.steps=1",
    "compute.repeats=6",
    "report.dpi=60",
    "report.resamples=200",
)


def write_corpus(folder):
    """A folder corpus with learnable text: counting sentences, different in each split."""
    folder.mkdir(parents=True)
    words = "alpha beta gamma delta epsilon zeta eta theta iota kappa".split()
    for offset, (split, count) in enumerate({"train": 400, "valid": 60, "test": 60}.items()):
        sentences = [f"{words[(i + offset) % 10]} follows {words[(i * 3) % 10]} {words[(i * 7) % 10]}." for i in range(count)]
        (folder / f"{split}.txt").write_text(" ".join(sentences), encoding="utf-8")
    return folder


def write_task(path):
    """A labelled file of two classes."""
    lines = ["text,label,split"]
    for split, count in (("train", 24), ("valid", 8), ("test", 12)):
        lines += [
            f"{'alpha beta gamma' if i % 2 else 'zeta eta theta'} number {i},{'first' if i % 2 else 'second'},{split}"
            for i in range(count)
        ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(autouse=True, scope="session")
def _signals_as_in_a_terminal():
    """Tests that run in the background or under nohup would hand on that these are ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    """No server, root folder or run of the caller's environment reaches a test."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "DVC_ROOT", "DVC_STAGE", "DVC_EXP_NAME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def warm(tmp_path_factory):
    """A folder with a `vqmoe`, a `pytest` and a `python` that start at once, for commands that get no signals."""
    folder = tmp_path_factory.mktemp("warm")
    command = [sys.executable, str(REPOSITORY / "tests/warm.py"), str(folder)]
    with subprocess.Popen(command, env=os.environ | ENVIRONMENT, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout.readline() == b"ready\n"
        yield folder
        os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def server(monkeypatch):
    """A server of archives on this machine; who waits for it does not wait."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(archives, "FIRST_WAIT", 0.0)
    with Server() as running:
        yield running


@pytest.fixture
def publish(server, monkeypatch):
    """A function that puts an archive of one's own in the place of a published corpus."""

    def replace(name, archive):
        file = archives.file_name(PUBLISHED[name].url)
        server.files[file] = archive
        entry = PUBLISHED[name]._replace(url=server.url(file), sha256=hashlib.sha256(archive).hexdigest())
        monkeypatch.setitem(PUBLISHED, name, entry)

    return replace


@pytest.fixture
def tiny_params():
    """A function from overrides to the params of the tiny experiment."""
    return lambda *overrides: config.load(REPOSITORY / "params.yaml", SETTINGS, (*TINY, *overrides))


@pytest.fixture
def tiny_spec(tiny_params):
    """A function from a method and a kind of model to the description of one of the tiny experiment."""

    def describe(method, kind="language-model", **more):
        params = tiny_params()
        head = {"labels": ("a", "b"), "pooling": "mean", "head_dropout": 0.1} if kind == "classifier" else {}
        described = {"settings": params.method(method), "model": params.model, "vocabulary": 257} | head | more
        return Spec(kind=kind, method=method, **described)

    return describe


@pytest.fixture
def served(tmp_path, tiny_spec, seeded):
    """A function that writes a fresh model as a stage does, and gives its folder."""

    def write(kind="language-model", method="vqmoe", tokenizer=None, **more):
        tokenizer = tokenizer or Tokenizer.bytes()
        described = {"view": "bytes", "vocabulary": tokenizer.size, "tokenizer": tokenizer.digest} | more
        spec = tiny_spec(method, kind, **described)
        folder = tmp_path / kind
        folder.mkdir()
        checkpoint.save(folder, build(spec), spec)
        tokenizer.save(folder / "tokenizer.json")
        return folder

    return write


@pytest.fixture
def corpus_folder(tmp_path):
    return write_corpus(tmp_path / "corpus")


@pytest.fixture
def task_file(tmp_path):
    return write_task(tmp_path / "task.csv")


@pytest.fixture
def tiny_overrides(corpus_folder, task_file):
    """Overrides that make the default experiment tiny, on its own corpus and task."""
    return (*TINY, f"data.corpus={corpus_folder}", f"data.tasks={{toy: {task_file}}}", f"data.shifts={{other: {corpus_folder}}}")


@pytest.fixture
def shared_data():
    """Real data that may not be in the repository: in the folder VQMOE_SHARED_DATA, or beside the repository."""
    folder = Path(os.environ.get("VQMOE_SHARED_DATA", REPOSITORY.parent / "shared/data"))
    if not folder.exists():
        pytest.skip(f"{folder} is not there")
    return folder


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def seeded():
    torch.manual_seed(0)
