"""Whatever stands in a params file or a data file, it is used or refused in one line. Tries mutations and counts.

    python -m benchmarks.fuzz

Params: keys and values of params.yaml and presets/vision/digits.yaml are changed, moved, doubled and deleted, as values and as
text. What is accepted is built and takes a step, at its own size where that is small. Data: CSV files, JSON lines, tasks in
archives, texts, folders and arrays of images, whole and damaged, go through `prepare`; what is accepted is read as later stages
read it. What is raised beside UsageError and Failure, or has more than a line, is a finding, and ends the search with the input
that showed it.
"""

import argparse
import csv
import gzip
import io
import json
import lzma
import random
import shutil
import sys
import tarfile
import tempfile
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from ruamel.yaml import YAML

from pipeline import config
from pipeline.data.batches import open_tokens
from pipeline.data.images import open_set
from pipeline.data.tasks import read_task
from pipeline.errors import Failure, UsageError
from pipeline.files import write_json
from pipeline.models.build import Spec, build
from pipeline.moe.layer import SETTINGS
from stages import prepare
from stages.paths import SECTIONS, Paths, of_images

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
BASES = {name: (ROOT / name).read_text() for name in ("params.yaml", "presets/vision/digits.yaml")}
SMALL = 3_000_000  # parameters of a model that is built and stepped

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.integers(),
    st.sampled_from([2**31, 2**63, 10**30, -(2**63)]),
    st.floats(),
    st.sampled_from(
        ["1e-06", "1e999", ".nan", "-.inf", "0x10", "1_000", "yes", "~", "2020-13-45", "!!python/object:os.system", ""]
    ),
    st.text(max_size=12),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3), max_leaves=5
)
TRICKS = (
    "&a",
    "*a",
    "<<: *a",
    "? x",
    "- ",
    "\t",
    "!!binary aaa",
    "{",
    "}",
    "[",
    "\0",
    "\ufeff",
    "%YAML 1.1",
    "---",
    "...",
    "|",
    "'",
)


def leaves(tree: Any, above: tuple = ()) -> Iterator[tuple]:
    for key, value in tree.items():
        yield (*above, key)
        if isinstance(value, dict):
            yield from leaves(value, (*above, key))


def near(value: Any) -> st.SearchStrategy:
    """Values of the same kind as one that is accepted."""
    if isinstance(value, bool):
        return st.booleans()
    if isinstance(value, int):
        return st.sampled_from([0, 1, 2, 3, 4, 8, 16, 64, value - 1, value + 1, 2 * value])
    if isinstance(value, float):
        return st.sampled_from([0.0, 0.001, 0.1, 0.5, 0.99, 1.0, 2.0, 100.0, -value])
    if isinstance(value, list) and value:
        return st.lists(st.sampled_from(value), max_size=len(value), unique=True)
    return VALUES


@st.composite
def params_texts(draw: Callable) -> str:
    text = draw(st.sampled_from(sorted(BASES.values())))
    if draw(st.booleans()):
        tree = YAML(typ="safe").load(text)
        places = sorted(leaves(tree), key=str)
        for _ in range(draw(st.integers(1, 3))):
            *above, last = draw(st.sampled_from(places))
            part = tree
            for key in above:
                part = part[key] if isinstance(part, dict) and key in part else {}
            if not isinstance(part, dict):
                continue
            change = draw(st.sampled_from([*["near"] * 6, "set", "set", "drop", "rename", "copy"]))
            if change in ("near", "set"):
                part[last] = draw(near(part.get(last)) if change == "near" else VALUES)
            elif change == "drop":
                part.pop(last, None)
            elif last in part and change == "rename":
                part[draw(st.text(max_size=6))] = part.pop(last)
            elif last in part:
                tree[draw(st.sampled_from(sorted(tree, key=str)))] = part[last]
        written = io.StringIO()
        YAML().dump(tree, written)
        return written.getvalue()
    lines = text.splitlines(keepends=True)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(lines) - 1))
        change = draw(st.sampled_from(["double", "drop", "indent", "trick", "value"]))
        line = lines[place]
        if change == "double":
            lines.insert(place, line)
        elif change == "drop":
            lines[place] = ""
        elif change == "indent":
            lines[place] = draw(st.sampled_from(["  ", "\t", " "])) + line
        elif change == "trick":
            lines[place] = line.rstrip("\n") + " " + draw(st.sampled_from(TRICKS)) + "\n"
        else:
            lines[place] = line.partition(":")[0] + ": " + draw(st.sampled_from(TRICKS) | st.text(max_size=12)) + "\n"
    return "".join(lines)


def try_params(text: str, folder: Path) -> str:
    """What became of it: refused, built, or accepted but too large to be built here."""
    path = folder / "params.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        params = config.load(path, SETTINGS)
    except (UsageError, Failure) as error:
        return one_line(error)
    for method in params.grid.methods:
        spec = described(params, method)
        if params.model.layers > 64 or too_large(spec):
            return "accepted, too large to be built here"
        step(params, spec)
    return "accepted, built and stepped"


def described(params: Any, method: str) -> Spec:
    given = {"method": method, "settings": params.method(method), "model": params.model}
    if of_images(params.data.view):
        channels = 1 if params.data.view == "grey" else 3
        return Spec(kind="image-classifier", channels=channels, size=params.prepare.size, labels=("a", "b"), **given)
    return Spec(kind="language-model", vocabulary=257, **given)


def too_large(spec: Spec) -> bool:
    sizes = [
        value for value in (*spec.model.model_dump().values(), *spec.settings.model_dump().values()) if isinstance(value, int)
    ]
    if max(sizes) > 4096 or (spec.size or 0) > 64:
        return True
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build(spec).parameters()) > SMALL


def step(params: Any, spec: Spec) -> None:
    model = build(spec).train()
    if spec.kind == "language-model":
        length = min(spec.model.context, 32)
        hidden = model(torch.randint(0, 257, (2, length)), model.train_mode)
        loss = model.nats(hidden.state_BTD, torch.randint(0, 257, (2, length))).mean() + hidden.auxiliary()
    else:
        scores, hidden = model(torch.rand(2, spec.channels, spec.size, spec.size), model.train_mode)
        loss = scores.square().mean() + hidden.auxiliary()
    loss.backward()


def one_line(error: Exception) -> str:
    assert len(str(error).splitlines()) == 1, f"not one line: {error!r}"
    return "refused in one line"


def mostly(rng: random.Random, usual: Any, odd: Any, share: float = 0.03) -> Any:
    """One of the usual, or in a share of the draws one of the odd."""
    return rng.choice(odd if rng.random() < share else usual)


WORDS = ["alpha", "beta gamma", "zeta " * 50, "caf\u00e9", "a, b", 'so "to say"', "two\nlines", "one\u2028two", "x" * 300]
# Of a record: text, label, split, and what it was taken from.
USUAL = {"text": WORDS, "label": ["0", "1"], "split": ["train", "valid", "test"], "group": ["", "d1", "d2"]}


def records(rng: random.Random, odd: Any) -> list[dict[str, Any]]:
    """Records that make a task, some with a cell that is odd."""
    found = [
        {"text": f"word {i} {'alpha' if i % 2 else 'zeta'}", "label": str(i % 2), "split": split, "group": f"d{i}"}
        for split in USUAL["split"]
        for i in range(mostly(rng, [6], [0, 1], 0.02))
    ]
    for _ in range(rng.choice([0, 3, 30])):
        found.append({name: mostly(rng, usual, odd, 0.005) for name, usual in USUAL.items()})
    rng.shuffle(found)
    return found


def csv_bytes(rng: random.Random) -> bytes:
    names = mostly(
        rng, [("text", "label", "split"), ("split", "text", "label", "group")], [("text", "label"), ("a", "b", "c"), ()]
    )
    file = io.StringIO(newline="")
    # A file whose fields are not quoted, or quoted otherwise than its reader expects, is one of the odd.
    given = mostly(rng, [{}, {"quoting": csv.QUOTE_ALL}, {"lineterminator": "\n"}], [{"delimiter": ";"}, {"quotechar": "'"}])
    writer = csv.writer(file, **given)
    writer.writerow(names)
    for record in records(rng, ["", "dev", "train", " ", '"', "a\0b", "\ud800", "\r"]):
        row = [record.get(name, "x") for name in names]
        writer.writerow(mostly(rng, [row], [row[:-1], [*row, "more"], []], 0.005))
    return mostly(rng, [b""], [b"\xef\xbb\xbf", b"\xff\xfe", b'"'], 0.1) + file.getvalue().encode("utf-8", "surrogatepass")


def jsonl_bytes(rng: random.Random) -> bytes:
    lines = []
    for record in records(rng, ["", "dev", None, 3, -1, True, 1e300, ["x"], {"a": 1}, "\ud800", "train"]):
        for name in [name for name in record if rng.random() < 0.002]:
            del record[name]
        line = json.dumps(record | {"year": mostly(rng, [1800], [None, "x", 10**30])}, ensure_ascii=rng.random() < 0.5)
        lines.append(mostly(rng, [line], ["{", "[]", "NaN", "", "[" * 10_000, line + "x"], 0.004))
    return mostly(rng, ["\n"], ["\r\n", "\r"], 0.1).join(lines).encode("utf-8", "surrogatepass")


def damaged(rng: random.Random, content: bytes) -> bytes:
    """As it is, cut off, with bytes changed, or with more at its end."""
    way, content = rng.choice([0, 0, 0, 0, 0, 1, 2, 3]), bytearray(content)
    if way == 1:
        content = content[: rng.randint(0, len(content))]
    elif way == 2 and content:
        for _ in range(rng.randint(1, 8)):
            content[rng.randrange(len(content))] = rng.randrange(256)
    elif way == 3:
        content += rng.randbytes(rng.randint(1, 40))
    return bytes(content)


def picture(rng: random.Random) -> bytes:
    file = io.BytesIO()
    size = rng.choice([(8, 8), (1, 1), (13, 7), (40, 40)])
    mode = rng.choice(["L", "RGB", "RGBA", "P", "1"] * 10 + ["I;16", "CMYK"])
    Image.new(mode, size, 1).save(file, "TIFF" if mode in ("I;16", "CMYK") else rng.choice(["PNG", "GIF", "BMP"]))
    return file.getvalue()


def lay_image_folder(rng: random.Random, place: Path) -> str:
    more = rng.sample(["valid", "val", "other"], rng.choice([0, 0, 0, 1, 2]))
    classes = rng.sample(["ant", "bee", "cow"], rng.choice([3, 3, 3, 2, 1]))
    for split in [name for name in ("train", "test") if rng.random() < 0.95] + more:
        for label in classes if rng.random() < 0.95 else classes[1:]:
            (place / "set" / split / label).mkdir(parents=True)
            for i in range(rng.choice([4] * 30 + [1, 0])):
                suffix = rng.choice([".png"] * 40 + [".jpg", ".txt", ""])
                content = picture(rng) if rng.random() < 0.98 else damaged(rng, picture(rng))
                (place / "set" / split / label / f"{i}{suffix}").write_bytes(content)
    return "set"


def lay_npz(rng: random.Random, place: Path) -> str:
    arrays, count = {}, mostly(rng, [12, 30], [1, 0], 0.1)
    usual = rng.choice([(count, 8, 8), (count, 8, 8, 3), (count, 3, 9, 7)])
    for split in ("train", "test", *rng.choice([(), (), ("valid",)])):
        shape = mostly(rng, [usual], [(count,), (count, 8, 7, 2), (count, 0, 8), (count, 8, 8)])
        labels = np.arange(count + mostly(rng, [0], [1, -1])) % 3 - mostly(rng, [0], [1])
        arrays[f"x_{split}"] = np.zeros(shape, mostly(rng, [np.uint8], [np.float32, np.int64, bool]))
        arrays[f"y_{split}"] = labels.astype(mostly(rng, [np.int64, np.uint8], [np.float32, object, "U1"]))
    for name in rng.sample(sorted(arrays), rng.random() < 0.05):
        del arrays[name]
    file = io.BytesIO()
    (np.savez_compressed if rng.random() < 0.5 else np.savez)(file, **arrays)
    (place / "set.npz").write_bytes(damaged(rng, file.getvalue()))
    return "set.npz"


def lay_csv(rng: random.Random, place: Path) -> str:
    return lay_packed(rng, place, "set.csv", csv_bytes(rng))


def lay_jsonl(rng: random.Random, place: Path) -> str:
    return lay_packed(rng, place, "set.jsonl", jsonl_bytes(rng))


def lay_packed(rng: random.Random, place: Path, name: str, content: bytes) -> str:
    """As it is or compressed, perhaps under a name that says something else."""
    packed = rng.choice(["", "", ".xz", ".gz"])
    content = {"": bytes, ".xz": lzma.compress, ".gz": gzip.compress}[packed](content)
    name += mostly(rng, [packed], ["", ".xz", ".gz", ".bz2", ".zip", ".tar", ".XZ"])
    (place / name).write_bytes(damaged(rng, content))
    return name


def published(rng: random.Random) -> dict[str, str]:
    """Members of a task in one of the forms in which such are published."""
    count, word = rng.choice([20, 20, 40]), mostly(rng, ["good"], ["", " ", "(", "\t", '"', "\u00a0", "\0"])
    trees = "".join(f"({i % 5} (2 {word}) (2 film{i}))\n" for i in range(count))
    intents = "".join(f'"Is ""{i}"" {word}?",{"lost" if i % 2 else "new"}\n' for i in range(count))
    phrases = "".join(f"{word} phrase {i} \t{i % 2}\n" for i in range(count))
    return rng.choice(
        [
            {f"trees/{split}.txt": trees for split in ("train", "dev", "test")},
            {f"SST-2/{split}.tsv": "sentence\tlabel\n" + phrases for split in ("train", "dev")},
            {f"banking77/{split}.csv": "text,category\n" + intents for split in ("train", "test")},
            {
                f"aclImdb/{split}/{label}/{i}_{rating}.txt": f"{word} {label} {i}"
                for split in ("train", "test")
                for label, rating in (("neg", 2), ("pos", 9))
                for i in range(count)
            },
        ]
    )


def lay_archive(rng: random.Random, place: Path) -> str:
    members = [(mostly(rng, [name], ODD_NAMES, 0.005), text.encode()) for name, text in published(rng).items()]
    members = [(name, mostly(rng, [text], [b"", b"\xff", text[:-3], text * 2], 0.01)) for name, text in members]
    members += mostly(rng, [[], [("README", b"read")], [("a/b/", b"")]], [members[:1], [("train.txt", b"x")]], 0.1)
    if rng.random() < 0.02:
        members.pop()
    if (kind := rng.choice(["zip", "tar", "tar.gz", "tar.xz", "folder"])) == "folder":
        for name, content in members:
            if not name.endswith("/") and ".." not in name:
                (place / "set" / name.lstrip("/")).parent.mkdir(parents=True, exist_ok=True)
                (place / "set" / name.lstrip("/")).write_bytes(content)
        return "set"
    file = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(file, "w", rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])) as archive:
            for name, content in members:
                archive.writestr(name, content)
    else:
        with tarfile.open(fileobj=file, mode=f"w:{kind.removeprefix('tar').removeprefix('.')}") as archive:
            for name, content in members:
                entry = tarfile.TarInfo(name)
                entry.size, entry.type = len(content), mostly(rng, [tarfile.REGTYPE], [tarfile.SYMTYPE, tarfile.CHRTYPE], 0.003)
                archive.addfile(entry, io.BytesIO(content))
    name = mostly(rng, [f"set.{kind}"], ["set", "set.zip", "set.tar", "set.csv"])
    (place / name).write_bytes(damaged(rng, file.getvalue()))
    return name


ODD_NAMES = ["../train.txt", "/etc/train.txt", "a\\..\\train.txt", "train.txt", "\u00e9" * 90, "a//b", "x\n.txt"]


def lay_corpus(rng: random.Random, place: Path) -> str:
    text = "Alpha beta gamma, 12 of them.\n" * rng.randint(20, 400)
    if rng.random() < 0.3:
        (place / "set").mkdir()
        splits = mostly(
            rng, [("train.txt", "valid.txt", "test.txt"), ("a.txt", "b.txt", "c.txt", "d.md")], [("train.txt",), ()], 0.1
        )
        for name in splits:
            (place / "set" / name).write_bytes(mostly(rng, [text.encode()], [b"", b"\xff\xfe", b"12 34", text.encode("utf-16")]))
        return "set"
    if rng.random() < 0.4:
        return lay_jsonl(rng, place)
    content = mostly(rng, [text], ["", "\ufeff", "12, 34", "\ud800" * 90, "x"], 0.1).encode("utf-8", "surrogatepass")
    return lay_packed(rng, place, "set.txt", content)


KINDS: dict[str, tuple[Callable[[random.Random, Path], str], str, str]] = {
    # How it is laid, the params it goes into, and the key that names it.
    "CSV": (lay_csv, "params.yaml", "data.tasks={{x: {}}}"),
    "JSON lines": (lay_jsonl, "params.yaml", "data.tasks={{x: {}}}"),
    "archives": (lay_archive, "params.yaml", "data.tasks={{x: {}}}"),
    "corpora": (lay_corpus, "params.yaml", "data.corpus={}"),
    "image folders": (lay_image_folder, "presets/vision/digits.yaml", "data.corpus={}"),
    "arrays of images": (lay_npz, "presets/vision/digits.yaml", "data.corpus={}"),
}


def try_data(kind: str, seed: int, folder: Path) -> str:
    lay, base, override = KINDS[kind]
    rng = random.Random(f"{kind} {seed}")
    place = folder / "data"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    name = lay(rng, place)
    more = ("data.shifts={}", *(("data.tasks={x: ../good.csv}",) if kind == "corpora" else ("data.corpus=../good.txt",)))
    more += (f"data.view={rng.choice(['text27', 'bytes'])}",)
    if base != "params.yaml":
        more = (f"data.tasks={{x: {name}}}", f"data.view={rng.choice(['grey', 'rgb'])}")
        more += (f"prepare.broken={rng.choice(['refuse', 'skip'])}",)
    params = config.load(ROOT / base, SETTINGS, (override.format(name), *more))
    paths = Paths(place, folder / "out")
    try:
        prepare.run(params.select(SECTIONS["prepare"]), paths)
    except (UsageError, Failure) as error:
        return one_line(error)
    if base == "params.yaml":
        open_tokens(paths.source / "train.npy")
        read_task(paths.task("x"))
    else:
        open_set(paths.task("x"))
    return "prepared and read"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--params", type=int, default=2000, help="how many params files (default: 2000)")
    parser.add_argument("--data", type=int, default=500, help="how many inputs of each kind of data (default: 500)")
    parser.add_argument("--out", type=Path, default=RESULTS / "fuzz.json", help="where the numbers go")
    arguments = parser.parse_args()
    found: dict[str, Counter] = {"params": Counter()}
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", "Duplicate name")  # zipfile tells of what is meant here
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        @settings(
            max_examples=arguments.params, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(params_texts())
        def params(text: str) -> None:
            found["params"][try_params(text, folder)] += 1

        params()
        rows = (
            f"text {i} {'alpha' if i % 2 else 'zeta'},{i % 2},{split}" for split in ("train", "valid", "test") for i in range(6)
        )
        (folder / "good.csv").write_text("\n".join(["text,label,split", *rows]))
        (folder / "good.txt").write_text("alpha beta gamma. " * 2000)
        for kind in KINDS:
            found[kind] = Counter()
            for seed in range(arguments.data):
                try:
                    found[kind][try_data(kind, seed, folder)] += 1
                except Exception:
                    traceback.print_exc()
                    sys.exit(f"{kind}, input {seed}: raised what is above")
    print()
    for kind, counts in found.items():
        print(f"{kind:18} {sum(counts.values()):5}  {', '.join(f'{count} {what}' for what, count in counts.most_common())}")
    write_json(arguments.out, found)


if __name__ == "__main__":
    main()
