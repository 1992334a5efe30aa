"""What a file or folder is: a corpus, a task or images."""

import os
import re
from collections import Counter
from itertools import chain
from pathlib import Path

from pipeline.checking import encoding, texts
from pipeline.checking.findings import ARRAYS, DRAWN, FOLDERS, RECORDS, Findings
from pipeline.data import archives, published, tables
from pipeline.data.corpora import EMBEDDED, PUBLISHED, folder_texts
from pipeline.data.tables import SPLITS, file_kind
from pipeline.errors import Failure, UsageError
from pipeline.files import nearest_path

# What torchvision takes for an image.
IMAGES = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}
MIXED = 0.1  # share of the fewer of texts and images in a folder from which it is not clear which are meant
# Names that `data` takes for something else than a path.
SETS = {"digits", "cifar10", "cifar100", "stl10", "svhn", "fashionmnist", "imagenet"}
NAMES = {*EMBEDDED, *PUBLISHED, *published.TASKS, *SETS, "era"}
# What the texts of a folder lie in or are called if they have splits.
DIVIDED = {"train", "valid", "val", "test", *(f"{split}.txt" for split in SPLITS)}
TABLES = {".jsonl": "JSON lines", ".csv": "CSV", ".tsv": "TSV", ".parquet": "Parquet"}
INSTEAD = {
    ".json": "write it as .jsonl, an object to a line",
    ".xlsx": "save it as .csv",
    ".xls": "save it as .csv",
    ".npy": "write it as .npz, with x_train, y_train, x_test and y_test",
} | dict.fromkeys(IMAGES, "name the folder that has a folder of images for each class")


def known(path: Path) -> None:
    """Raises UsageError if a path is neither a file nor a folder, or cannot stand in params.yaml."""
    if not os.path.isfile(path) and not os.path.isdir(path):
        if os.path.exists(path):
            raise UsageError(f"{path}: neither a file nor a folder")
        raise UsageError(f"{path}: not found{nearest_path(path, Path()) or '; check the name'}")
    if re.search("[\ud800-\udfff]", str(path)):
        raise UsageError(f"{path}: a name that is not UTF-8 cannot stand in params.yaml; rename it")


def check(path: Path, root: Path) -> Findings:
    """Look into a file or folder as `prepare` of the repository `root` would. Raises UsageError if there is neither."""
    known(path)
    # Not resolved: a link in data/ is a file of data/, to `prepare` as to DVC.
    whole, root = Path(os.path.abspath(path)), Path(os.path.abspath(root))
    source = str(whole.relative_to(root) if whole.is_relative_to(root) else whole)
    found = Findings(f"./{source}" if source in NAMES else source)
    try:
        (_folder if whole.is_dir() else _file)(found, whole, root)
        if not whole.is_relative_to(root / "data"):
            found.warn("it lies outside of data/, where `dvc repro` does not notice that it changes; move it there")
    except (Failure, UsageError) as error:
        found.problem = str(error)
        found.params, found.notes, found.preset = {}, {}, None
    return found


def _file(found: Findings, path: Path, root: Path) -> None:
    kind = file_kind(path)
    if kind == ".txt":
        found.facts["form"] = "text, cut at 90 % and 95 %"
        encoding.check(found, [path])
        texts.corpus(found, root)
    elif kind in tables.READERS:
        if kind != ".parquet":
            encoding.check(found, [path])
        labelled, divided = _fields(found, path)
        found.dividing = RECORDS
        found.facts["form"] = f"{TABLES[kind]}, texts with{'' if labelled else 'out'} labels{'' if divided else DRAWN}"
        if not divided:
            _drawn(path)
        if labelled:
            texts.task(found, root, own=True)
        else:
            texts.corpus(found, root)
    elif kind == ".npz":
        found.facts["form"] = "arrays of images"
        found.dividing = ARRAYS
        _images(found, root)
    elif kind not in INSTEAD and archives.is_archive(path):
        found.facts["form"] = "archive of a task as published"
        texts.task(found, root, own=False)
    else:
        remedy = INSTEAD.get(kind, "rename it if it is one of these")
        raise Failure(f"{path}: expected a folder, or a file .txt, {tables.FILES} or .npz; {remedy}")


def _fields(found: Findings, path: Path) -> tuple[bool, bool]:
    """Whether records have labels and splits, as the first of them says."""
    _, first = next(tables.raw(path), (0, None))
    if first is None:
        raise Failure(f"{path}: holds no records; it needs some with text, and for a task with label")
    names = ", ".join(f"'{name}'" for name in first if name)
    if "text" not in first:
        if len(first) == 1 and ";" in names:
            raise Failure(f"{path}: its columns {names} are parted by semicolons; write it with commas, or as .tsv with tabs")
        raise Failure(
            f"{path}: no field 'text' among {names}; rename the field that has the texts to text, that of labels to label"
        )
    if "label" not in first:
        if others := [name for name in first if name and name not in tables.KNOWN]:
            found.warn(
                f"no field 'label', so it is read as a corpus; for a task, rename the one with labels ({', '.join(others)})"
            )
    return "label" in first, "split" in first


def _drawn(path: Path) -> None:
    """Raises Failure if records are too few for every split to be drawn one."""
    there, count = set(), 0
    for _, record in tables.records(path, ("text",)):
        there.add(record["split"])
        count += 1
        if len(there) == len(SPLITS):
            return
    empty = " and ".join(split for split in SPLITS if split not in there)
    raise Failure(
        f"{path}: splits are drawn, 90 % / 5 % / 5 %, and of {count:,} records {empty} got none; add more, or a field 'split' "
        "that says train, valid or test for each"
    )


def _folder(found: Findings, path: Path, root: Path) -> None:
    suffixes, linked = _suffixes(path)
    images, written = sum(suffixes[suffix] for suffix in IMAGES), suffixes[".txt"]
    records = [suffix for suffix in suffixes if suffix in tables.READERS]
    read = IMAGES if images > written else {".txt"}
    found.facts["left out"] = {suffix: count for suffix, count in sorted(suffixes.items()) if suffix not in read}
    if min(images, written) > MIXED * (images + written):
        raise Failure(f"{path}: holds {images:,} images and {written:,} texts; name a folder of the one or the other")
    if images > written:
        found.facts["form"] = "images in folders of classes"
        found.dividing = FOLDERS
        _images(found, root)
    elif published.recognised(path) and not all((path / f"{split}.txt").exists() for split in SPLITS):
        found.facts = {"form": "folder of a task as published"}
        texts.task(found, root, own=False)
    elif written:
        if linked:
            found.warn(f"{linked} is a link to a folder: texts there are not read; put the folder itself there")
        _texts(found, path, root)
    elif records:
        raise Failure(f"{path}: a folder of records ({', '.join(sorted(records))}); put all into one file, with a field split")
    else:
        there = ", ".join(sorted(suffix or "files without a suffix" for suffix in suffixes)) or "nothing"
        raise Failure(f"{path}: holds {there}; a folder needs texts (.txt), or a folder of images for each class")


def _texts(found: Findings, path: Path, root: Path) -> None:
    """Texts in folders of classes if each lies in one, and there are few of them to the texts; else a corpus."""
    names = sorted(chain(*folder_texts(path).values()))
    encoding.check(found, [path / name for name in names])
    drawn = "" if {name.split("/")[0] for name in names} <= DIVIDED else DRAWN
    labels = {name.split("/")[-2] for name in names if "/" in name} - DIVIDED
    alone = next((name for name in names if "/" not in name), None)
    if len(labels) > 1 and len(names) >= 2 * len(labels) and alone is None:
        found.facts["form"] = f"texts in folders of classes{drawn}"
        found.dividing = FOLDERS
        texts.task(found, root, own=True)
        return
    if len(labels) > 1 and alone is not None:
        found.warn(f"{alone} lies beside the folders, so they are no classes, but a corpus; for a task, move it elsewhere")
    found.facts["form"] = f"folder of texts{drawn}"
    texts.corpus(found, root)


def _images(found: Findings, root: Path) -> None:
    # Loading torch and torchvision takes seconds, which texts need not wait for.
    from pipeline.checking import images

    images.check(found, root)


def _suffixes(path: Path) -> tuple[Counter[str], Path | None]:
    """How many files of a folder, and of linked ones, have each suffix; and a link to a folder, if there is one."""
    count: Counter[str] = Counter()
    linked, met = None, set()
    for folder, names, files in os.walk(path, followlinks=True):
        place = os.path.realpath(folder)
        if place in met:
            names.clear()
            continue
        met.add(place)
        linked = linked or next((Path(folder, name) for name in names if Path(folder, name).is_symlink()), None)
        count.update(Path(name).suffix.lower() for name in files)
    return count, linked
