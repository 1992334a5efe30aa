import gzip

import pytest

from pipeline.checking import check
from pipeline.data import archives

LINES = "Ein schöner Tag für Größe.\n" * 50


@pytest.mark.parametrize(
    ("content", "remedy"),
    [
        (LINES.encode("cp1252"), "it looks like Windows-1252: convert it with `iconv -f WINDOWS-1252 -t UTF-8`"),
        (LINES.encode("utf-16"), "it is UTF-16: convert it with `iconv -f UTF-16 -t UTF-8`"),
        (LINES.encode() + "für".encode("cp1252"), "the rest is UTF-8: mend them, or leave them out with `iconv -c"),
        ("Прекрасный день.\n".encode("cp1251") * 50, "convert it with `iconv -f ENCODING -t UTF-8`"),
        (bytes(range(256)) * 50, "it seems to be binary data, text in no encoding; name a file of text instead"),
    ],
)
def test_bytes_that_are_no_utf_8_have_places_and_a_remedy(checked, content, remedy):
    found = checked("a.txt", content)
    assert remedy in found.problem
    (wrong,) = found.facts["encoding"]["undecodable"]
    with pytest.raises(UnicodeDecodeError) as caught:
        content.decode()
    assert wrong["first"][0] == {"byte": caught.value.start, "value": f"0x{content[caught.value.start]:02x}"}
    assert wrong["bytes"] == sum(0xDC80 <= ord(c) <= 0xDCFF for c in content.decode("utf-8", "surrogateescape"))
    assert f"the first 0x{content[caught.value.start]:02x} at byte {caught.value.start:,}" in found.problem


def test_a_stray_control_character_makes_no_binary_data(checked):
    assert "Windows-1252" in checked("a.txt", (LINES + "\0").encode("cp1252")).problem


@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
def test_places_are_the_same_however_a_file_is_read(checked, monkeypatch, chunk):
    content = "ab\u00e4\u6f22\U0001f600".encode() + b"\xe4x\xf0\x9f" + "\u00e4".encode() + b"\xff"
    monkeypatch.setattr(archives, "MIB", chunk)
    found = checked("a.txt.gz", gzip.compress(content))
    (wrong,) = found.facts["encoding"]["undecodable"]
    assert wrong["bytes"] == 4
    assert wrong["first"] == [{"byte": 11, "value": "0xe4"}, {"byte": 13, "value": "0xf0"}, {"byte": 14, "value": "0x9f"}]


def test_marks_are_no_problem_and_damage_is(checked):
    content = "\ufeff" + LINES * 20
    assert len(checked("a.txt", content).facts["encoding"]["byte-order marks"]) == 1
    assert checked("a.txt", content[1:]).facts["encoding"]["byte-order marks"] == []
    assert "truncated or damaged" in checked("a.txt.gz", gzip.compress(LINES.encode())[:-9]).problem


def test_of_several_files_each_is_named(root):
    (root / "data/mine").mkdir()
    for i in range(6):
        (root / f"data/mine/{i}.txt").write_bytes(LINES.encode("utf-8" if i % 2 else "cp1252"))
    found = check(root / "data/mine", root)
    assert [file["file"][-5:] for file in found.facts["encoding"]["undecodable"]] == ["0.txt", "2.txt", "4.txt"]
    assert "(and 2 more files)" in found.problem
