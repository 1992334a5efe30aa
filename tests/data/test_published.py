"""Archives and folders as the tasks' authors made them, with a few examples each."""

import hashlib
import io
import tarfile
import zipfile

import pytest

from pipeline.data import published
from pipeline.data.corpora import SPLITS
from pipeline.data.tasks import load_task
from pipeline.errors import Failure

TREES = {
    "trees/train.txt": (
        "(4 (2 It) (4 (4 (2 -LRB-) (3 (3 great) (2 -RRB-))) (2 and\\/or)))\n"
        "(1 (2 Caf\u00e9) (1 (1 2\u00a01\\/2) (2 \\*)))\n"
        "(2 (2 So) (2 so))\n"
        "(0 Awful)\n"
        "(3 (3 Nice) (2 one))\n"
    ),
    "trees/dev.txt": "(3 (3 Good) (2 film))\n(2 (2 It) (2 is))\n",
    "trees/test.txt": "(0 (0 Bad) (2 film))\n(4 (4 Best) (2 film))\n",
}
PHRASES = {
    "SST-2/train.tsv": "sentence\tlabel\n" + "".join(f"phrase {i} \t{i % 2}\n" for i in range(40)),
    "SST-2/dev.tsv": "sentence\tlabel\nit 's a ` charming ' film . \t1\ndull \t0\n",
    "SST-2/test.tsv": "index\tsentence\n0\tno label \n",
    "SST-2/original/datasetSplit.txt": "sentence_index,splitset_label\n",
}
REVIEWS = {
    f"aclImdb/{split}/{label}/{number}_{rating}.txt": f"{split} {label} {number}<br /><br />caf\u00e9"
    for split, count in (("train", 20), ("test", 3))
    for label, rating in (("neg", 2), ("pos", 9))
    # As in a tar: in no order.
    for number in sorted(range(count), key=str)
} | {
    "aclImdb/train/unsup/0_0.txt": "no label",
    "aclImdb/train/urls_pos.txt": "http",
    "aclImdb/README": "read",
    "aclImdb/imdb.vocab": "the",
}
INTENTS = {
    "banking77/train.csv": "text,category\n"
    + "".join(f'"Is ""{i}"" a card,\nor not?",{c}\n' for c in ("lost", "new") for i in range(10)),
    "banking77/test.csv": "text,category\nWhere is it?,lost\nI want one,new\n",
}
FORMS = {"trees": TREES, "phrases": PHRASES, "reviews": REVIEWS, "intents": INTENTS}


def lay(kind, files, folder, name):
    """Files as a zip, a compressed tar or a folder; its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.mkdir("trees")
            for member, text in files.items():
                archive.writestr(member, text)
    elif kind == "tar":
        with tarfile.open(path, "w:gz") as archive:
            for member, text in files.items():
                info = tarfile.TarInfo(member)
                info.size = len(text.encode())
                archive.addfile(info, io.BytesIO(text.encode()))
    else:
        for member, text in files.items():
            (path / member).parent.mkdir(parents=True, exist_ok=True)
            (path / member).write_text(text, encoding="utf-8", newline="")
    return path


def texts(task):
    return {split: [(example.text, example.label) for example in task.splits[split]] for split in SPLITS}


@pytest.fixture
def serve(server, monkeypatch):
    """A function that puts files of one's own in the place of those at the URLs of published tasks."""

    def replace(files, *names):
        urls = {server.url(file): hashlib.sha256(content).hexdigest() for file, content in files.items()}
        server.files |= files
        for name in names:
            monkeypatch.setitem(published.TASKS, name, published.TASKS[name]._replace(urls=urls))

    return replace


def test_sst_by_name_has_two_classes_or_five(tmp_path, serve):
    path = lay("zip", TREES, tmp_path / "elsewhere", "trainDevTestTrees_PTB.zip")
    serve({path.name: path.read_bytes()}, "sst2", "sst5")
    fine = load_task("sst5", {}, tmp_path, 0)
    assert fine.labels == ("0", "1", "2", "3", "4")
    assert texts(fine) == {
        "train": [
            ("It ( great ) and/or", "4"),
            ("Caf\u00e9 2\u00a01/2 *", "1"),
            ("So so", "2"),
            ("Awful", "0"),
            ("Nice one", "3"),
        ],
        "valid": [("Good film", "3"), ("It is", "2")],
        "test": [("Bad film", "0"), ("Best film", "4")],
    }
    assert load_task(str(path), {}, tmp_path, 0) == fine
    coarse = load_task("sst2", {}, tmp_path, 0)
    assert coarse.labels == ("negative", "positive")
    assert texts(coarse) == {
        "train": [
            ("It ( great ) and/or", "positive"),
            ("Caf\u00e9 2\u00a01/2 *", "negative"),
            ("Awful", "negative"),
            ("Nice one", "positive"),
        ],
        "valid": [("Good film", "positive")],
        "test": [("Bad film", "negative"), ("Best film", "positive")],
    }


def test_imdb_is_read_in_the_order_of_its_numbers_and_the_last_tenth_validates(tmp_path, serve):
    path = lay("tar", REVIEWS, tmp_path, "aclImdb_v1.tar.gz")
    serve({path.name: path.read_bytes()}, "imdb")
    task = load_task("imdb", {}, tmp_path, 0)
    assert task.labels == ("negative", "positive")
    expected = {
        split: [
            (f"{folder} {short} {number}<br /><br />caf\u00e9", label)
            for short, label in (("neg", "negative"), ("pos", "positive"))
            for number in numbers
        ]
        for split, folder, numbers in (("train", "train", range(18)), ("valid", "train", (18, 19)), ("test", "test", range(3)))
    }
    assert texts(task) == expected


def test_banking77_is_a_folder_of_two_files(tmp_path, serve):
    serve({name.rsplit("/", 1)[1]: text.encode() for name, text in INTENTS.items()}, "banking77")
    task = load_task("banking77", {}, tmp_path, 0)
    assert task.labels == ("lost", "new")
    assert [text for text, _ in texts(task)["train"]] == [f'Is "{i}" a card,\nor not?' for i in range(9)] * 2
    assert texts(task)["valid"] == [('Is "9" a card,\nor not?', label) for label in task.labels]
    assert texts(task)["test"] == [("Where is it?", "lost"), ("I want one", "new")]


def test_glue_has_phrases_to_train_on_and_sentences_to_test_on(tmp_path):
    task = load_task(str(lay("zip", PHRASES, tmp_path, "SST-2.zip")), {}, tmp_path, 0)
    names = ("negative", "positive")
    assert texts(task) == {
        "train": [(f"phrase {i}", names[i % 2]) for i in range(36)],
        "valid": [(f"phrase {i}", names[i % 2]) for i in range(36, 40)],
        "test": [("it 's a ` charming ' film .", "positive"), ("dull", "negative")],
    }


@pytest.mark.parametrize("form", FORMS)
def test_zip_tar_and_folder_hold_the_same(tmp_path, form):
    tasks = [load_task(str(lay(kind, FORMS[form], tmp_path, kind)), {}, tmp_path, 0) for kind in ("zip", "tar", "folder")]
    assert tasks[0] == tasks[1] == tasks[2]
    inner = next(iter(FORMS[form])).split("/")[0]
    assert load_task(f"folder/{inner}", {}, tmp_path, 0) == tasks[0]


@pytest.mark.parametrize(
    ("form", "member", "text", "words"),
    [
        ("trees", "trees/dev.txt", None, r"has no dev\.txt; SST \(trees\) consists of train\.txt, dev\.txt, test\.txt"),
        ("trees", "trees/dev.txt", "(3 (3 Good) (2 fil", r"dev\.txt, line 1: no tree such as"),
        ("trees", "trees/test.txt", "\n(3 Good)\nno tree\n", r"test\.txt, line 3: no tree such as"),
        ("trees", "trees/dev.txt", "(3 (3 Good) (2 film))\n(2 \u00a0)\n", r"example 7: the text is empty"),
        ("intents", "banking77/test.csv", 'text,category\nWhere?," "\n', r"example 21: the label is empty"),
        ("trees", "more/train.txt", "", r"has several files train\.txt"),
        (
            "phrases",
            "SST-2/train.tsv",
            "sentence\tlabel\nfine\t2\n",
            r"train\.tsv, line 2: expected a sentence, a tab and 0 or 1",
        ),
        ("phrases", "SST-2/dev.tsv", "index\tsentence\nfine\t1\n", r"dev\.tsv, line 2: expected a sentence"),
        ("reviews", "aclImdb/test/pos/9_9.txt", b"\xe9", r"test/pos/9_9\.txt: not UTF-8 at byte 0"),
        ("intents", "banking77/test.csv", "text;category\na;b\n", r"test\.csv, line 2: expected text and category"),
        ("intents", "banking77/test.csv", 'text,category\n"a,b\n', r"test\.csv, line 1: no valid CSV"),
    ],
)
def test_bad_members_are_one_line(tmp_path, form, member, text, words):
    path = lay("folder", FORMS[form], tmp_path, "task")
    (path / member).parent.mkdir(exist_ok=True)
    if text is None:
        (path / member).unlink()
    else:
        (path / member).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(Failure, match=words) as caught:
        load_task("task", {}, tmp_path, 0)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{path}")


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("t.zip", lambda data: data[: len(data) // 2], "truncated or damaged"),
        ("t.zip", lambda data: data.replace(b"caf", b"cup", 1), "truncated or damaged"),
        ("t.tar.gz", lambda data: data[: len(data) // 2], "truncated or damaged"),
        ("t.tar.gz", lambda data: b"something else", "truncated or damaged"),
    ],
)
def test_bad_archives_are_one_line(tmp_path, name, damage, words):
    path = tmp_path / name
    if name.endswith("zip"):
        with zipfile.ZipFile(path, "w") as archive:
            for member, text in REVIEWS.items():
                archive.writestr(member, text)
    else:
        lay("tar", REVIEWS, tmp_path, name)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(Failure, match=words) as caught:
        load_task(name, {}, tmp_path, 0)
    assert "\n" not in str(caught.value)


def test_what_is_not_there_is_another_or_unknown(tmp_path, serve, server):
    serve({"trainDevTestTrees_PTB.zip": b"something"}, "sst2")
    server.files.clear()
    with pytest.raises(Failure, match=r"cannot be downloaded .* put it at .*data/archives/trainDevTestTrees_PTB\.zip"):
        load_task("sst2", {}, tmp_path, 0)
    lay("zip", TREES, tmp_path / "data/archives", "trainDevTestTrees_PTB.zip")
    with pytest.raises(Failure, match=r"trainDevTestTrees_PTB\.zip: sha256 is .*, expected"):
        load_task("sst2", {}, tmp_path, 0)
    lay("zip", {"notes/readme.md": "none"}, tmp_path, "other")
    with pytest.raises(Failure, match=r"holds none of SST \(trees\), SST-2 \(GLUE\), IMDB, BANKING77"):
        load_task("other", {}, tmp_path, 0)


def test_every_published_file_has_its_checksum():
    for task in published.TASKS.values():
        for url, sha256 in task.urls.items():
            assert url.startswith("https://")
            assert len(bytes.fromhex(sha256)) == 32
            assert task.path == url.rsplit("/", 1)[1] or len(task.urls) > 1


@pytest.mark.parametrize(
    ("name", "labels", "counts"),
    [("sst2", 2, (6920, 872, 1821)), ("sst5", 5, (8544, 1101, 2210)), ("banking77", 77, (9043, 960, 3080))],
)
def test_real_tasks(shared_data, name, labels, counts):
    task = load_task(str(shared_data / f"{name}.jsonl.xz"), {}, shared_data, 0)
    assert len(task.labels) == labels
    assert tuple(len(task.splits[split]) for split in SPLITS) == counts


def test_the_trees_of_real_sentences_give_the_sentences(shared_data, tmp_path, serve):
    task = load_task(str(shared_data / "sst5.jsonl.xz"), {}, shared_data, 0)
    escapes = {"(": "-LRB-", ")": "-RRB-"}

    def tree(example):
        leaves = [f"(2 {escapes.get(word, word.replace('/', chr(92) + '/'))})" for word in example.text.split(" ")]
        return f"({example.label} {' '.join(leaves)})\n" if len(leaves) > 1 else f"({example.label}{leaves[0][2:]}\n"

    files = {
        f"trees/{name}.txt": "".join(map(tree, task.splits[split]))
        for split, name in zip(SPLITS, ("train", "dev", "test"), strict=True)
    }
    path = lay("zip", files, tmp_path, "trainDevTestTrees_PTB.zip")
    serve({path.name: path.read_bytes()}, "sst2", "sst5")
    # What lies there has kept the escape of asterisks.
    wanted = {split: [(text.replace("\\*", "*"), label) for text, label in rows] for split, rows in texts(task).items()}
    assert texts(load_task("sst5", {}, tmp_path, 0)) == wanted
    sst2 = load_task("sst2", {}, tmp_path, 0)
    other = load_task(str(shared_data / "sst2.jsonl.xz"), {}, shared_data, 0)
    names = dict(zip(other.labels, sst2.labels, strict=True))
    for split in SPLITS:
        assert texts(sst2)[split] == [(text.replace("\\*", "*"), names[label]) for text, label in texts(other)[split]]
