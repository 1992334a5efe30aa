import errno
import fcntl
import json
import os

import pytest

from pipeline.tracking.journal import Journal, Sent, claim


def _written(folder, count=3, key="key"):
    journal = claim(folder, key, resumed=False)
    journal.append({"op": "create", "id": f"offline-{key}", "time": 1})
    for number in range(count):
        journal.append({"op": "log", "time": 2 + number, "step": number, "values": {"a": 0.5}})
    return journal


def _steps(journal):
    return [operation["step"] for _, operation in journal.operations(0) if operation["op"] == "log"]


@pytest.mark.parametrize("torn", [b'{"op": "log", "ti', b"\0\0\0\0", b'\0\0"a": 1}}\n'])
def test_a_torn_last_line_is_lost_and_nothing_else(tmp_path, torn):
    journal = _written(tmp_path)
    journal.close()
    with open(journal.path, "ab") as file:
        file.write(torn)
    again = claim(tmp_path, "key", resumed=True)
    again.append({"op": "log", "time": 9, "step": 9, "values": {}})
    assert _steps(again) == [0, 1, 2, 9]
    assert [json.loads(line)["op"] for line in journal.path.read_text().splitlines()] == ["create"] + 4 * ["log"]


def test_lines_longer_than_a_block_are_read_whole_and_from_where_reading_stopped(tmp_path):
    journal = _written(tmp_path, count=1)
    journal.append({"op": "log", "time": 3, "step": 7, "values": {}, "long": "x" * 3_000_000})
    journal.append({"op": "log", "time": 3, "step": 8, "values": {}})
    found = list(journal.operations(0))
    assert [operation.get("step") for _, operation in found] == [None, 0, 7, 8]
    assert [operation["step"] for _, operation in journal.operations(found[2][0])] == [8]
    assert found[-1][0] == journal.path.stat().st_size


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    journal = _written(tmp_path)
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, line: write(descriptor, line[:5]))
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        journal.append({"op": "log", "time": 5, "step": 3, "values": {}})
    monkeypatch.setattr(os, "write", write)
    journal.append({"op": "log", "time": 6, "step": 4, "values": {}})
    assert _steps(journal) == [0, 1, 2, 4]


def test_lines_that_were_sent_but_lost_do_not_hide_new_ones(tmp_path):
    journal = _written(tmp_path)
    journal.mark(Sent("run", journal.path.stat().st_size))
    journal.close()
    lines = journal.path.read_bytes().splitlines(keepends=True)
    journal.path.write_bytes(b"".join(lines[:2]) + lines[2][:10])
    again = claim(tmp_path, "key", resumed=True)
    again.append({"op": "log", "time": 9, "step": 5, "values": {}})
    sent = again.sent()
    assert sent.run_id == "run"
    assert [operation["step"] for _, operation in again.operations(sent.offset)] == [5]


def test_a_damaged_mark_means_that_nothing_is_known_to_be_sent(tmp_path):
    journal = _written(tmp_path)
    (tmp_path / "offline-key.sent.json").write_text('{"run_id": "ru')
    assert journal.sent() == Sent("", 0)


def test_the_journal_of_a_run_that_lives_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.tracking.journal.CLAIM_SECONDS", 0.1)
    journal = _written(tmp_path)
    assert Journal.open(journal.path) is None
    other = claim(tmp_path, "key", resumed=True)
    assert other.path.name.startswith("key~")
    assert other.empty
    assert _steps(journal) == [0, 1, 2]


def test_a_run_goes_on_while_its_journal_is_being_sent(tmp_path):
    _written(tmp_path).close()
    sending = Journal.open(tmp_path / "key.jsonl")
    sending.close_dead()
    sending.mark(Sent("run", sending.path.stat().st_size))
    assert sending.share()
    going_on = claim(tmp_path, "key", resumed=True)
    assert going_on.path == sending.path
    going_on.append({"op": "resume", "time": 9, "tags": {}})
    assert not going_on.hold(wait=False)
    sending.settle(forget=True)
    assert sending.path.exists()
    sending.close()
    assert going_on.hold(wait=False)
    assert [operation["op"] for _, operation in going_on.operations(going_on.sent().offset)] == ["resume"]


def test_another_run_of_the_key_takes_the_place_of_one_that_is_being_sent(tmp_path):
    _written(tmp_path).close()
    sending = Journal.open(tmp_path / "key.jsonl")
    assert sending.share()
    new = claim(tmp_path, "key", resumed=False)
    assert new.path.name == "key.jsonl"
    assert new.empty
    *_, (_, last) = sending.operations(0)
    assert (last["op"], last["status"], last["time"]) == ("end", "KILLED", 4)
    sending.remove()
    assert sorted(path.name for path in tmp_path.iterdir())[0] == "key.jsonl"


@pytest.mark.parametrize(
    ("status", "resumed", "goes_on"),
    [("KILLED", True, True), ("FAILED", True, True), ("FINISHED", True, False), ("KILLED", False, False)],
)
def test_which_run_goes_on(tmp_path, status, resumed, goes_on):
    journal = _written(tmp_path)
    journal.append({"op": "end", "time": 9, "status": status})
    journal.close()
    again = claim(tmp_path, "key", resumed)
    assert again.empty != goes_on
    assert len(list(tmp_path.glob("*.jsonl"))) == (1 if goes_on else 2)


def test_kept_files_outlast_their_replacement(tmp_path):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub/weights").write_text("old")
    journal = _written(tmp_path / "spool")
    kept = journal.keep(folder)
    single = journal.keep(folder / "sub/weights")
    (folder / "new").write_text("new")
    os.replace(folder / "new", folder / "sub/weights")
    assert (journal.kept(kept) / "sub/weights").read_text() == "old"
    assert journal.kept(single).read_text() == "old"
    assert journal.kept(single).name == "weights"
    journal.remove()
    assert list((tmp_path / "spool").iterdir()) == []


def test_files_that_cannot_be_linked_are_copied(tmp_path, monkeypatch):
    def refuse(*arguments, **more):
        raise OSError(errno.EXDEV, "another device")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "table.csv").write_text("a,b")
    journal = _written(tmp_path / "spool")
    assert journal.kept(journal.keep(tmp_path / "table.csv")).read_text() == "a,b"


def test_a_journal_that_was_removed_meanwhile_is_made_anew(tmp_path, monkeypatch):
    journal = _written(tmp_path)
    lock = fcntl.flock

    def removed_first(descriptor, how):
        monkeypatch.setattr(fcntl, "flock", lock)
        journal.remove()
        journal.close()
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", removed_first)
    new = Journal.open(tmp_path / "key.jsonl")
    new.append({"op": "create", "id": "b", "time": 1})
    assert json.loads((tmp_path / "key.jsonl").read_text())["id"] == "b"
