"""Logged models as MLflow loads and serves them."""

import base64
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import cli
from pipeline import serving, tracking
from pipeline.models.build import build
from pipeline.tracking import pyfunc, store
from pipeline.training import checkpoint
from tests.conftest import REPOSITORY
from tests.models.test_vit import spec as vision_spec
from tests.tracking.conftest import DEAD, free_port, until

TEXTS = ["Gold was found in California.", "Ünï"]


@pytest.fixture
def log(root, monkeypatch):
    """A function that logs a model's folder while the store is out of reach, and then sends it; it returns the run."""

    def send(folder):
        with monkeypatch.context() as away:
            away.setenv("MLFLOW_TRACKING_URI", DEAD)
            with tracking.start(root, key="k", resumed=False, experiment="t", stage="s", name="n", params={}) as run:
                run.model(folder, "m", {"valid/nats": 1.0})
        tracking.sync(root)
        return tracking.named(root, run.id)

    return send


@pytest.fixture
def loaded(root, log, monkeypatch):
    """A function that logs a model's folder and loads it as MLflow does."""

    def load(folder):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", store.embedded_uri(root))
        import mlflow

        return mlflow.pyfunc.load_model(f"models:/{log(folder).model().id}")

    return load


class Served:
    """`mlflow models serve` as a user runs it, on a port of its own."""

    def __init__(self, root, model):
        self.address = f"http://127.0.0.1:{free_port()}"
        options = ["--env-manager", "local", "--port", self.address.rpartition(":")[2]]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "models", "serve", "-m", model, *options],
            cwd=root,
            env=os.environ | {"PATH": path, "PYTHONPATH": str(REPOSITORY), "MLFLOW_TRACKING_URI": store.embedded_uri(root)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def there(self):
        assert self.process.poll() is None
        try:
            return urllib.request.urlopen(f"{self.address}/ping", timeout=5).status == 200
        except OSError:
            return False

    def ask(self, **request):
        headers = {"Content-Type": "application/json"}
        body = json.dumps(request).encode()
        with urllib.request.urlopen(urllib.request.Request(f"{self.address}/invocations", body, headers), timeout=60) as answer:
            return json.load(answer)["predictions"]

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def test_served_models_answer_as_their_folders_do(root, log, served):
    folders = {kind: served(kind) for kind in ("language-model", "classifier")}
    for kind, folder in folders.items():
        run = log(folder)
        candidate = tracking.Candidate(run, run.model(), "data", 1.0, {"method": "vqmoe", "unit": "nats"})
        tracking.register(root, kind, "for a test", [candidate])
    servers = {kind: Served(root, f"models:/{kind}@champion") for kind in folders}
    try:
        until(lambda: all(server.there() for server in servers.values()), 120)
        params = {"length": 12, "temperature": 0.5, "top_p": 0.9, "seed": 3}
        model = serving.load(folders["language-model"])
        wanted = [
            "".join(model.generate(prompt, params["length"], serving.Sampling(0.5, 0.9), params["seed"])) for prompt in TEXTS
        ]
        assert servers["language-model"].ask(inputs=TEXTS, params=params) == wanted
        with pytest.raises(urllib.error.HTTPError, match="400") as refused:
            servers["language-model"].ask(inputs=TEXTS, params={"top_p": 2})
        assert "top-p is 2.0: must be above 0 and at most 1" in refused.value.read().decode()
        found, model = servers["classifier"].ask(inputs=TEXTS), serving.load(folders["classifier"])
        for answer, share_L in zip(found, model.classify(TEXTS), strict=True):
            assert answer["label"] == model.spec.labels[share_L.argmax()]
            assert list(answer["probabilities"]) == list(model.spec.labels)
            np.testing.assert_allclose(list(answer["probabilities"].values()), share_L, rtol=1e-5)
    finally:
        for server in servers.values():
            server.kill()


def test_images_come_as_base64(loaded, tmp_path, seeded):
    described = vision_spec("vqmoe").model_copy(update={"view": "rgb"})
    folder, file = tmp_path / "model", tmp_path / "image.png"
    folder.mkdir()
    checkpoint.save(folder, build(described), described)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(file)
    model = loaded(folder)
    image = base64.b64encode(file.read_bytes()).decode()
    one, other = model.predict([image, image])
    (share_L,) = serving.load(folder).classify([file])
    assert one == other
    assert one["label"] == described.labels[share_L.argmax()]
    np.testing.assert_allclose(list(one["probabilities"].values()), share_L, rtol=1e-6)
    for wrong, line in (("no base64", "row 1: no base64"), (image[:40], "row 1: cannot be decoded"), ({"a": 1}, "row 1 is dict")):
        with pytest.raises(Exception, match=line):
            pyfunc.Asked(serving.load(folder)).predict(model_input(image, wrong))


def model_input(*rows):
    import pandas

    return pandas.DataFrame({0: rows})


def test_what_a_model_says_of_itself(loaded, served):
    model = loaded(served())
    assert model.input_example == ["we the people "]
    assert [one["name"] for one in model.metadata.signature.params.to_dict()] == ["length", "temperature", "top_p", "seed"]
    # As the command line does where nothing is said.
    told = {option.name: option.default for option in cli.main.commands["generate"].params}
    assert {name: default for name, (_, default) in pyfunc.PARAMS.items()}.items() <= told.items()
    import mlflow

    lines = Path(mlflow.pyfunc.get_model_dependencies(f"models:/{model.model_id}")).read_text().splitlines()
    # What no package index has is no requirement: one by its name would be somebody else's.
    assert lines[0] == f"# vqmoe {version('vqmoe')}, from its repository (commit unknown)"
    assert {line.partition("==")[0] for line in lines[1:]} == set(pyfunc.PACKAGES)


@pytest.mark.parametrize("content", [None, "not JSON", "[]", "{}", '{"kind": "future"}'])
def test_a_folder_of_something_else_is_left_alone(tmp_path, content):
    if content is not None:
        (tmp_path / "model.json").write_text(content)
    before = sorted(tmp_path.iterdir())
    pyfunc.describe(tmp_path, "m-1", {})
    assert sorted(tmp_path.iterdir()) == before
