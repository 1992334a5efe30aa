import hashlib
import io
import random
import socket
import stat
import tarfile
import warnings
import zipfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data import archives
from pipeline.data.archives import decoded, encoded, fetch, lines
from pipeline.errors import Failure

CONTENT = random.Random(0).randbytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
FILES = {"b/two.txt": "zwei\nb\u00e4r\n".encode(), "a.txt": b"one line", "b/one.bin": CONTENT, "empty.txt": b""}


@pytest.fixture
def here(server):
    server.files["a.zip"] = CONTENT
    return server


def left(folder):
    return {path.name for path in folder.iterdir()} - {"a.zip.lock"}


def test_what_is_there_is_not_fetched_again(here, tmp_path, capsys):
    path = fetch(here.url("a.zip"), SHA256, tmp_path / "x/y")
    assert path == tmp_path / "x/y/a.zip"
    assert path.read_bytes() == CONTENT
    assert left(path.parent) == {"a.zip"}
    assert "download a.zip: 0/0 " in capsys.readouterr().err
    assert fetch(here.url("a.zip"), SHA256, tmp_path / "x/y") == path
    assert here.requests == [(None, None)]


def test_an_interrupted_download_goes_on_where_it_stopped(here, tmp_path, capsys):
    here.stops = [100_000, 50_001]
    assert fetch(here.url("a.zip"), SHA256, tmp_path).read_bytes() == CONTENT
    assert here.requests == [(None, None), ("bytes=100000-", '"v1"'), ("bytes=150001-", '"v1"')]
    assert here.sent == [100_000, 50_001, 149_999]
    assert left(tmp_path) == {"a.zip"}
    assert "the connection ended after 100000 of 300000 bytes; trying again in 0 s" in capsys.readouterr().err


def test_a_stalled_download_goes_on_too(here, tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "TIMEOUT", 0.1)
    here.stops, here.stall = [100_000], 0.5
    assert fetch(here.url("a.zip"), SHA256, tmp_path).read_bytes() == CONTENT
    assert here.requests[1][0] == "bytes=100000-"


def test_the_next_run_goes_on_too(here, tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "ATTEMPTS", 1)
    here.stops = [100_000]
    with pytest.raises(Failure, match=r"cannot be downloaded \(the connection ended after 100000 of 300000 bytes\); run again"):
        fetch(here.url("a.zip"), SHA256, tmp_path)
    assert left(tmp_path) == {"a.zip.part", "a.zip.part.etag"}
    assert fetch(here.url("a.zip"), SHA256, tmp_path).read_bytes() == CONTENT
    assert here.sent == [100_000, 200_000]


def test_a_file_that_changed_meanwhile_is_fetched_from_its_start(here, tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "ATTEMPTS", 1)
    here.stops = [100_000]
    with pytest.raises(Failure):
        fetch(here.url("a.zip"), SHA256, tmp_path)
    here.files["a.zip"], here.etag = CONTENT[::-1], '"v2"'
    assert fetch(here.url("a.zip"), hashlib.sha256(CONTENT[::-1]).hexdigest(), tmp_path).read_bytes() == CONTENT[::-1]
    assert here.requests[1] == ("bytes=100000-", '"v1"')
    assert here.sent == [100_000, 300_000]


@pytest.mark.parametrize("etag", [None, 'W/"v1"'])
def test_only_a_strong_mark_of_the_version_is_sent_back(here, tmp_path, etag):
    here.etag, here.stops = etag, [100_000]
    assert fetch(here.url("a.zip"), SHA256, tmp_path).read_bytes() == CONTENT
    assert here.requests == [(None, None), ("bytes=100000-", None)]


def test_a_server_without_ranges_starts_again(here, tmp_path):
    here.ranges, here.stops = False, [100_000]
    assert fetch(here.url("a.zip"), SHA256, tmp_path).read_bytes() == CONTENT
    assert here.sent == [100_000, 300_000]


def test_a_part_that_is_whole_already_or_too_long(here, tmp_path):
    part = tmp_path / "a.zip.part"
    part.write_bytes(CONTENT)
    assert fetch(here.url("a.zip"), SHA256, tmp_path).read_bytes() == CONTENT
    assert here.sent == []
    (tmp_path / "a.zip").rename(part)
    part.write_bytes(CONTENT + b"x")
    assert fetch(here.url("a.zip"), SHA256, tmp_path).read_bytes() == CONTENT
    assert here.sent == [300_000]


def test_another_sha256_is_refused(here, tmp_path):
    other = "0" * 64
    with pytest.raises(Failure, match=f"a.zip.part: sha256 is {SHA256}, expected {other}; it is removed; .*{other}") as caught:
        fetch(here.url("a.zip"), other, tmp_path)
    assert here.url("a.zip") in str(caught.value)
    assert left(tmp_path) == set()
    # What was put there by hand is its owner's to remove.
    (tmp_path / "a.zip").write_bytes(CONTENT)
    with pytest.raises(Failure, match=f"a.zip: sha256 is {SHA256}, expected {other}; remove it, then run again to download"):
        fetch(here.url("a.zip"), other, tmp_path)
    assert left(tmp_path) == {"a.zip"}


def test_without_a_published_sha256_its_own_is_shown(here, tmp_path, capsys):
    fetch(here.url("a.zip"), None, tmp_path)
    assert f"a.zip is checked against no published sha256; its own is {SHA256}" in capsys.readouterr().err


def test_no_network(server, tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/a.zip"
        with pytest.raises(Failure, match=r"cannot be downloaded \(Connection refused\); run again") as caught:
            fetch(url, SHA256, tmp_path)
        assert f"get {url} elsewhere and put it at {tmp_path / 'a.zip'} (sha256 {SHA256})" in str(caught.value)
        assert "\n" not in str(caught.value)
        (tmp_path / "a.zip").write_bytes(CONTENT)
        assert fetch(url, SHA256, tmp_path).read_bytes() == CONTENT


def test_a_refusal_that_lasts_is_not_repeated_and_another_is(here, tmp_path):
    with pytest.raises(Failure, match=r"the server says 404 Not Found\); get http"):
        fetch(here.url("b.zip"), SHA256, tmp_path)
    assert len(here.requests) == 1
    here.refusals = [503, 429]
    assert fetch(here.url("a.zip"), SHA256, tmp_path).read_bytes() == CONTENT
    assert len(here.requests) == 4


def test_a_folder_that_cannot_be_written(here, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(Failure, match=r"a\.zip: cannot be written \(Not a directory\)"):
        fetch(here.url("a.zip"), SHA256, tmp_path / "file/below")


def test_in_a_copy_that_dvc_makes_archives_lie_in_the_repository(tmp_path, monkeypatch):
    assert archives.folder(tmp_path) == tmp_path / "data/archives"
    monkeypatch.setenv("DVC_ROOT", "/repository")
    assert str(archives.folder(tmp_path)) == "/repository/data/archives"


def pack(path, files, **more):
    """A zip, tar, tar.gz or folder of files, by the ending of its name; `more` are tar members without content."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.mkdir("b")
            for name, content in files.items():
                archive.writestr(name, content)
    elif path.suffix:
        with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
            folder = tarfile.TarInfo("b")
            folder.type = tarfile.DIRTYPE
            archive.addfile(folder)
            for name, content in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
            for name, kind in more.items():
                info = tarfile.TarInfo(name)
                info.type, info.linkname = kind, "../../etc/passwd"
                archive.addfile(info)
    else:
        for name, content in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
    return path


KINDS = ("a.zip", "a.tar", "a.tar.gz", "folder")


def read(path):
    with archives.open(path) as archive:
        return {name: b"".join(archive.chunks(name)) for name in archive.names()}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_reads_alike(tmp_path, kind):
    path = pack(tmp_path / kind, FILES)
    assert read(path) == FILES
    with archives.open(path) as archive:
        assert archive.text("a.txt") == "one line"
        names = list(archive.names())  # what a look-up has passed by is still among them
        assert names == (sorted(FILES) if kind == "folder" else list(FILES))
        assert list(archives.lines(archive.texts("b/two.txt"))) == ["zwei", "b\u00e4r"]
        assert list(archives.lines(archive.texts("empty.txt"))) == []
        assert [archive.size(name) for name in names] == [len(FILES[name]) for name in names]
        with pytest.raises(Failure, match=f"{kind}: has no file c.txt"):
            archive.text("c.txt")
        with pytest.raises(Failure, match=f"{kind}, b/one.bin: not UTF-8 at byte"):
            archive.text("b/one.bin")
    with pytest.raises(Failure, match=r"gone.*: not found"), archives.open(tmp_path / f"gone{''.join(path.suffixes)}"):
        pass


@pytest.mark.parametrize("kind", ["a.zip", "a.tar", "a.tar.gz"])
@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "a\\..\\..\\x"])
def test_names_that_lead_out_are_refused(tmp_path, kind, name):
    path = pack(tmp_path / kind, {"fine.txt": b"", name: b"gotcha"})
    with pytest.raises(Failure, match=f"{kind}: the name .*x leads out of the archive's folder") as caught:
        read(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["a.zip", "a.tar"])
def test_a_name_that_comes_twice_is_refused(tmp_path, kind):
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # of zipfile
        if kind == "a.zip":
            with zipfile.ZipFile(tmp_path / kind, "w") as archive:
                archive.writestr("x", "one")
                archive.writestr("x", "two")
        else:
            pack(tmp_path / kind, {"x": b"one"}, x=tarfile.REGTYPE)
    with pytest.raises(Failure, match=f"{kind}: holds x twice; fetch it from its source"):
        read(tmp_path / kind)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path, kind):
    with pytest.raises(Failure, match="x is a link or a device"):
        read(pack(tmp_path / "a.tar", FILES, x=kind))


def test_a_link_in_a_zip_is_refused(tmp_path):
    link = zipfile.ZipInfo("x")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(Failure, match="x is a link or a device"):
        read(tmp_path / "a.zip")


def test_no_more_is_read_than_is_declared(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb", bytes(10_000_000))
    directory = path.read_bytes()
    place = directory.rindex(b"PK\x01\x02") + 24
    path.write_bytes(directory[:place] + (1000).to_bytes(4, "little") + directory[place + 4 :])
    got = []
    with archives.open(path) as archive, pytest.raises(Failure, match="truncated or damaged"):
        got += archive.chunks("bomb")
    assert sum(map(len, got)) <= 1000


@pytest.mark.parametrize("kind", ["a.zip", "a.tar", "a.tar.gz"])
def test_truncated_archives_are_one_line(tmp_path, kind):
    files = {"a.txt": b"some text " * 300, "b.txt": CONTENT[:3000], "c.txt": b"more"}
    path = pack(tmp_path / kind, files)
    whole = path.read_bytes()
    assert read(path) == files
    # A tar ends with more blocks of zeros than it needs.
    end = len(whole.rstrip(b"\0")) if kind == "a.tar" else len(whole) - 1
    for length in [*range(0, end, 97), end]:
        path.write_bytes(whole[:length])
        with pytest.raises(Failure, match=f"{kind}: truncated or damaged") as caught:
            read(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["a.zip", "a.tar", "a.tar.gz"])
def test_damaged_archives_are_one_line_at_worst(tmp_path, kind):
    path = pack(tmp_path / kind, {"a.txt": b"some text " * 300, "b.txt": CONTENT[:3000]})
    whole, rng = path.read_bytes(), random.Random(1)
    caught = 0
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(rng.choice([1, 5, 50])):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            read(path)
        except Failure as failure:
            caught += 1
            assert "\n" not in str(failure)
    assert caught > 50


@given(st.binary(max_size=60), st.integers(1, 7))
def test_every_byte_comes_back(data, step):
    chunks = [data[i : i + step] for i in range(0, len(data), step)]
    assert b"".join(map(encoded, decoded(chunks, "data", exact=True))) == data


@given(st.text("ab \n\u00e4\u6f22\ufeff", max_size=60), st.integers(1, 7))
def test_stretches_cut_no_word_and_no_character(text, step):
    data = text.encode()
    texts = list(decoded([data[i : i + step] for i in range(0, len(data), step)], "data"))
    assert "".join(texts) == text.removeprefix("\ufeff")
    assert all(stretch[-1] in " \n" for stretch in texts[:-1])
    assert list(lines(texts)) == text.removeprefix("\ufeff").removesuffix("\n").split("\n") or not "".join(texts)


def test_the_first_byte_that_is_no_text_is_named():
    with pytest.raises(Failure, match=r"data: not UTF-8 at byte 9; convert it"):
        list(decoded([b"abc\n", b"def\nx\xe9"], "data"))


def test_lines_before_a_byte_that_is_no_text_come_first():
    found = []
    with pytest.raises(Failure, match="not UTF-8 at byte 13"):
        found.extend(lines(decoded([b"\xef\xbb\xbfabc\nd\xc3\xa9f\nx\xe9\nend\n"], "data")))
    assert found == ["abc", "d\u00e9f"]
