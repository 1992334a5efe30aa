import pytest

from pipeline import tracking
from pipeline.errors import Failure, UsageError


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


def test_reading_makes_no_store_and_a_whole_id_is_no_beginning(tmp_path):
    assert tracking.find(tmp_path, "0123") == [] and tracking.reach(tmp_path)[1:] == (0, "")
    with pytest.raises(UsageError, match="models:/x/1: no model is registered here; `vqmoe register` makes them"):
        tracking.fetch(tmp_path, "models:/x/1", tmp_path)
    assert not [*tmp_path.iterdir()]
    made = _record(tmp_path)
    assert tracking.whole(tmp_path, made).id == made
    assert tracking.whole(tmp_path, made[:8]) is tracking.whole(tmp_path, "") is None
