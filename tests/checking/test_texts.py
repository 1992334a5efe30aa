import gzip
import re
import tracemalloc

import pytest

from pipeline.checking import check
from pipeline.checking.texts import CONTEXT
from tests.checking.conftest import json_lines, rows, text


def warned(found, words):
    return any(re.search(words, warning) for warning in found.warnings)


def split_rows(train=300, valid=60, test=500):
    given = ("train",) * train + ("valid",) * valid + ("test",) * test
    return [row | {"split": split} for row, split in zip(rows(len(given)), given, strict=True)]


def test_a_task_without_fault_is_not_warned_of(checked):
    found = checked("a.jsonl", json_lines(split_rows()))
    assert found.warnings == [] and found.problem is None
    assert found.facts["splits"]["valid"]["texts"] == 60
    assert found.facts["classes"]["l0"] == {"train": 150, "valid": 30, "test": 250}
    assert found.facts["empty"] == 0 and set(found.facts["duplicates"].values()) == {0}


@pytest.mark.parametrize("view", ["text27", "bytes"])
def test_what_repeats_is_counted_as_the_view_has_it(checked, view):
    found = split_rows()
    found[1]["text"] = found[0]["text"]
    for i in range(20):
        found[300 + i] = found[i] | {"split": "valid"}
        # To text27 these are no other texts.
        found[360 + i] = found[i] | {"text": found[i]["text"].upper() + "!", "split": "test"}
    more = "" if view == "text27" else "\u00e4\u00f6\u00fc"
    found = checked("a.jsonl", json_lines(row | {"text": row["text"] + more} for row in found))
    assert found.params["data"]["view"] == view
    repeated = found.facts["duplicates"]
    assert repeated["train"] == 1 and repeated["valid in train"] == 20
    assert repeated["test in train"] == (20 if view == "text27" else 0)
    where = r"line 301 \(train: line 1\), line 302 \(train: line 1\), line 303 \(train: line 3\)$"
    assert warned(found, rf"20 texts of valid \(33\.3 %\) are in train too: .*, such as {where}")
    only = r"20 texts of test \(4\.0 %\) are in train too \(20 of them only in the view text27, without case, signs and spacing\)"
    assert warned(found, only) is (view == "text27")
    # The first two have the same text and two labels; so have their copies, where capitals count.
    assert warned(found, f"texts under several labels: {1 if view == 'text27' else 2};")


def test_lines_of_a_text_that_repeat(checked):
    lines = [text(37 * i + 10**7) for i in range(1000)]
    found = checked("a.txt", "\n".join([*lines, "short line", *lines[:100], "short line"]))
    assert found.facts["lengths"]["of"] == "lines of 40 characters and more" and found.facts["lengths"]["characters"]["min"] >= 40
    assert found.facts["duplicates"]["train"] == 0
    # But for a line that a border cuts in two.
    assert 99 <= sum(found.facts["duplicates"][key] for key in ("valid in train", "test in train")) <= 100
    assert warned(found, r"lines of 40 characters and more of .* are in train too: .* such as 'alpha [a-z ]{34}\.\.\.'")


def test_documents_that_repeat_have_their_names(root):
    for split in ("train", "test"):
        for i in range(20):
            path = root / f"data/mine/{split}/{i:02}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("" if i < 2 else f"{split} " * (i != 7) + text(37 * i + 10**7) * 3)
    found = check(root / "data/mine", root)
    assert warned(found, r"1 documents of test .* such as test/07\.txt \(train: train/07\.txt\)$")


def test_classes_that_are_few_large_or_untested(checked):
    found = split_rows(2000)
    found = [row | {"label": "rare" if i == 7 else "l0" if i % 50 else "l1"} for i, row in enumerate(found)]
    found = checked("a.jsonl", json_lines(found))
    assert warned(found, "1 class has under 10 texts in train, such as 'rare' with 1: too few")
    assert warned(found, r"1 class of train is not in valid \('rare'\), so the model .* by a field 'split' in the file")
    assert warned(found, r"1 class of train is not in test \('rare'\), so no score is about it")
    assert warned(found, r"always answering 'l0' is right in 98\.0 % of test; read macro-F1")
    assert warned(
        checked("b.jsonl", json_lines(split_rows(test=50))),
        r"test has 50 texts, .* within 14 points \(95 %\); give it more, by a",
    )


def test_groups_on_both_sides(checked):
    found = [row | {"group": f"{row['split'][:1]}{i // 10}"} for i, row in enumerate(split_rows())]
    assert not warned(checked("a.jsonl", json_lines(found)), "groups of test are in train")
    found[-1]["group"] = found[0]["group"]
    assert warned(checked("a.jsonl", json_lines(found)), "1 of 51 groups of test are in train too, such as 't0'")


def test_texts_of_a_group_tell_no_more_than_one(checked):
    found = [row | {"group": f"{row['split']}{i % 25}"} for i, row in enumerate(split_rows())]
    done = checked("a.jsonl", json_lines(found))
    assert [done.facts["splits"][split]["groups"] for split in ("train", "valid", "test")] == [25, 25, 25]
    assert warned(done, r"test has 500 texts of 25 groups, .* within 20 points \(95 %\) if .* more groups, by a field 'split'")
    del found[-1]["group"]
    assert warned(checked("a.jsonl", json_lines(found)), "1 texts of test have no group: intervals then take none for alike")
    done = checked("a.jsonl", json_lines(row | {"group": f"{i}"} for i, row in enumerate(split_rows(test=50))))
    assert warned(done, "test has 50 texts, which tell")
    assert "groups" not in checked("a.jsonl", json_lines(split_rows())).facts["splits"]["test"]


@pytest.mark.parametrize(
    ("content", "view"),
    [
        ("An old caf\u00e9 in the town, where nothing ever happens to anybody. " + "It is only a town. " * 20, "text27"),
        ("Sch\u00f6ne Gr\u00fc\u00dfe an alle, die f\u00fcr uns da waren. ", "bytes"),
        ("\u6f22\u5b57\u304b\u306a ", "bytes"),
        ("{[(<*>)]} += x; ", "bytes"),
    ],
)
def test_the_view_is_that_which_loses_little(checked, content, view):
    found = checked("a.txt", content * 400)
    assert found.params["data"]["view"] == view
    lost = found.facts["view"]
    assert 0 <= lost["letters lost by text27"] <= 1 and 0 <= lost["characters lost by text27"] <= 1
    letters = [c for c in content if c.isalpha()]
    beyond = sum(not c.isascii() for c in letters)
    assert lost["letters lost by text27"] == pytest.approx(beyond / len(letters))
    assert ("data.view" in found.notes) is (view == "bytes")


def test_characters_that_are_no_text(checked):
    found = checked("a.txt", "some words of text\x00\x07\u0085\ufffd, and more of it\n" * 100)
    assert found.facts["control characters"] == {"U+0000": 100, "U+0007": 100, "U+0085": 100}
    assert warned(found, "control characters") and warned(found, r"100 characters were lost in an earlier conversion \(U\+FFFD\)")
    assert warned(checked("b.txt", ("words of it " * 100).encode("utf-16-le")), "iconv -f UTF-16LE")


def test_texts_that_the_view_leaves_empty(checked):
    found = split_rows()
    found[3]["text"], found[5]["text"] = "???", "!"
    found = checked("a.jsonl", json_lines(found))
    assert found.facts["empty"] == 2
    assert warned(found, "2 texts have nothing that the view text27 keeps")
    assert found.facts["duplicates"]["train"] == 0


@pytest.mark.parametrize(
    ("words", "context", "crop", "holding"), [(8, 64, 64, None), (20, 128, 128, None), (100, CONTEXT, 128, 1024)]
)
def test_the_context_is_the_smallest_that_holds_nearly_all(checked, words, context, crop, holding):
    given = [row | {"text": (row["text"] + " ") * (words // 8)} for row in split_rows()]
    found = checked("a.jsonl", json_lines(given))
    assert found.params["model"] == {"context": context, "evaluate_context": context}
    assert found.params["finetune"] == {"crop": crop}
    assert warned(found, "are longer than") is (holding is not None)
    if holding:
        assert warned(
            found, rf"100\.0 % of the texts are longer than 256 .* model\.context: {holding} .* {holding // 256} times as long"
        )


def test_a_small_split_has_room_for_the_context(checked):
    found = checked("a.jsonl", json_lines(split_rows(300, 1, 300)))
    tokens = found.facts["splits"]["valid"]["tokens"]
    assert tokens // 2 <= found.params["model"]["context"] < tokens


def test_many_texts_are_pre_trained_on_and_few_are_not(checked):
    found = checked("a.jsonl", json_lines(split_rows()))
    assert found.params["data"]["corpus"] == "sotu" and "few" in found.notes["data.corpus"]
    found = checked("b.jsonl", json_lines(row | {"text": row["text"] * 100} for row in split_rows()))
    assert found.params["data"]["corpus"] == "data/b.jsonl"
    assert warned(checked("c.txt", "a few words\n" * 100), "bytes: pre-training reads them again and again")


def test_a_large_corpus_is_not_in_memory(checked):
    line, peaks = " ".join(text(i) for i in range(200)), []
    for count in (500, 1500):
        content = gzip.compress("\n".join(f"{i} {line}" for i in range(count)).encode(), 1)
        tracemalloc.start()
        found = checked("a.txt.gz", content)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert sum(split["characters"] for split in found.facts["splits"].values()) > 9000 * count
        assert found.facts["duplicates"]["train"] == 0
    assert peaks[1] < 1.2 * peaks[0]
