"""Published archives: fetched once and verified, then read as streams; nothing of them is unpacked to disk."""

import gzip
import lzma
import os
import stat
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from http.client import HTTPException, HTTPResponse
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

from filelock import FileLock

from pipeline.errors import Failure
from pipeline.files import digest
from pipeline.progress import Progress

MIB = 1 << 20  # bytes of a chunk, and of a unit of progress
ATTEMPTS = 6
FIRST_WAIT = 1.0  # seconds; each further wait is twice as long
TIMEOUT = 30.0  # seconds without a byte

# What the standard library raises for it; RuntimeError where a zip is encrypted.
_DAMAGE = (
    EOFError,
    IndexError,
    OverflowError,
    RuntimeError,
    ValueError,
    gzip.BadGzipFile,
    lzma.LZMAError,
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
)


def folder(root: Path) -> Path:
    """Where archives lie. In a copy that `dvc exp` runs in, in the repository it was copied from."""
    return Path(os.environ.get("DVC_ROOT", root)) / "data/archives"


def file_name(url: str) -> str:
    """The name under which the archive at a URL is kept."""
    return PurePosixPath(unquote(urlsplit(url).path)).name


def fetch(url: str, sha256: str | None, folder: Path) -> Path:
    """The archive at `url`, as a file of `folder`: what lies there, put by hand too, or else a download.

    A download goes on where an earlier one stopped. Raises Failure if the archive cannot be had or is another one.
    """
    path = folder / file_name(url)
    if path.exists():
        _verify(path, sha256, f"remove it, then run again to download {url}")
    else:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_name(f"{path.name}.lock")):
                if not path.exists():
                    _download(url, sha256, path)
        except OSError as error:
            raise Failure(f"{path}: cannot be written ({error.strerror or error}); free space or permissions there") from None
    if sha256 is None:
        print(f"vqmoe: {path} is checked against no published sha256; its own is {digest(path)}", file=sys.stderr)
    return path


class Entry(NamedTuple):
    """A file of an archive: its size in bytes, uncompressed, and how to open it."""

    name: str
    size: int
    open: Callable[[], IO[bytes]]


class Archive:
    """The files of a zip, a tar or a folder by name, read in chunks.

    A compressed tar can only be read from front to back, so go through `names` and read each file as its name comes:
    one that lies further back costs reading all before it again.
    """

    def __init__(self, path: Path, entries: Iterator[Entry]) -> None:
        self.path = path
        self._entries = entries
        self._met: dict[str, Entry] = {}
        self._order: list[str] = []

    def names(self) -> Iterator[str]:
        """Every file's name, in the archive's order (a folder's is sorted)."""
        place = 0
        while place < len(self._order) or self._advance():
            yield self._order[place]
            place += 1

    def size(self, name: str) -> int:
        """Bytes of a file, as the archive declares them."""
        return self._entry(name).size

    def chunks(self, name: str) -> Iterator[bytes]:
        """Bytes of a file in chunks, no more than are declared."""
        entry = self._entry(name)
        with reading(self.path), entry.open() as stream:
            while chunk := stream.read(MIB):
                yield chunk

    def texts(self, name: str) -> Iterator[str]:
        """Text of a file in stretches, see `decoded`."""
        return decoded(self.chunks(name), f"{self.path}, {name}")

    def text(self, name: str) -> str:
        return "".join(self.texts(name))

    def _entry(self, name: str) -> Entry:
        while name not in self._met:
            if not self._advance():
                raise Failure(f"{self.path}: has no file {name}; it is another archive, or a part of one: fetch it again")
        return self._met[name]

    def _advance(self) -> bool:
        """Meet the next file, if there is one."""
        with reading(self.path):
            entry = next(self._entries, None)
        if entry is None:
            return False
        parts = entry.name.replace("\\", "/").split("/")
        if parts[0] == "" or ".." in parts:
            raise Failure(f"{self.path}: the name {entry.name} leads out of the archive's folder; fetch it from its source")
        if entry.name in self._met:
            raise Failure(f"{self.path}: holds {entry.name} twice; fetch it from its source")
        self._order.append(entry.name)
        self._met[entry.name] = entry
        return True


def is_archive(path: Path) -> bool:
    """Whether `open` can be asked for it: a folder, and what is a zip or a tar or says so by its name."""
    with reading(path):
        named = {suffix.lower() for suffix in path.suffixes} & {".zip", ".tar", ".tgz"}
        return path.is_dir() or bool(named) or zipfile.is_zipfile(path) or tarfile.is_tarfile(path)


@contextmanager
def open(path: Path) -> Iterator[Archive]:
    """A zip, a folder, or a tar of any compression that the standard library reads."""
    with reading(path):
        if path.is_dir():
            handle, entries = nullcontext(), _folder(path)
        elif zipfile.is_zipfile(path) or path.suffix.lower() == ".zip":
            handle = zipfile.ZipFile(path)
            entries = _zip(path, handle)
        else:
            handle = tarfile.open(path)
            entries = _tar(path, handle)
    with handle:
        yield Archive(path, entries)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns whatever a file or archive does while it is read into one line."""
    try:
        yield
    except _DAMAGE as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise Failure(f"{path}: truncated or damaged ({reason}); fetch it again") from None
    except FileNotFoundError:
        raise Failure(f"{path}: not found; check the name, or fetch it") from None
    except OSError as error:
        raise Failure(f"{path}: cannot be read ({error.strerror or error}); check its permissions, or fetch it again") from None


def decoded(chunks: Iterable[bytes], where: str, exact: bool = False) -> Iterator[str]:
    """UTF-8 text in stretches that end with a line, or with a word in a line longer than a chunk: no word is cut.

    A byte-order mark is left out, a byte that is no UTF-8 is a Failure that names it, after what comes before it. With `exact`
    both come through, so that `encoded` gives back every byte: half of a character is no UTF-8, and a corpus may be cut there.
    """
    done = 0
    for piece in _whole_words(chunks):
        try:
            text = piece.decode("utf-8", "surrogateescape" if exact else "strict")
        except UnicodeDecodeError as error:
            place = done + error.start
            # What is good before it comes first.
            yield piece[: error.start].decode().removeprefix("" if done else "\ufeff")
            raise Failure(f"{where}: not UTF-8 at byte {place}; convert it, for example with iconv -t UTF-8") from None
        yield text if done or exact else text.removeprefix("\ufeff")
        done += len(piece)


def encoded(text: str) -> bytes:
    """The bytes that `decoded` made a text of."""
    return text.encode("utf-8", "surrogateescape")


def lines(texts: Iterable[str]) -> Iterator[str]:
    """Lines without their ends. Only a line feed ends one: JSON allows separators such as U+2028 inside a text."""
    rest = ""
    for text in texts:
        *whole, rest = (rest + text).split("\n")
        yield from whole
    if rest:
        yield rest


def _whole_words(chunks: Iterable[bytes]) -> Iterator[bytes]:
    rest = b""
    for chunk in chunks:
        rest += chunk
        end = rest.rfind(b"\n") + 1 or rest.rfind(b" ") + 1
        if end:
            yield rest[:end]
            rest = rest[end:]
    if rest:
        yield rest


def _zip(path: Path, archive: zipfile.ZipFile) -> Iterator[Entry]:
    for info in archive.infolist():
        if not info.is_dir():
            # The upper half holds the file's mode where the archive was made on Unix, else 0.
            if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG):
                raise _no_file(path, info.filename)
            yield Entry(info.filename, info.file_size, lambda info=info: archive.open(info))


def _tar(path: Path, archive: tarfile.TarFile) -> Iterator[Entry]:
    for info in archive:
        if not info.isdir():
            if not info.isfile():
                raise _no_file(path, info.name)
            yield Entry(info.name, info.size, lambda info=info: archive.extractfile(info))
    # A tar ends with blocks of zeros; tarfile itself takes a header that is cut off or damaged for the end.
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("unexpected end of data")
    while archive.fileobj.read(MIB):  # to the checksum of a compressed one
        pass


def _folder(path: Path) -> Iterator[Entry]:
    for file in sorted(path.rglob("*")):
        if file.is_file():
            yield Entry(file.relative_to(path).as_posix(), file.stat().st_size, lambda file=file: file.open("rb"))


def _no_file(path: Path, name: str) -> Failure:
    return Failure(f"{path}: {name} is a link or a device, which no data archive needs; fetch it from its source")


def _verify(path: Path, sha256: str | None, remedy: str) -> None:
    if sha256 is not None and (found := digest(path)) != sha256:
        raise Failure(f"{path}: sha256 is {found}, expected {sha256}; {remedy}")


class _Interrupted(Exception):
    """The connection failed in a way that may pass; made of the reason, or of the error that has it."""

    def __init__(self, error: str | Exception) -> None:
        reason = getattr(error, "reason", error)
        super().__init__(getattr(reason, "strerror", None) or str(reason) or type(reason).__name__)


def _download(url: str, sha256: str | None, path: Path) -> None:
    part, tag = (path.with_name(f"{path.name}{ending}") for ending in (".part", ".part.etag"))
    remedy = f"get {url} elsewhere and put it at {path} (sha256 {sha256 or 'not published'})"
    for attempt in range(ATTEMPTS):
        try:
            _receive(url, part, tag)
            break
        except _Interrupted as error:
            if attempt == ATTEMPTS - 1:
                raise Failure(f"{url}: cannot be downloaded ({error}); run again to go on, or {remedy}") from None
            wait = FIRST_WAIT * 2**attempt
            print(f"vqmoe: {url}: {error}; trying again in {wait:.0f} s", file=sys.stderr)
            time.sleep(wait)
        except HTTPError as error:
            raise Failure(f"{url}: cannot be downloaded (the server says {error.code} {error.reason}); {remedy}") from None
    tag.unlink(missing_ok=True)
    try:
        _verify(part, sha256, f"it is removed; run again, or {remedy}")
    except Failure:
        part.unlink()
        raise
    os.replace(part, path)


def _receive(url: str, part: Path, tag: Path) -> None:
    """Ask for what `part` lacks and append it. `tag` keeps the server's mark of the version that `part` is of."""
    start = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "vqmoe"}  # some servers refuse Python's own
    if start:
        headers["Range"] = f"bytes={start}-"
        if tag.exists():
            headers["If-Range"] = tag.read_text()
    with _answer(Request(url, headers=headers)) as response:
        if response.status == 416:  # nothing is lacking, or too much is there
            if response.headers.get("Content-Range") == f"bytes */{start}":
                return
            part.unlink()
            raise _Interrupted("the server has less than was received before")
        resumed = response.status == 206
        if not resumed:
            start = 0
            etag = response.headers.get("ETag", "")
            tag.unlink(missing_ok=True)
            if etag.startswith('"'):  # a weak one (W/"...") does not promise the same bytes
                tag.write_text(etag)
        lacking = int(response.headers.get("Content-Length", 0))
        with (
            part.open("ab" if resumed else "wb") as file,
            Progress(f"download {file_name(url)}", total=lacking / MIB, unit="MiB") as progress,
        ):
            for chunk in _body(response):
                file.write(chunk)
                progress.advance(len(chunk) / MIB)
            if file.tell() < start + lacking:
                raise _Interrupted(f"the connection ended after {file.tell()} of {start + lacking} bytes")


def _answer(request: Request) -> HTTPResponse:
    """The server's answer. Raises HTTPError for a refusal that lasts, _Interrupted for what may pass."""
    try:
        return urlopen(request, timeout=TIMEOUT)
    except HTTPError as error:
        if error.code == 416:
            return error
        if error.code < 500 and error.code not in (408, 429):
            raise
        raise _Interrupted(f"the server says {error.code} {error.reason}") from None
    except (OSError, HTTPException) as error:
        raise _Interrupted(error) from None


def _body(response: HTTPResponse) -> Iterator[bytes]:
    try:
        while chunk := response.read1(MIB):
            yield chunk
    except (OSError, HTTPException) as error:
        raise _Interrupted(error) from None
