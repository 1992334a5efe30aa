import math

import pytest

from pipeline.errors import Failure
from pipeline.files import digest, nearest_path, output_file, output_folder, read_json, write_json


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


def test_reading_what_is_not_there_or_damaged(tmp_path):
    with pytest.raises(Failure, match="not found; do this"):
        read_json(tmp_path / "a.json", "do this")
    (tmp_path / "a.json").write_text('{"a": ')
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
