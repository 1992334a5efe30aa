import pytest

from pipeline import tracking
from pipeline.errors import Failure


def _record(root, name="n", **params):
    with tracking.start(root, key=name, resumed=False, experiment="t", stage="pretrain", name=name, params=params) as run:
        run.log({"loss": 2.0}, 1)
        run.log({"loss": 1 / 3}, 2)
        run.text("one\r\ntwo\n", "notes.txt")
    return run.id


def test_a_run_is_read_back_by_the_first_characters_of_its_id(tmp_path):
    assert tracking.find(tmp_path, "0123") == []
    made = _record(tmp_path, seed=3)
    (found,) = tracking.find(tmp_path, made[:8])
    assert (found.id, found.status, found.params, found.metrics) == (made, "FINISHED", {"seed": "3"}, {"loss": 1 / 3})
    assert found.tags["vqmoe.stage"] == "pretrain"
    assert found.text("notes.txt") == "one\r\ntwo\n"
    assert (found.has("notes.txt"), found.has("other.txt")) == (True, False)
    with pytest.raises(Failure, match=rf"run {made}: its artifact other.txt is lost .*artifacts"):
        found.text("other.txt")
    _record(tmp_path)
    assert len(tracking.find(tmp_path, "")) == 2


def test_the_embedded_store_is_read_whatever_server_is_named(tmp_path, monkeypatch):
    made = _record(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://someone:secret@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert tracking.embedded(tmp_path, made).metrics == {"loss": 1 / 3}
    with pytest.raises(Failure, match=r"http://127\.0\.0\.1:9: runs cannot be read there") as caught:
        tracking.find(tmp_path, made)
    assert "secret" not in str(caught.value)
