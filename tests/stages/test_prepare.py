import json

import numpy as np
import pytest

from pipeline.data.batches import open_documents, open_tokens
from pipeline.data.corpora import SPLITS
from pipeline.data.tokenizers import Tokenizer
from pipeline.errors import Failure
from pipeline.files import digest
from stages import prepare
from stages.paths import SECTIONS, Paths
from tests.data.server import HELD_OUT, TRAINING, billion, wikitext, zipped


@pytest.mark.parametrize(
    ("view", "kind", "vocabulary"),
    [
        ("text27", "bytes", 0),
        ("bytes", "bytes", 0),
        ("text27", "characters", 0),
        ("bytes", "words", 0),
        ("text27", "words", 5),
        ("bytes", "bpe", 300),
    ],
)
def test_the_manifest_describes_what_was_written(tiny_params, corpus_folder, task_file, tmp_path, view, kind, vocabulary):
    params = tiny_params(
        f"data.corpus={corpus_folder}",
        f"data.tasks={{toy: {task_file}}}",
        f"data.shifts={{other: {corpus_folder}}}",
        f"data.view={view}",
        f"data.tokenizer={kind}",
        f"data.vocabulary={vocabulary}",
        "robustness.kinds=[swap]",
    )
    paths = Paths(tmp_path, tmp_path / "out")
    returned = prepare.run(params.select(SECTIONS["prepare"]), paths)
    manifest = json.loads((paths.data / "manifest.json").read_text())
    assert {key: manifest[key] for key in type(params.data).model_fields} == params.data.model_dump()
    written = {path.name for path in paths.data.iterdir()} - {"manifest.json"}
    assert written == {"source", "tasks", "shifts"}
    assert [path.name for path in (paths.data / "tasks").iterdir()] == ["toy"]
    shifts = {"other", *(("raw",) if (view, kind) == ("text27", "bytes") else ())}
    names = {f"{name}{end}" for name in shifts for end in (".npy", ".documents.npy")}
    assert {path.name for path in (paths.data / "shifts").iterdir()} == names
    # The shift is to the same corpus here.
    assert (paths.data / "shifts/other.npy").read_bytes() == (paths.source / "test.npy").read_bytes()
    files = {path.relative_to(paths.data).as_posix(): path for path in paths.data.rglob("*") if path.is_file()}
    assert manifest["sha256"] == {name: digest(path) for name, path in files.items() if name != "manifest.json"}
    assert manifest["examples"] == {"toy": {"train": 24, "valid": 8, "test": 12}}
    assert manifest["labels"]["toy"]["test"] == {"first": 6, "second": 6}
    assert set(manifest["references"]["tasks"]["toy"]) == {"accuracy", "macro_f1", "majority"}
    tokenizer = Tokenizer.load(paths.source / "tokenizer.json")
    assert tokenizer.kind == kind
    # <eos>, <unk> and the ten words and "follows" with and without their dots; five entries; 300; and the pad token.
    assert manifest["ids"] == tokenizer.size == {"words": vocabulary or 23, "bpe": 300, "bytes": 256, "characters": 27}[kind] + 1
    for split in SPLITS:
        ids = np.load(paths.source / f"{split}.npy")
        assert ids.dtype == tokenizer.dtype == np.uint16
        assert manifest["tokens"][split] == len(ids)
        original = (corpus_folder / f"{split}.txt").read_text()
        text = original if view == "bytes" else original.replace(".", "")
        assert manifest["characters"][split] == len(text)
        if vocabulary != 5:
            assert tokenizer.decode(ids) == text
        assert (len(ids) == len(text)) is (kind in ("bytes", "characters"))
        assert (len(ids) == len(text.split())) is (kind == "words")
    assert manifest["references"] == returned["references"]
    for scores in ("bits_per_character", *(("perplexity",) if tokenizer.unit == "perplexity" else ())):
        assert set(manifest["references"][scores]) == {"gzip", "bz2", "xz", "unigram"}
    assert ("perplexity" in manifest["references"]) is (kind in ("words", "bpe"))


def _prepare(tiny_params, task_file, tmp_path, corpus, view="bytes"):
    params = tiny_params(f"data.corpus={corpus}", f"data.tasks={{toy: {task_file}}}", "data.shifts={}", f"data.view={view}")
    paths = Paths(tmp_path, tmp_path / "out")
    counts = prepare.run(params.select(SECTIONS["prepare"]), paths)
    assert {path.name for path in (tmp_path / "out/outputs").iterdir()} == {"data"}
    return counts, {split: bytes(open_tokens(paths.source / f"{split}.npy").astype(np.uint8)) for split in SPLITS}


@pytest.mark.parametrize("view", ["bytes", "text27"])
def test_places_of_documents_are_where_they_begin(tiny_params, task_file, tmp_path, view):
    texts = ["one two", "three ", "\u6f22", " four\n", "five 6 seven", "..."]
    lines = [{"text": text, "split": split} for split in SPLITS for text in texts]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, lines)))
    counts, written = _prepare(tiny_params, task_file, tmp_path, "c.jsonl", view)
    folder = tmp_path / "out/outputs/data/source"
    places = open_documents(folder / "test.documents.npy").tolist()
    parts = [written["test"][first:last] for first, last in zip(places, [*places[1:], None], strict=True)]
    # A document of which the view leaves nothing is none; an end of a line, or a blank, lies before the next.
    kept = [text for text in texts if view == "bytes" or text not in ("\u6f22", "...")]
    seen = [text.replace("6", "six") if view == "text27" else text for text in kept]
    assert [part.decode().strip() for part in parts] == [text.strip() for text in seen]
    assert counts["documents"]["test"] == len(texts)
    assert not (folder / "train.documents.npy").exists()


def test_half_a_character_of_enwik8_is_its_bytes(tiny_params, task_file, tmp_path, publish):
    content = b"<page>" * 300 + b"y" * 99 + "\u6f22".encode() + b"z" * 98
    publish("enwik8", zipped({"enwik8": content}))
    counts, written = _prepare(tiny_params, task_file, tmp_path, "enwik8")
    assert written == {"train": content[:1800], "valid": content[1800:1900], "test": content[1900:]}
    assert written["valid"][-1:] + written["test"][:2] == "\u6f22".encode()
    assert counts["documents"] == {"train": 1, "valid": 1, "test": 1}
    assert counts["characters"] == counts["tokens"] == {"train": 1800, "valid": 100, "test": 100}


@pytest.mark.parametrize("view", ["bytes", "text27"])
def test_text8_is_its_own_view(tiny_params, task_file, tmp_path, publish, view):
    content = b" ab cd" * 500
    publish("text8", zipped({"text8": content}))
    _, written = _prepare(tiny_params, task_file, tmp_path, "text8", view)
    assert written == {"train": content[:2700], "valid": content[2700:2850], "test": content[2850:]}


def test_wikitext_and_one_billion_words(tiny_params, task_file, tmp_path, publish):
    contents = {split: f" \n = {split} = \n \n a <unk> of 1 @,@ 000 \n" * 5 for split in SPLITS}
    publish("wikitext-103", wikitext(contents))
    _, written = _prepare(tiny_params, task_file, tmp_path, "wikitext-103")
    assert written == {split: content.encode() for split, content in contents.items()}
    publish("lm1b", billion({name: f"It is in {name} .\n".encode() for name in (*TRAINING, *HELD_OUT)}))
    counts, written = _prepare(tiny_params, task_file, tmp_path, "lm1b")
    assert written["test"] == f"It is in {HELD_OUT[1]} .\n".encode()
    assert written["train"].count(b"\n") == counts["documents"]["train"] == 99


def test_a_view_that_leaves_nothing_is_named(tiny_params, task_file, tmp_path):
    lines = [{"text": "abc" if split == "train" else "\u6f22\u5b57", "split": split} for split in SPLITS]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(Failure, match=r"data\.view text27 leaves nothing of the valid split.*use data\.view: bytes"):
        _prepare(tiny_params, task_file, tmp_path, "c.jsonl", "text27")
    assert list((tmp_path / "out/outputs").iterdir()) == []
