import pytest

from pipeline.checking import as_yaml, check, together
from tests.checking.conftest import json_lines, lay, rows, text
from tests.checking.test_kinds import prepared


@pytest.fixture
def task(root):
    def write(name, times=1):
        path = root / f"data/{name}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json_lines(row | {"text": " ".join([row["text"]] * times)} for row in rows()))
        return path

    return write


def corpus(root, name, more=""):
    path = root / f"data/{name}"
    path.write_text("\n".join(text(37 * i + 10**7) + more for i in range(400)))
    return path


def found(root, *paths):
    return together([check(path, root) for path in paths])


def test_a_corpus_and_tasks_are_one_experiment(root, task):
    paths = task("a.jsonl"), corpus(root, "mytexts.txt"), task("b/a.jsonl")
    whole = found(root, *paths)
    assert whole.problem is None and whole.warnings == []
    assert whole.params["data"]["corpus"] == "data/mytexts.txt"
    assert whole.params["data"]["tasks"] == {"a": "data/a.jsonl", "a-2": "data/b/a.jsonl"}
    assert "embedded" not in as_yaml(whole)
    assert prepared(whole, root)["tasks"] == whole.params["data"]["tasks"]


def test_tasks_alone_have_the_embedded_corpus_and_a_context_that_holds_all(root, task):
    paths = task("a.jsonl"), task("b.jsonl", times=3)
    each = [check(path, root).params["model"]["context"] for path in paths]
    whole = found(root, *paths)
    assert whole.params["data"]["corpus"] == "sotu" and "  corpus: sotu             # embedded" in as_yaml(whole)
    assert whole.params["model"]["context"] == max(each) > min(each)
    assert prepared(whole, root)["corpus"] == "sotu"


def test_of_two_that_can_be_the_corpus_the_first_is_and_that_is_said(root, task):
    first, second = corpus(root, "x.txt"), corpus(root, "y.txt")
    whole = found(root, first, second, task("a.jsonl"))
    assert whole.params["data"]["corpus"] == "data/x.txt" and whole.params["data"]["tasks"] == {"a": "data/a.jsonl"}
    (warning,) = whole.warnings
    assert warning.startswith("data/x.txt is the corpus, the first of those that can be; so can data/y.txt")
    whole = found(root, second, first)
    assert whole.params["data"]["corpus"] == "data/y.txt" and whole.params["data"]["tasks"] == {"era": "era"}


def test_a_view_loses_little_of_any_that_is_used(root, task):
    foreign = corpus(root, "x.txt", " \u00e4\u00f6\u00fc")
    plain = corpus(root, "y.txt")
    whole = found(root, foreign, task("a.jsonl"))
    assert whole.params["data"]["view"] == "bytes" and "data/x.txt: text27 loses" in as_yaml(whole)
    assert prepared(whole, root)["corpus"] == "data/x.txt"
    assert found(root, plain, foreign).params["data"]["view"] == "text27"


def test_images_of_several_sets_have_one_size(root):
    first = lay(root, "images")
    first.rename(root / "data/first")
    whole = found(root, lay(root, ".npz"), root / "data/first")
    assert whole.params["data"]["corpus"] == "data/mine.npz" and whole.preset == "vision/digits"
    assert whole.params["data"]["tasks"] == {"mine": "data/mine.npz", "first": "data/first"}
    assert whole.params["prepare"]["size"] == 28 and whole.params["model"]["patch"] == 4
    assert "so can data/first" in whole.warnings[0]
    assert prepared(whole, root)["tasks"] == whole.params["data"]["tasks"]


def test_what_cannot_be_one_experiment_has_no_params(root, task):
    whole = found(root, lay(root, "images"), task("a.jsonl"))
    assert whole.params == {} and "data/mine has images and data/a.jsonl texts" in whole.problem
    (root / "data/b.csv").write_text("text\n")
    whole = found(root, task("a.jsonl"), root / "data/b.csv")
    assert whole.params == {} and "mend data/b.csv first" in whole.problem
