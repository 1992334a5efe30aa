"""Whatever stands in a params file or a data file, it is used or refused in one line. Tries mutations and counts.

    python benchmarks/fuzz.py

Params: keys and values of params.yaml and presets/vision/digits.yaml are changed, moved, doubled and deleted, as values and as
text. What is accepted is built and takes a step, at its own size where that is small. Data: archives, JSON lines, CSV files,
texts, folders and arrays of images, whole and damaged, go through `prepare`. What is raised beside UsageError and Failure, or
has more than a line, is a finding, and ends the search with the input that showed it.
"""

import argparse
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
            change = draw(st.sampled_from(["set", "set", "set", "drop", "rename", "copy"]))
            if change == "set":
                part[last] = draw(VALUES)
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


def csv_bytes(rng: random.Random) -> bytes:
    heads = ["text,label,split", "text,label", "text;label;split", "label,text,split,group", ""]
    words = ["alpha", "", '"quo"te"', "a,b", "é\u0000", "zeta " * 50, "\n", "train", "valid", "test", "x" * 5]
    head = rng.choice(heads) if rng.random() < 0.3 else "text,label,split"
    many = rng.choice([0, 0, 1, 3, 30])
    rows = [head] + [",".join(rng.choice(words) for _ in range(rng.choice([3, 3, 3, 1, 2, 4]))) for _ in range(many)]
    good = [f"text {i} {'alpha' if i % 2 else 'zeta'},{i % 2},{split}" for split in ("train", "valid", "test") for i in range(6)]
    return "\n".join(rows + (good if rng.random() < 0.8 else [])).encode("utf-8", "surrogatepass")


def jsonl_bytes(rng: random.Random) -> bytes:
    values = ["alpha beta", "", None, 3, ["x"], {"a": 1}, "é" * 3, "train", "valid", "test", True, 1e300]
    keys = ["text", "label", "split", "group", "other"]
    rows = [
        json.dumps({key: rng.choice(values) for key in rng.sample(keys, rng.randint(0, 5))})
        for _ in range(rng.choice([0, 0, 1, 5]))
    ]
    good = [
        json.dumps({"text": f"word {i} alpha", "label": str(i % 2), "split": split})
        for split in ("train", "valid", "test")
        for i in range(6)
    ]
    return "\n".join((good if rng.random() < 0.8 else []) + rows + (["{"] if rng.random() < 0.1 else [])).encode()


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
    arrays, count = {}, rng.choice([12, 12, 12, 12, 1, 0])
    for split in ("train", "test"):
        odd = [(count, 3, 8, 8), (count,), (count, 8, 7, 2)] if rng.random() < 0.2 else []
        arrays[f"x_{split}"] = np.zeros(
            rng.choice([(count, 8, 8), (count, 8, 8, 3), *odd]), rng.choice([np.uint8] * 9 + [np.float32])
        )
        labels = np.arange(count + (rng.random() < 0.1)) % 3 - (rng.random() < 0.1)
        arrays[f"y_{split}"] = labels.astype(rng.choice([np.int64] * 9 + [np.float32]))
    for name in rng.sample(sorted(arrays), rng.random() < 0.1):
        del arrays[name]
    file = io.BytesIO()
    np.savez(file, **arrays)
    (place / "set.npz").write_bytes(damaged(rng, file.getvalue()))
    return "set.npz"


def lay_task(rng: random.Random, place: Path) -> str:
    name, make = rng.choice([("set.csv", csv_bytes), ("set.jsonl", jsonl_bytes)])
    packed = rng.choice(["", "", "", "", ".xz", ".gz", ".zip"])
    content = make(rng)
    (place / (name + packed)).write_bytes(damaged(rng, pack(name, content, packed)))
    return name + packed


def pack(name: str, content: bytes, packed: str) -> bytes:
    if packed == ".gz":
        return gzip.compress(content)
    if packed == ".xz":
        return lzma.compress(content)
    if packed == ".zip":
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(name, content)
        return file.getvalue()
    return content


def lay_corpus(rng: random.Random, place: Path) -> str:
    text = "alpha beta gamma. " * rng.randint(0, 400)
    if rng.random() < 0.4:
        (place / "set").mkdir()
        for split in rng.sample(["train.txt", "valid.txt", "test.txt", "x.txt"], rng.randint(0, 4)):
            (place / "set" / split).write_bytes(damaged(rng, text.encode()))
        return "set"
    name = rng.choice(["set.txt", "set.txt.xz", "set.txt.gz", "set.jsonl", "set.zip", "set.tar.gz"])
    content = jsonl_bytes(rng) if "jsonl" in name else text.encode()
    if name == "set.tar.gz":
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w:gz") as archive:
            entry = tarfile.TarInfo(rng.choice(["a.txt", "../a.txt", "/etc/a.txt"]))
            entry.size, entry.type = (
                len(content),
                rng.choice([tarfile.REGTYPE, tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE]),
            )
            archive.addfile(entry, io.BytesIO(content))
        packed = file.getvalue()
    else:
        packed = pack("a.txt", content, Path(name).suffix)
    (place / name).write_bytes(damaged(rng, packed))
    return name


KINDS: dict[str, tuple[Callable[[random.Random, Path], str], str, str]] = {
    # How it is laid, the params it goes into, and the key that names it.
    "tasks": (lay_task, "params.yaml", "data.tasks={{x: {}}}"),
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
    if base != "params.yaml":
        more = (f"data.tasks={{x: {name}}}", f"prepare.broken={rng.choice(['refuse', 'skip'])}")
    params = config.load(ROOT / base, SETTINGS, (override.format(name), *more))
    try:
        prepare.run(params.select(SECTIONS["prepare"]), Paths(place, folder / "out"))
    except (UsageError, Failure) as error:
        return one_line(error)
    return "used"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--params", type=int, default=2000, help="how many params files (default: 2000)")
    parser.add_argument("--data", type=int, default=500, help="how many inputs of each kind of data (default: 500)")
    parser.add_argument("--out", type=Path, default=RESULTS / "fuzz.json", help="where the numbers go")
    arguments = parser.parse_args()
    found: dict[str, Counter] = {"params": Counter()}
    torch.manual_seed(0)
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
