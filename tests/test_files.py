import math
import os
from pathlib import Path

import pytest

from pipeline.errors import Failure
from pipeline.files import digest, locked, nearest_path, output_file, output_folder, read_json, write_json


def test_paths_are_suggested_by_the_name_that_is_wrong(tmp_path):
    (tmp_path / "corpora/english/novels").mkdir(parents=True)
    (tmp_path / "corpora/english/novels/emma.txt").touch()
    (tmp_path / "corpora/english/novels/mobydick.txt").touch()
    for path, suggested in {
        "corpora/english/novels/emna.txt": "corpora/english/novels/emma.txt",
        "corpora/english/novels/xyz.csv": "",
        "corpora/englisch/novels/emma.txt": "corpora/english",
        "copora/train.txt": "corpora",
        "copora": "corpora",
        "sotuu": "sotu",
        "corpora/sotuu": "",
        tmp_path / "copora": f"{tmp_path}/corpora",
        "a\0b": "",
    }.items():
        assert nearest_path(path, tmp_path, ["sotu"]) == (f" (did you mean {suggested}?)" if suggested else ""), path
    (tmp_path / "corpora/english/novels").chmod(0)
    nearest_path("corpora/english/novels/emna.txt", tmp_path)
    nearest_path("a" * 300 + "/b", tmp_path)


def test_what_is_there_is_not_suggested_and_a_link_to_nothing_is_named(tmp_path):
    (tmp_path / "a.txt").symlink_to("gone.txt")
    said = " (a.txt is a link to gone.txt, where nothing is; mend it)"
    assert nearest_path("a.txt", tmp_path) == said and nearest_path("a.txt/b", tmp_path) == said
    # As of a folder whose names can be listed and no more.
    (tmp_path / "b.txt").touch()
    assert nearest_path("b.txt", tmp_path) == " (did you mean a.txt?)"


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"x": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"x": math.nan})
    with pytest.raises(RuntimeError), output_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert read_json(path, "") == {"x": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_folder_leaves_the_old_one_and_a_good_one_replaces_it(tmp_path):
    path = tmp_path / "f"
    with output_folder(path) as folder:
        (folder / "old").write_text("1")
    with pytest.raises(RuntimeError), output_folder(path) as folder:
        (folder / "new").write_text("2")
        raise RuntimeError
    assert [p.name for p in path.iterdir()] == ["old"]
    with output_folder(path) as folder:
        (folder / "new").write_text("2")
    assert [p.name for p in path.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [path]


def test_unwritable_is_one_line_and_other_errors_keep_their_name(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Failure, match="cannot be written"), output_folder(tmp_path / "file/x"):
        pass
    with pytest.raises(FileNotFoundError), output_folder(tmp_path / "f"):
        open(tmp_path / "elsewhere")
    long = tmp_path / ("a" * 250)
    with pytest.raises(Failure, match=r"a: cannot be written \(File name too long\)"), output_file(long) as file:
        file.write_text("")
    with pytest.raises(Failure, match=r"a: cannot be written \(File name too long\)"), output_folder(long):
        pass


def test_what_is_no_file_or_no_folder_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    (tmp_path / "file").write_text("1")
    (tmp_path / "folder").mkdir()
    (tmp_path / "round").symlink_to("round")
    before = sorted(tmp_path.iterdir())
    for writing, names in ((output_file, ("pipe", "link", "folder", "round", ".")), (output_folder, ("pipe", "link", "file"))):
        for name in names:
            with pytest.raises(Failure, match="is there already and is no f"), writing(tmp_path / name):
                raise AssertionError("the body has begun")
    reading, writing = os.pipe()
    with pytest.raises(Failure, match="is there already and is no file"), output_file(f"/proc/self/fd/{writing}"):
        pass
    os.close(reading), os.close(writing)
    assert sorted(tmp_path.iterdir()) == before and (tmp_path / "pipe").is_fifo()


def test_links_stay_and_what_they_lead_to_is_replaced(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real/file").write_text("old")
    (tmp_path / "real/folder").mkdir()
    for name in ("file", "folder", "new"):
        (tmp_path / name).symlink_to(f"real/{name}")
    for name in ("file", "new"):
        with output_file(tmp_path / name) as file:
            file.write_text("1")
    with output_folder(tmp_path / "folder") as folder:
        (folder / "a").write_text("1")
    assert [(tmp_path / name).read_text() for name in ("real/file", "real/new", "real/folder/a")] == ["1"] * 3
    assert all((tmp_path / name).is_symlink() for name in ("file", "folder", "new"))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "file", "file", "folder", "folder", "new", "new", "real"]


def test_a_link_into_dvc_s_cache_is_replaced_and_the_cache_kept(tmp_path):
    (tmp_path / "cached").write_text("old")
    (tmp_path / "cached").chmod(0o444)
    (tmp_path / "report.md").symlink_to("cached")
    with output_file(tmp_path / "report.md") as file:
        file.write_text("new")
    assert (tmp_path / "cached").read_text() == "old"
    assert (tmp_path / "report.md").read_text() == "new" and not (tmp_path / "report.md").is_symlink()


def test_the_current_folder_gets_the_files(tmp_path, monkeypatch):
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)
    inode = place.stat().st_ino
    with output_folder(Path(".")) as folder:
        (folder / "a/b").mkdir(parents=True)
        (folder / "c").write_text("1")
    assert sorted(os.listdir()) == ["a", "c"] and place.stat().st_ino == inode and os.listdir(tmp_path) == ["here"]


def test_a_lock_that_is_taken_or_cannot_be_written_is_one_line(tmp_path):
    with locked(tmp_path / "a/.lock", 0, "taken"):
        with pytest.raises(Failure, match="taken"), locked(tmp_path / "a/.lock", 0, "taken"):
            pass
    with pytest.raises(TimeoutError, match="of the body"), locked(tmp_path / "a/.lock", 0, "taken"):
        raise TimeoutError("of the body")
    (tmp_path / "file").write_text("")
    (tmp_path / "b/.lock").mkdir(parents=True)
    for folder in ("file", "file/a", "b"):
        with pytest.raises(Failure, match=rf"/{folder}: cannot be written \("), locked(tmp_path / folder / ".lock", 0, "taken"):
            pass


def test_reading_what_is_not_there_or_damaged(tmp_path):
    with pytest.raises(Failure, match="not found; do this"):
        read_json(tmp_path / "a.json", "do this")
    for text in ('{"a": ', "[" * 100_000):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(Failure, match="cannot be read as JSON"):
            read_json(tmp_path / "a.json", "do this")


def test_digest_of_a_folder_sees_names_and_contents(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d/a").write_text("1")
    before = digest(tmp_path / "d")
    (tmp_path / "d/a").rename(tmp_path / "d/b")
    renamed = digest(tmp_path / "d")
    (tmp_path / "d/b").write_text("2")
    assert len({before, renamed, digest(tmp_path / "d")}) == 3


def test_a_kill_between_the_renames_of_a_folder_loses_nothing(tmp_path):
    """The folder before was already aside, the new one not yet in its place."""
    before, half = tmp_path / ".out.999999999.old", tmp_path / ".out.999999999.tmp"
    for folder, text in ((before, "good"), (half, "half")):
        folder.mkdir()
        (folder / "file").write_text(text)
    (tmp_path / ".out.notes.tmp").write_text("of somebody else")
    with pytest.raises(RuntimeError), output_folder(tmp_path / "out"):
        raise RuntimeError
    assert (tmp_path / "out/file").read_text() == "good"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.notes.tmp", "out"]


def test_a_file_that_changed_has_another_digest(tmp_path):
    path = tmp_path / "file"
    path.write_text("one")
    before = digest(path)
    path.write_text("two")
    assert digest(path) != before
