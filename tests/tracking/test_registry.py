"""Models in MLflow's registry, and out of it."""

import pytest

from pipeline import tracking
from pipeline.errors import Failure, UsageError
from pipeline.tracking import store
from tests.tracking.conftest import DEAD


@pytest.fixture
def candidate(root, tmp_path):
    """A function that records a run with a model, ready to be registered."""

    def make(name, score, method="vqmoe", measured_on="data"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "model.safetensors").write_text(name)
        with tracking.start(root, key=name, resumed=False, experiment="t", stage="pretrain", name=name, params={}) as run:
            # As while training goes on: the last of these is not what is kept.
            run.log({"valid/bpc": 9.0}, 5)
            run.model(folder, name, {"valid/bpc": score})
        found = tracking.named(root, run.id)
        model = found.model()
        assert model.metrics == {"valid/bpc": score}
        return tracking.Candidate(found, model, measured_on, score, {"method": method, "unit": "bpc"})

    return make


def register(root, *candidates, name="x-language-model"):
    return tracking.register(root, name, "what it is", candidates)


def test_each_run_is_a_version_once_and_the_lowest_is_the_champion(root, candidate):
    first, second, third = candidate("a", 1.5), candidate("b", 1.25, "smoe"), candidate("c", 1.75)
    made = register(root, first, third)
    assert [(one.version, one.run_id, one.score, one.aliases) for one in made] == [
        (1, first.run.id, 1.5, ["champion", "vqmoe"]),
        (2, third.run.id, 1.75, []),
    ]
    # Those that are there already count too.
    made = register(root, second)
    assert [(one.version, one.aliases) for one in made] == [(1, ["vqmoe"]), (2, []), (3, ["champion", "smoe"])]
    assert register(root, first, second, third) == made
    client = store.connect(root)
    registered = client.get_registered_model("x-language-model")
    assert (registered.description, registered.aliases) == ("what it is", {"champion": 3, "smoe": 3, "vqmoe": 1})
    version = client.get_model_version_by_alias("x-language-model", "champion")
    assert (version.run_id, version.source) == (second.run.id, second.model.place)
    assert version.tags == {"method": "smoe", "unit": "bpc", "validation": "1.25"}
    assert version.description == "b: bpc 1.2500 on validation"
    # The pages of the model lead there.
    register(root, second, name="another")
    links = client.get_logged_model(second.model.id).tags["mlflow.modelVersions"]
    assert links == '[{"name": "x-language-model", "version": 3}, {"name": "another", "version": 1}]'


def test_equal_scores_leave_the_champion_where_it_is(root, candidate):
    register(root, candidate("a", 1.5))
    assert [one.aliases for one in register(root, candidate("b", 1.5, "smoe"))] == [["champion", "vqmoe"], ["smoe"]]


def test_what_somebody_else_registered_is_left_alone(root, candidate):
    register(root, candidate("a", 1.5))
    client = store.connect(root)
    client.create_model_version("x-language-model", "file:///nowhere")
    assert [one.version for one in register(root, candidate("b", 1.75))] == [1, 3]


def test_scores_of_other_data_do_not_meet(root, candidate):
    register(root, candidate("a", 1.5))
    with pytest.raises(UsageError, match=r"validated on other data than the versions of x-language-model.*tracking\.experiment="):
        register(root, candidate("b", 0.5, measured_on="other data"))
    assert len(store.connect(root).search_model_versions("name = 'x-language-model'")) == 1


def test_files_come_by_run_version_and_alias(root, candidate, tmp_path):
    first, second = candidate("a", 1.5), candidate("b", 1.25)
    register(root, first, second)
    for source, wanted in (
        (first.run.id[:12], first),
        ("models:/x-language-model/1", first),
        ("models:/x-language-model@champion", second),
    ):
        target = tmp_path / f"target {wanted.run.id} {len(source)}"
        target.mkdir()
        folder, run = tracking.fetch(root, source, target)
        assert folder.is_relative_to(target)
        assert (folder / "model.safetensors").read_text() == wanted.run.name
        assert run.id == wanted.run.id


def test_a_model_of_a_run_that_is_recorded_later_is_found_by_its_first_name(root, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    folder.mkdir()
    with monkeypatch.context() as away:
        away.setenv("MLFLOW_TRACKING_URI", DEAD)
        with tracking.start(root, key="k", resumed=False, experiment="t", stage="s", name="n", params={}) as run:
            run.model(folder, "m", {})
    assert run.id.startswith("offline-")
    with pytest.raises(UsageError, match=f"begins with {run.id}"):
        tracking.named(root, run.id)
    tracking.sync(root)
    assert tracking.named(root, run.id).model().id


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("models:/x-langage-model@champion", "there is no registered model 'x-langage-model'; there are: x-language-model, y"),
        ("models:/x-language-model@smo", "x-language-model has no alias 'smo'; there are: smoe, "),
        ("models:/x-language-model/7", "x-language-model has no version 7; there are: 1"),
        ("models:/x-language-model", "names no registered model: write models:/name@alias or models:/name/version"),
        ("0000", "no run has an id that begins with 0000; `vqmoe ui` shows"),
    ],
)
def test_what_there_is_not_is_told_with_what_there_is(root, candidate, tmp_path, source, line):
    one = candidate("a", 1.5, "smoe")
    for name in ("y", "x-language-model"):
        register(root, one, name=name)
    with pytest.raises(UsageError, match=line):
        tracking.fetch(root, source, tmp_path)


def test_a_run_without_a_model(root, tmp_path):
    with tracking.start(root, key="k", resumed=False, experiment="t", stage="prepare", name="n", params={}) as run:
        pass
    with pytest.raises(UsageError, match=rf"run {run.id} \(prepare n, FINISHED\) has no model; runs of pretrain, warmup and"):
        tracking.fetch(root, run.id, tmp_path)


def test_files_that_are_gone(root, candidate, tmp_path):
    one = candidate("a", 1.5)
    (root / ".mlflow/artifacts").rename(root / "moved")
    with pytest.raises(Failure, match=rf"artifacts: the files of {one.run.id} cannot be read there"):
        tracking.fetch(root, one.run.id, tmp_path)


def test_no_server(root, candidate, tmp_path, monkeypatch):
    one = candidate("a", 1.5)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", DEAD.replace("//", "//someone:secret@"))
    for source in ("models:/x@champion", one.run.id):
        with pytest.raises(Failure, match=rf"{DEAD}: .* cannot be read there .*; check MLFLOW_TRACKING_URI") as caught:
            tracking.fetch(root, source, tmp_path)
        assert "secret" not in str(caught.value)
    with pytest.raises(Failure, match=f"{DEAD}: registered models cannot be read there"):
        register(root, one)
