"""Bytes of text files: whether they are UTF-8, and what they may be instead."""

import codecs
import re
from collections.abc import Iterator
from pathlib import Path

from pipeline.checking.findings import Findings
from pipeline.data import tables
from pipeline.errors import Failure

SHOWN = 3  # places of bytes that are no UTF-8, of each file
BINARY = 0.01  # share of control characters that no text has
SPARSE = 0.2  # in a Western language a smaller share of letters is beyond ASCII
_MARKS = {codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE}
_ESCAPED = re.compile("[\udc80-\udcff]")
_CONTROL = bytes({*range(32)} - {*b"\t\n\v\f\r\x1a\x1b"})
_NO_WINDOWS = re.compile("[\udc81\udc8d\udc8f\udc90\udc9d]")


def check(found: Findings, files: list[Path]) -> None:
    """Byte-order marks, and every byte that is no UTF-8; raises Failure if there is one, as reading the file would."""
    marked, bad = [], []
    for path in files:
        chunks = tables.chunks(path)
        first = next(chunks, b"")
        if first.startswith(codecs.BOM_UTF8):
            marked.append(str(path))
        if wrong := _Wrong.of(path, first, chunks):
            bad.append(wrong)
    found.facts["encoding"] = {
        "UTF-8": not bad,
        "byte-order marks": marked,
        "undecodable": [{"file": str(w.path), "bytes": w.count, "first": w.first, "remedy": w.remedy()} for w in bad],
    }
    if bad:
        place, value = bad[0].first[0].values()
        more = f" (and {len(bad) - 1:,} more files)" if len(bad) > 1 else ""
        raise Failure(
            f"{bad[0].path}: {bad[0].count:,} bytes are no UTF-8, the first {value} at byte {place:,}{more}; {bad[0].remedy()}"
        )


class _Wrong:
    """The bytes of a file that are no UTF-8."""

    def __init__(self, path: Path, start: bytes) -> None:
        self.path, self.start = path, start[:2]
        self.count = self.size = self.control = self.beyond = 0
        self.windows = True
        self.first: list[dict[str, str | int]] = []

    @classmethod
    def of(cls, path: Path, first: bytes, chunks: Iterator[bytes]) -> "_Wrong | None":
        wrong, chunk = cls(path, first), first
        decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        while chunk:
            begun = len(decoder.getstate()[0])
            following = next(chunks, b"")
            wrong._take(decoder.decode(chunk, final=not following), wrong.size - begun)
            wrong.size += len(chunk)
            wrong.control += len(chunk) - len(chunk.translate(None, _CONTROL))
            chunk = following
        return wrong if wrong.count else None

    def _take(self, text: str, start: int) -> None:
        if text.isascii():
            return
        beyond = len(text) - len(text.encode("ascii", "ignore"))
        escaped = _ESCAPED.findall(text)
        self.count += len(escaped)
        self.beyond += beyond - len(escaped)
        self.windows = self.windows and not _NO_WINDOWS.search(text)
        if escaped and len(self.first) < SHOWN:
            for match in list(_ESCAPED.finditer(text))[: SHOWN - len(self.first)]:
                place = start + len(text[: match.start()].encode("utf-8", "surrogateescape"))
                self.first.append({"byte": place, "value": f"0x{ord(match[0]) - 0xDC00:02x}"})

    def remedy(self) -> str:
        if self.start in _MARKS:
            return "it is UTF-16: convert it with `iconv -f UTF-16 -t UTF-8`"
        if self.control > BINARY * self.size:
            return "it seems to be binary data, text in no encoding; name a file of text instead, or move it out of the folder"
        if self.beyond > self.count:
            return "the rest is UTF-8: mend them, or leave them out with `iconv -c -f UTF-8 -t UTF-8`"
        if self.windows and self.count < SPARSE * self.size:
            return "it looks like Windows-1252: convert it with `iconv -f WINDOWS-1252 -t UTF-8`"
        return "convert it with `iconv -f ENCODING -t UTF-8`, its encoding for ENCODING"
