"""A repository with data in it, embedded data as small as it can be, and every form of data that `prepare` reads."""

import json
import lzma

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from pipeline.checking import check

WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa".split()


@pytest.fixture
def root(tmp_path):
    """A repository whose embedded corpus is two addresses to a split."""
    (tmp_path / "data").mkdir()
    addresses = [
        {"id": f"{split}-{year}", "year": year, "split": split, "text": " ".join(f"Address {year}, line {i}." for i in range(20))}
        for split in ("train", "valid", "test")
        for year in (1800, 1900)
    ]
    (tmp_path / "data/sotu.jsonl.xz").write_bytes(lzma.compress("\n".join(map(json.dumps, addresses)).encode()))
    return tmp_path


@pytest.fixture
def checked(root):
    """A function that writes a file of data and looks into it."""

    def write(name, content):
        path = root / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return check(path, root)

    return write


def text(i, salt=0):
    """A text like no other."""
    return " ".join(WORDS[(i // 10**power + salt) % 10] for power in range(8))


def rows(count=400, **more):
    """Texts of two labels, all different."""
    return [{"text": text(37 * i + 10**7), "label": f"l{i % 2}"} | more for i in range(count)]


def json_lines(found):
    return "".join(f"{json.dumps(row)}\n" for row in found)


def lay(root, form):
    """Data in a form, below data/; its path."""
    path, found = root / f"data/mine{form if form.startswith('.') else ''}", rows()
    if form == ".txt":
        path.write_text("\n".join(row["text"] for row in found))
    elif form == ".jsonl":
        path.write_text(json_lines(found))
    elif form == ".years.jsonl":
        path.write_text(json_lines({"text": row["text"], "year": 1800 + 100 * (i % 2)} for i, row in enumerate(found)))
    elif form in (".csv", ".tsv"):
        end = "," if form == ".csv" else "\t"
        quoted = (f'"a ""quote"",\n{row["text"]}"{end}{row["label"]}' for row in found)
        path.write_text("\n".join([end.join(("text", "label")), *quoted]))
    elif form == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(found), path)
    elif form == "texts":
        for i, row in enumerate(found):
            (path / f"part{i % 3}").mkdir(parents=True, exist_ok=True)
            (path / f"part{i % 3}/{i}.txt").write_text(row["text"])
        (path / "readme.txt").write_text("About these texts, which lie in parts.")
    elif form == "classes":
        for i, row in enumerate(found):
            (path / row["label"]).mkdir(parents=True, exist_ok=True)
            (path / row["label"] / f"{i}.txt").write_text(row["text"])
    elif form == "split classes":
        for i, row in enumerate(found):
            place = path / ("test" if i % 5 == 0 else "train") / row["label"]
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{i}.txt").write_text(row["text"])
    elif form in ("images", "split images"):
        for i in range(60):
            place = path / (("test" if i % 5 == 0 else "train") if form == "split images" else "") / f"c{i % 2}"
            place.mkdir(parents=True, exist_ok=True)
            shape = (30, 28) if form == "images" else (12, 12, 3)
            Image.fromarray(np.random.default_rng(i).integers(0, 256, shape, np.uint8)).save(place / f"{i}.png")
    elif form == ".npz":
        draws = np.random.default_rng(0)
        x = {f"x_{split}": draws.integers(0, 256, (count, 16, 16), np.uint8) for split, count in (("train", 30), ("test", 10))}
        np.savez(path, **x, **{f"y{name[1:]}": np.arange(len(images)) % 2 for name, images in x.items()})
    return path


TEXTS = (".txt", ".jsonl", ".years.jsonl", ".csv", ".tsv", ".parquet", "texts", "classes", "split classes")
IMAGES = ("images", "split images", ".npz")
