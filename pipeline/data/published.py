"""Labelled tasks as they were published: a folder or an archive (zip, tar), recognised by its members.

A task published without a labelled validation split has the last tenth of each class of its training split held out. (IMDB's
reviews of one film have neighbouring numbers, so that hardly a film is on both sides; GLUE's phrases of one sentence are.)
"""

import csv
import io
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from pipeline.data import archives
from pipeline.errors import Failure

VALID_SHARE = 0.1

# Split, text, label; without a split.
Row = tuple[str, str, str]
Labelled = tuple[str, str]


class Published(NamedTuple):
    """A task with a name: where it lies in the folder of archives, its URLs with their sha256, and what its labels become.

    With `labels`, examples of a label that is not among them are left out.
    """

    path: str
    urls: dict[str, str]
    labels: dict[str, str] | None = None


_SST = "https://nlp.stanford.edu/sentiment/trainDevTestTrees_PTB.zip"
_SST_SHA256 = "5c613a4f673fc74097d523a2c83f38e0cc462984d847b82c7aaf36b01cbbbfcc"
_IMDB = "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
_BANKING77 = "https://raw.githubusercontent.com/PolyAI-LDN/task-specific-datasets/57ec275d8078af65b7731c2a98be812d844a6d6b"

TASKS = {
    "sst2": Published(
        "trainDevTestTrees_PTB.zip",
        {_SST: _SST_SHA256},
        labels={"0": "negative", "1": "negative", "3": "positive", "4": "positive"},
    ),
    "sst5": Published("trainDevTestTrees_PTB.zip", {_SST: _SST_SHA256}),
    "imdb": Published("aclImdb_v1.tar.gz", {_IMDB: "c40f74a18d3b61f90feba1e17730e0d38e8b97c05fde7008942e91923d1658fe"}),
    "banking77": Published(
        "banking77",
        {
            f"{_BANKING77}/banking_data/train.csv": "b06e26ac675513959a63135f11b94ea7786ed02da65db93a5650d8838cbc664b",
            f"{_BANKING77}/banking_data/test.csv": "d12d6e3bc4c3103966ae786dc435913c0c563dfa328f5a3646d0e62cfeeb474d",
        },
    ),
}


def source(name: str, root: Path) -> Path:
    """Where a task with a name lies once it is fetched: an archive, or a folder of the files at several URLs."""
    return archives.folder(root) / TASKS[name].path


def fetch(name: str, root: Path) -> Path:
    """`source`, downloaded as far as it is not there."""
    path = source(name, root)
    for url, sha256 in TASKS[name].urls.items():
        archives.fetch(url, sha256, path.parent if archives.file_name(url) == path.name else path)
    return path


def read(path: Path, labels: dict[str, str] | None = None) -> Iterator[Row]:
    """Split, text and label of every example; Failure where members are missing or hold something else."""
    found: dict[str, dict[str, str]] = {form: {} for form in _FORMS}
    for name, text in _members(path):
        (form,) = (form for form, made in _FORMS.items() if re.fullmatch(made.members, name))
        if name in found[form]:
            raise Failure(f"{path}: has several files {name}; name the folder of one of them")
        found[form][name] = text
    for form, made in _FORMS.items():
        if files := found[form]:
            if missing := [name for name in made.needed if name not in files]:
                raise Failure(f"{path}: has no {missing[0]}; {form} consists of {', '.join(made.needed)}")
            for split, text, label in made.rows(files, path):
                if labels is None or label in labels:
                    yield split, text, label if labels is None else labels[label]
            return
    raise Failure(f"{path}: holds none of {', '.join(_FORMS)} as published; use .jsonl or .csv with text and label")


def recognised(path: Path) -> bool:
    """Whether a folder or archive has a member of one of these tasks."""
    with archives.open(path) as archive:
        return any(_NAMED.fullmatch(name) for name in archive.names())


def _trees(files: dict[str, str], path: Path) -> Iterator[Row]:
    """SST's sentences with the label (0 to 4) of the root of their trees, brackets and slashes as in the text."""
    for split, name in (("train", "train.txt"), ("valid", "dev.txt"), ("test", "test.txt")):
        for number, line in enumerate(files[name].split("\n"), 1):
            if line.strip():
                # Not \s: a leaf may hold a no-break space.
                leaves = re.findall(r"\([0-4] ([^() ]+)\)", line)
                if not leaves or not re.match(r"\([0-4] ", line) or line.count("(") != line.count(")"):
                    raise Failure(f"{path}, {name}, line {number}: no tree such as (3 (3 Good) (2 .)); fetch it again")
                yield split, " ".join(re.sub(r"\\(.)", r"\1", _BRACKETS.get(leaf, leaf)) for leaf in leaves), line[1]


def _phrases(files: dict[str, str], path: Path) -> Iterator[Row]:
    """GLUE's SST-2: phrases to train on, whole sentences in dev.tsv, which serves as test (GLUE's own has no labels)."""
    polarity = {"0": "negative", "1": "positive"}

    def rows(name: str) -> Iterator[Labelled]:
        head, *lines = files[name].rstrip("\n").split("\n")
        for number, line in enumerate(lines, 2):
            text, _, label = line.rstrip("\r").partition("\t")
            if head.split() != ["sentence", "label"] or label not in polarity:
                raise Failure(f"{path}, {name}, line {number}: expected a sentence, a tab and 0 or 1; fetch it again")
            yield text.strip(), polarity[label]

    yield from _held_out(rows("train.tsv"))
    yield from (("test", *row) for row in rows("dev.tsv"))


def _reviews(files: dict[str, str], path: Path) -> Iterator[Row]:
    """IMDB: a file per review, <split>/<label>/<number>_<rating>.txt, in the order of their numbers."""
    names = sorted(files, key=lambda name: (name.split("/")[1], int(re.search(r"(\d+)_", name)[1])))
    labels = {"neg": "negative", "pos": "positive"}
    split = {s: [(files[n], labels[n.split("/")[1]]) for n in names if n.startswith(s)] for s in ("train", "test")}
    yield from _held_out(split["train"])
    yield from (("test", *row) for row in split["test"])


def _intents(files: dict[str, str], path: Path) -> Iterator[Row]:
    """BANKING77: text and category."""

    def rows(name: str) -> Iterator[Labelled]:
        reader = csv.DictReader(io.StringIO(files[name], newline=""), strict=True)
        try:
            for row in reader:
                if not row.get("text") or not row.get("category"):
                    raise Failure(f"{path}, {name}, line {reader.line_num}: expected text and category; fetch it again")
                yield row["text"], row["category"]
        except csv.Error as error:
            raise Failure(f"{path}, {name}, line {reader.line_num}: no valid CSV ({error}); fetch it again") from None

    yield from _held_out(rows("train.csv"))
    yield from (("test", *row) for row in rows("test.csv"))


def _held_out(rows: Iterable[Labelled]) -> Iterator[Row]:
    """Training and validation examples: of each class the last VALID_SHARE are for validation."""
    rows = list(rows)
    left = Counter(label for _, label in rows)
    held = {label: round(VALID_SHARE * count) for label, count in left.items()}
    for text, label in rows:
        yield "train" if left[label] > held[label] else "valid", text, label
        left[label] -= 1


class _Form(NamedTuple):
    """What a task consists of: the names of its members (a pattern), those it needs, and the reader of their texts."""

    members: str
    needed: tuple[str, ...]
    rows: Callable[[dict[str, str], Path], Iterator[Row]]


_BRACKETS = {"-LRB-": "(", "-RRB-": ")", "-LSB-": "[", "-RSB-": "]", "-LCB-": "{", "-RCB-": "}"}
_FORMS = {
    "SST (trees)": _Form(r"(?:train|dev|test)\.txt", ("train.txt", "dev.txt", "test.txt"), _trees),
    "SST-2 (GLUE)": _Form(r"(?:train|dev)\.tsv", ("train.tsv", "dev.tsv"), _phrases),
    "IMDB": _Form(r"(?:train|test)/(?:pos|neg)/\d+_\d+\.txt", (), _reviews),
    "BANKING77": _Form(r"(?:train|test)\.csv", ("train.csv", "test.csv"), _intents),
}


# Whatever folder a member is in.
_NAMED = re.compile(f"(?:.*/)?({'|'.join(form.members for form in _FORMS.values())})", re.DOTALL)


def _members(path: Path) -> Iterator[tuple[str, str]]:
    """Name, as far as the pattern goes, and text of each member."""
    with archives.open(path) as archive:
        for name in archive.names():
            if match := _NAMED.fullmatch(name):
                yield match[1], archive.text(name)
