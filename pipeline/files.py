"""Files that are either whole or absent: written under a temporary name beside the target, then renamed."""

import csv
import glob
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline.errors import Failure, nearest


def nearest_path(path: str | Path, root: Path, known: Iterable[str] = ()) -> str:
    """As `errors.nearest`, for a path (relative to `root`) that is not there: of its folder, or of the first that is not there
    either; with the known names where it might be one. Of a link to nothing, that it is one.
    """
    path = given = Path(path)
    while not os.path.isdir(root / path.parent):
        path = path.parent
    if os.path.islink(root / path) and not os.path.exists(root / path):
        return f" ({path} is a link to {os.readlink(root / path)}, where nothing is; mend it)"
    try:
        there = [name for name in sorted(os.listdir(root / path.parent)) if path.parent / name != given]
    except OSError:
        there = []
    # Names, since in a deep folder all paths are alike.
    return nearest(path.name, there, str(path.parent)) if path.parent != Path() else nearest(path.name, [*known, *there])


@contextmanager
def output_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the body succeeds it is renamed to `path`, else removed.

    A link stays, and the file that it leads to is replaced. Raises Failure if that is not possible, or no file is there.
    """
    whole, temporary = _begun(path, os.path.isfile, "file")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, whole)
        _sync(whole.parent)
    except OSError as error:
        raise _unwritable(path, error, whole, temporary) from error
    finally:
        with suppress(OSError):  # which would hide what went wrong
            temporary.unlink(missing_ok=True)


@contextmanager
def output_folder(path: Path) -> Iterator[Path]:
    """Like `output_file` for a folder: an earlier `path` is replaced only when the body succeeds.

    The current folder, if it is empty, is not replaced, but gets the files: who stands in it would not see them.
    """
    whole, temporary = _begun(path, os.path.isdir, "folder")
    before = temporary.with_suffix(".old")
    try:
        temporary.mkdir()
        yield temporary
        for written in (*temporary.rglob("*"), temporary):
            _sync(written)
        if os.path.exists(whole) and os.path.samefile(whole, os.curdir) and not os.listdir(whole):
            for written in temporary.iterdir():
                os.replace(written, whole / written.name)
            _sync(whole)
        else:
            if os.path.exists(whole):
                os.replace(whole, before)
            os.replace(temporary, whole)
            _sync(whole.parent)
    except OSError as error:
        raise _unwritable(path, error, whole, temporary) from error
    finally:
        if os.path.exists(before) and not os.path.exists(whole):
            os.replace(before, whole)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(before, ignore_errors=True)


@contextmanager
def locked(path: Path, seconds: float, taken: str) -> Iterator[None]:
    """Hold the lock `path`, in a folder that is made if need be; Failure, `taken` if another process holds it for so long."""
    from filelock import FileLock, Timeout  # loads asyncio, for which help need not wait

    lock = FileLock(path, timeout=seconds)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise Failure(taken) from None
    except OSError as error:
        raise _refused(path.parent, error) from error
    try:
        yield
    finally:
        lock.release()


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
    except (OSError, ValueError, RecursionError) as error:
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


def _begun(path: Path, right: Callable[[Path], bool], kind: str) -> tuple[Path, Path]:
    """Where a path leads, and a temporary path beside that. Raises Failure if something that is not `right` is there."""
    try:
        whole = _whole(path)
        # The links of /proc lead to what has no path.
        if (os.path.exists(path) or os.path.lexists(whole)) and not right(whole):
            raise Failure(f"{path}: is there already and is no {kind}, so it is not replaced; name another {kind}")
        whole.parent.mkdir(parents=True, exist_ok=True)
        # What a process that was killed has left, perhaps between the two renames of a folder.
        for left in whole.parent.glob(f".{glob.escape(whole.name)}.*"):
            found = re.fullmatch(r"\.(\d+)\.(tmp|old)", left.name.removeprefix(f".{whole.name}"))
            if found is None or _alive(int(found[1])):
                continue
            if found[2] == "old" and not whole.exists():
                os.replace(left, whole)
            else:
                shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
    except OSError as error:
        raise _refused(path, error) from error
    return whole, whole.with_name(f".{whole.name}.{os.getpid()}.tmp")


def _whole(path: Path) -> Path:
    """An absolute path without links. One to a write-protected file stays, since it may be DVC's, which lead to its cache."""
    whole = Path(os.path.realpath(path))
    if os.path.islink(path) and os.path.isfile(whole) and not whole.stat().st_mode & 0o222:
        return Path(os.path.realpath(path.parent), path.name)
    return whole


def _alive(pid: int) -> bool:
    """Whether there is a process of that number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _unwritable(path: Path, error: OSError, whole: Path, temporary: Path) -> Exception:
    """The line for a failed write; an error about a file elsewhere, which the body met, passes unchanged."""
    named = error.filename is None or str(error.filename).startswith((str(temporary), str(whole)))
    return _refused(path, error) if named or not os.path.exists(whole.parent) else error


def _refused(path: Path, error: OSError) -> Failure:
    return Failure(f"{path}: cannot be written ({error.strerror or error}); free space or permissions there, then run again")
