import json

import numpy as np
import pytest

from pipeline.data.corpora import SPLITS
from pipeline.data.tokenizers import Tokenizer
from pipeline.files import digest
from stages import prepare
from stages.paths import SECTIONS, Paths


@pytest.mark.parametrize("view", ["text27", "bytes"])
def test_the_manifest_describes_what_was_written(tiny_params, corpus_folder, task_file, tmp_path, view):
    params = tiny_params(f"data.corpus={corpus_folder}", f"data.task={task_file}", f"data.view={view}")
    paths = Paths(tmp_path, tmp_path / "out")
    returned = prepare.run(params.select(SECTIONS["prepare"]), paths)
    manifest = json.loads((paths.data / "manifest.json").read_text())
    assert {key: manifest[key] for key in ("corpus", "view", "task")} == params.data.model_dump()
    written = {path.name for path in paths.data.iterdir()} - {"manifest.json"}
    assert written == {"train.npy", "valid.npy", "test.npy", "tokenizer.json", "task.jsonl"} | (
        {"raw.npy"} if view == "text27" else set()
    )
    assert manifest["sha256"] == {name: digest(paths.data / name) for name in written}
    assert manifest["examples"] == {"train": 24, "valid": 8, "test": 12}
    assert manifest["labels"]["test"] == {"first": 6, "second": 6}
    tokenizer = Tokenizer.load(paths.data / "tokenizer.json")
    for split in SPLITS:
        text = tokenizer.decode(np.load(paths.data / f"{split}.npy"))
        original = (corpus_folder / f"{split}.txt").read_text()
        assert text == (original if view == "bytes" else original.replace(".", ""))
        assert manifest["tokens"][split] == manifest["characters"][split] == len(text)
    assert manifest["references"] == returned["references"]
    assert set(manifest["references"]["bits_per_character"]) == {"gzip", "bz2", "xz", "unigram"}
