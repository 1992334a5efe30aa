import numpy as np

from pipeline.data.batches import evenly, segment_starts
from pipeline.data.tokenizers import Tokenizer
from pipeline.evaluation.records import Record
from pipeline.evaluation.text_bench import Numbered, TextBench
from pipeline.models.build import build
from pipeline.progress import Progress


def test_segments_say_which_document_they_begin_in(tiny_params, tiny_spec, seeded):
    settings, tokenizer = tiny_params("robustness.kinds=[swap]", "robustness.segments=7").robustness, Tokenizer.bytes()
    letters = np.random.default_rng(0).integers(97, 123, 1000).astype(np.uint16)
    test, other = Numbered(letters, np.array([0, 50, 300, 301, 700])), Numbered(letters[:200], np.array([0, 100]))
    model, record = build(tiny_spec("smoe", vocabulary=tokenizer.size)).eval(), Record("language", "router")
    with Progress("test", total=3, unit="test") as progress:
        bench = TextBench(settings, 32, "bytes", tokenizer, 0, progress)
        bench.language(model, "router", record, test, {"other": other})
    units = record.units
    for name, text in (("language", test), ("language/other", other)):
        naive = [sum(first <= start for first in text.documents) - 1 for start in segment_starts(text.tokens, 32, 7)]
        assert units[f"{name}/groups"].tolist() == naive
    assert set(units["language/groups"].tolist()) == {0, 1, 3, 4} and set(units["language/other/groups"].tolist()) == {0, 1}
    attacked = units["language/attack/groups"]
    assert attacked.tolist() == units["language/groups"][evenly(7, settings.attack_texts)].tolist()
    for name, kind in (("language", "swap/0.05"), ("language/attack", "greedy/0.1"), ("language/other", "other/0.0")):
        assert units[f"language/router/{kind}/lost"].shape == units[f"{name}/groups"].shape
