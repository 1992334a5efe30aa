"""Files that are either whole or absent: written under a temporary name beside the target, then renamed."""

import csv
import glob
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline.errors import Failure, nearest


def nearest_path(path: str | Path, root: Path, known: Iterable[str] = ()) -> str:
    """As `errors.nearest`, for a path (relative to `root`) that is not there: of its folder, or of the first that is not there
    either; with the known names where it might be one.
    """
    path = Path(path)
    while not (root / path.parent).is_dir():
        path = path.parent
    try:
        there = sorted(os.listdir(root / path.parent))
    except OSError:
        there = []
    # Names, since in a deep folder all paths are alike.
    return nearest(path.name, there, str(path.parent)) if path.parent != Path() else nearest(path.name, [*known, *there])


@contextmanager
def output_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the body succeeds it is renamed to `path`, else removed."""
    temporary = _temporary(path)
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        raise _unwritable(path, error, temporary) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def output_folder(path: Path) -> Iterator[Path]:
    """Like `output_file` for a folder: an earlier `path` is replaced only when the body succeeds."""
    temporary = _temporary(path)
    before = temporary.with_suffix(".old")
    try:
        temporary.mkdir()
        yield temporary
        for written in (*temporary.rglob("*"), temporary):
            _sync(written)
        if path.exists():
            os.replace(path, before)
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        raise _unwritable(path, error, temporary) from error
    finally:
        if before.exists() and not path.exists():
            os.replace(before, path)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(before, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON. NaN and infinities are refused: they are not JSON."""
    with output_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as CSV, into a folder that is not final yet; a value that a row lacks stays empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def read_json(path: Path, remedy: str) -> Any:
    """Read a JSON file; `remedy` completes the error line of a missing or damaged one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Failure(f"{path}: not found; {remedy}") from None
    except (OSError, ValueError) as error:
        raise Failure(f"{path}: cannot be read as JSON ({error}); {remedy}") from None


def digest(path: Path, algorithm: str = "sha256") -> str:
    """Hex digest of a file, or of a folder's relative names and contents in sorted order."""
    if path.is_dir():
        total = hashlib.new(algorithm)
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            total.update(f"{file.relative_to(path).as_posix()} {digest(file, algorithm)}\n".encode())
        return total.hexdigest()
    known = path.stat()
    return _digest(path, algorithm, (known.st_ino, known.st_size, known.st_mtime_ns))


# A stage wants the digests of its inputs for its key, its tags and its check.
@lru_cache(maxsize=4096)
def _digest(path: Path, algorithm: str, _: tuple[int, ...]) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, would survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary(path: Path) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error, path.parent) from error
    # What a process that was killed has left, perhaps between the two renames of a folder.
    for left in path.parent.glob(f".{glob.escape(path.name)}.*"):
        found = re.fullmatch(r"\.(\d+)\.(tmp|old)", left.name.removeprefix(f".{path.name}"))
        if found is None or _alive(int(found[1])):
            continue
        if found[2] == "old" and not path.exists():
            os.replace(left, path)
        else:
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _alive(pid: int) -> bool:
    """Whether there is a process of that number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _unwritable(path: Path, error: OSError, below: Path) -> Exception:
    """The line for a failed write; an error about a file elsewhere, which the body met, passes unchanged."""
    if error.filename is not None and not str(error.filename).startswith((str(below), str(path))) and path.parent.exists():
        return error
    return Failure(f"{path}: cannot be written ({error.strerror or error}); free space or permissions there, then run again")
