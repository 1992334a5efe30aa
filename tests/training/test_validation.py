import math
from collections import Counter

import numpy as np
import pytest
import torch

from pipeline.models.build import build
from pipeline.training import validation
from pipeline.training.validation import RoutingTally, bits_per_character, classify


@pytest.fixture
def model(tiny_spec, seeded):
    return build(tiny_spec("vqmoe")).eval()


@pytest.fixture
def segments():
    return np.random.default_rng(0).integers(0, 50, (7, 13)).astype(np.uint16)


def test_bits_per_character_is_the_mean_over_all_positions_whatever_the_batches(model, segments, monkeypatch):
    naive = []
    for row in segments.astype(int):
        logits = model.logits(model(torch.tensor(row[None, :-1]), "both").state_BTD)[0].detach()
        naive += [
            math.log2(sum(math.exp(value) for value in logits[t].tolist())) - logits[t, target].item() / math.log(2)
            for t, target in enumerate(row[1:])
        ]
    for batch in (1, 3, 32):
        monkeypatch.setattr(validation, "BATCH", batch)
        assert bits_per_character(model, segments, "both") == pytest.approx(np.mean(naive), rel=1e-5)


def test_the_tally_counts_every_assignment_over_batches(model, segments, monkeypatch):
    monkeypatch.setattr(validation, "BATCH", 3)
    tally, seen = RoutingTally(model), []
    bits_per_character(model, segments, "both", watch=lambda hidden: (tally(hidden), seen.append(hidden.layers)))
    for layer in range(len(model.blocks)):
        experts = Counter(int(i) for layers in seen for i in layers[layer].index_NK.flatten())
        codes = Counter(int(i) for layers in seen for i in layers[layer].code_N)
        assert sum(experts.values()) == 7 * 12 * 2
        assert tally.expert_shares()[layer].tolist() == [experts[e] / (7 * 12 * 2) for e in range(4)]
        assert tally.code_shares()[layer].tolist() == [codes[c] / (7 * 12) for c in range(4)]
    errors = [layer.losses["codebook"].value.item() for layers in seen for layer in layers]
    assert tally.summary()["code_error"] == pytest.approx(np.mean(errors))
    assert 0 < tally.summary()["code_utilisation"] <= 1


def test_a_router_has_no_codes(tiny_spec, segments, seeded):
    model = build(tiny_spec("smoe"))
    tally = RoutingTally(model)
    bits_per_character(model.eval(), segments, "router", watch=tally)
    assert tally.code_shares() == []
    assert set(tally.summary()) == {"load_imbalance", "load_entropy", "load_variation", "load_unused"}


def test_classes_keep_the_order_of_the_passages(tiny_spec, seeded, monkeypatch):
    model = build(tiny_spec("vqmoe", "classifier", labels=("a", "b", "c"))).eval()
    ids = [np.arange(1, 2 + n, dtype=np.uint16) for n in range(9)]
    alone = torch.cat([classify(model, [one], 0, "discrete") for one in ids])
    monkeypatch.setattr(validation, "BATCH", 4)
    torch.testing.assert_close(classify(model, ids, 0, "discrete"), alone, atol=1e-5, rtol=1e-4)
