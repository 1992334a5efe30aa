"""What a run has to tell, on disk before it is sent: one JSON line per operation."""

import errno
import fcntl
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import Failure
from pipeline.files import read_json, write_json

BLOCK_BYTES = 1 << 20
# A journal is held for longer than this only by a run that lives, or shared by whoever sends it.
CLAIM_SECONDS = 1.0


class Sent(NamedTuple):
    """The run of the store that a journal was sent to, and up to which byte."""

    run_id: str = ""
    offset: int = 0


class Journal:
    """The file `<key>.jsonl`; beside it, named by the run's offline id, how far it was sent and copies of files it names.

    Its lock ends with the process. A run holds it alone as long as it lives. Who sends the journal of a run that does not
    shares it, so that the run can go on meanwhile.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor
        self.first, self.last = self._ends()
        # Whole lines, by this account; and up to where a mark of sending can be true: a power cut may have taken lines since.
        self._size = self._markable = os.fstat(descriptor).st_size

    @classmethod
    def open(cls, path: Path, lock: int = fcntl.LOCK_EX) -> "Journal | None":
        """The journal at `path`, made if there is none; None where another holds it. Raises OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                fcntl.flock(descriptor, lock | fcntl.LOCK_NB)
                # Between the two calls it may have been removed or put aside.
                if _same(path, descriptor):
                    return cls(path, descriptor)
            except BlockingIOError:
                os.close(descriptor)
                return None
            os.close(descriptor)

    @property
    def empty(self) -> bool:
        return not self._size

    @property
    def unreadable(self) -> bool:
        """Whether it holds something, but nothing that a run wrote."""
        return not (self.empty or self.last)

    @property
    def ended(self) -> bool:
        return self.last.get("op") == "end"

    @property
    def unfinished(self) -> bool:
        """Whether its run can go on: it neither finished, nor did another take its place."""
        return self.first.get("op") == "create" and self.last.get("status") != "FINISHED" and "superseded" not in self.last

    @property
    def done(self) -> bool:
        """Whether the run has ended and all of it has been sent. Not so where it goes on in another process meanwhile."""
        return self.ended and self.sent().offset == self._size == os.fstat(self._descriptor).st_size

    def append(self, operation: dict[str, Any]) -> None:
        """Add a line, whole or not at all. Raises OSError."""
        line = json.dumps(operation).encode() + b"\n"
        size = os.fstat(self._descriptor).st_size
        if os.write(self._descriptor, line) < len(line):
            os.ftruncate(self._descriptor, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._size = size + len(line)
        self.first = self.first or operation
        self.last = operation

    def close_dead(self, **more: Any) -> None:
        """Give a run that died its end: KILLED, at the time of its last word."""
        self.append({"op": "end", "time": self.last["time"], "status": self.last.get("status", "KILLED")} | more)

    def flush(self) -> None:
        """Onto the disk, so that nothing is in the store that a power cut could take from here."""
        os.fdatasync(self._descriptor)

    def operations(self, offset: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Whole lines from a byte on, each with the byte behind it; one that cannot be read is an operation `damaged`."""
        rest, read = b"", offset
        while block := os.pread(self._descriptor, BLOCK_BYTES, read):
            read += len(block)
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                operation = _parsed(line) or {"op": "damaged", "at": offset}
                offset += len(line) + 1
                yield offset, operation

    def sent(self) -> Sent:
        with suppress(Failure, KeyError, TypeError):
            found = read_json(self._beside("sent.json"), "")
            return Sent(found["run_id"], min(found["offset"], self._markable))
        return Sent()

    def mark(self, sent: Sent) -> None:
        self._markable = max(self._markable, sent.offset)
        write_json(self._beside("sent.json"), sent._asdict())

    def keep(self, path: Path) -> str:
        """Link, or else copy, a file or folder beside the journal, where later runs do not replace it; `kept` finds it."""
        name = f"{uuid.uuid4().hex[:8]}/{path.name}"
        target = self.kept(name)
        if path.is_dir():
            shutil.copytree(path, target, copy_function=_link)
        else:
            target.parent.mkdir(parents=True)
            _link(path, target)
        return name

    def kept(self, name: str) -> Path:
        return self._beside("files") / name

    def hold(self, wait: bool) -> bool:
        """Lock it alone; whether that went."""
        return self._lock(fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))

    def share(self) -> bool:
        """Lock it so that its run may go on meanwhile; whether that went."""
        return self._lock(fcntl.LOCK_SH | fcntl.LOCK_NB)

    def put_aside(self) -> None:
        """Make room for another run of the key: this one will not go on."""
        if self.first:
            self.close_dead(superseded=True)
        os.rename(self.path, self.path.with_name(f"{self.path.stem}~{uuid.uuid4().hex[:8]}.jsonl"))
        self.close()

    def settle(self, forget: bool = False) -> None:
        """Remove what nobody needs any more: a run wholly sent that will not go on, or with `forget` any that is wholly sent.

        Such a run can go on all the same: it is found in the store.
        """
        if self.empty or (self.done and (forget or not self.unfinished)):
            self.remove()

    def remove(self) -> None:
        if _same(self.path, self._descriptor):
            self.path.unlink()
        if self.first:
            self._beside("sent.json").unlink(missing_ok=True)
            shutil.rmtree(self._beside("files"), ignore_errors=True)

    def close(self) -> None:
        os.close(self._descriptor)

    def _beside(self, name: str) -> Path:
        return self.path.with_name(f"{self.first['id']}.{name}")

    def _lock(self, how: int) -> bool:
        try:
            fcntl.flock(self._descriptor, how)
        except BlockingIOError:
            return False
        return True

    def _ends(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """First and last operation; what a power cut left torn behind the last is cut off, but not all that there is."""
        size = os.fstat(self._descriptor).st_size
        text = b""
        while block := os.pread(self._descriptor, size - len(text), len(text)):
            text += block
        end, last = text.rfind(b"\n") + 1, {}
        while end:
            start = text.rfind(b"\n", 0, end - 1) + 1
            last = _parsed(text[start : end - 1])
            if last:
                break
            end = start
        if last and end < size:
            os.ftruncate(self._descriptor, end)
        return _parsed(text.partition(b"\n")[0]) if last else {}, last


def claim(folder: Path, key: str, resumed: bool) -> Journal:
    """A journal to write: that of the key's unfinished run if `resumed`, else a new one. Raises OSError.

    A run of the key that lives in another process keeps its own, and this one gets another name.
    """
    path = folder / f"{key}.jsonl"
    until = time.monotonic() + CLAIM_SECONDS
    while time.monotonic() < until:
        journal = Journal.open(path) or Journal.open(path, fcntl.LOCK_SH)
        if journal is None:
            time.sleep(0.05)
        elif journal.empty or (resumed and journal.unfinished):
            return journal
        else:
            journal.put_aside()
    return claim(folder, f"{key}~{uuid.uuid4().hex[:8]}", resumed)


def _link(file: Path | str, target: Path | str) -> None:
    try:
        os.link(os.path.realpath(file), target)
    except OSError:
        shutil.copyfile(file, target)


def _same(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _parsed(line: bytes) -> dict[str, Any]:
    """An operation, or {} where the line is none."""
    try:
        operation = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return operation if isinstance(operation, dict) and "op" in operation else {}
