import json

import numpy as np
import pytest

from pipeline.data.corpora import SPLITS
from pipeline.data.tokenizers import Tokenizer
from pipeline.files import digest
from stages import prepare
from stages.paths import SECTIONS, Paths


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
        f"data.task={task_file}",
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
    assert written == {"train.npy", "valid.npy", "test.npy", "tokenizer.json", "task.jsonl"} | (
        {"raw.npy"} if (view, kind) == ("text27", "bytes") else set()
    )
    assert manifest["sha256"] == {name: digest(paths.data / name) for name in written}
    assert manifest["examples"] == {"train": 24, "valid": 8, "test": 12}
    assert manifest["labels"]["test"] == {"first": 6, "second": 6}
    tokenizer = Tokenizer.load(paths.data / "tokenizer.json")
    assert tokenizer.kind == kind
    # <eos>, <unk> and the ten words and "follows" with and without their dots; five entries; 300; and the pad token.
    assert manifest["ids"] == tokenizer.size == {"words": vocabulary or 23, "bpe": 300, "bytes": 256, "characters": 27}[kind] + 1
    for split in SPLITS:
        ids = np.load(paths.data / f"{split}.npy")
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
