import math
from collections import Counter

import numpy as np
import pytest
import torch

from pipeline.models.build import build
from pipeline.training import validation
from pipeline.training.validation import RoutingTally, classify, held_out, score_tokens


@pytest.fixture
def model(tiny_spec, seeded):
    return build(tiny_spec("vqmoe")).eval()


@pytest.fixture
def segments():
    return np.random.default_rng(0).integers(0, 50, (7, 13)).astype(np.uint16)


def test_the_score_is_the_mean_over_all_positions_whatever_the_batches(model, segments, monkeypatch):
    naive = []
    for row in segments.astype(int):
        logits = (model(torch.tensor(row[None, :-1]), "both").state_BTD[0] @ model.embedding.weight.T).detach()
        naive += [
            math.log2(sum(math.exp(value) for value in logits[t].tolist())) - logits[t, target].item() / math.log(2)
            for t, target in enumerate(row[1:])
        ]
    for batch in (1, 3, 32):
        monkeypatch.setattr(validation, "BATCH", batch)
        assert score_tokens(model, segments, "both", "bpc") == pytest.approx(np.mean(naive), rel=1e-5)
        assert score_tokens(model, segments, "both", "perplexity") == pytest.approx(2 ** np.mean(naive), rel=1e-5)


@pytest.fixture
def remembering(tiny_spec, tiny_params, seeded):
    """A model that reads 5 tokens at a time and remembers more than there are."""
    section = tiny_params("model.positions=relative", "model.evaluate_context=5", "model.evaluate_memory=40").model
    return build(tiny_spec("smoe", model=section)).eval()


def test_a_text_read_in_order_scores_each_token_once_as_in_one_pass(remembering, monkeypatch):
    text = np.random.default_rng(0).integers(0, 50, 36).astype(np.uint16)
    targets, nats = Counter(), remembering.nats
    monkeypatch.setattr(
        remembering, "nats", lambda state, target: targets.update(target.flatten().tolist()) or nats(state, target)
    )
    for parts in (1, 4):
        monkeypatch.setattr(validation, "ROWS", parts)
        targets.clear()
        found = score_tokens(remembering, held_out(remembering, text), "router", "bpc")
        assert sum(targets.values()) - targets.pop(-1, 0) == 35
        assert targets == Counter(text[1:].tolist())
        length = -(-35 // parts)
        whole = [torch.tensor(text[i : i + length + 1].astype(int))[None] for i in range(0, 35, length)]
        naive = [nats(remembering(row[:, :-1], "router").state_BTD, row[:, 1:]) for row in whole]
        assert found == pytest.approx(torch.cat(naive, 1).mean().item() / math.log(2), rel=1e-5)


def test_without_memory_a_text_is_scored_in_segments(remembering, monkeypatch):
    text = np.random.default_rng(0).integers(0, 50, 36).astype(np.uint16)
    monkeypatch.setattr(remembering, "evaluate_memory", 0)
    rows = held_out(remembering, text)
    assert rows.tolist() == [text[i : i + 6].tolist() for i in range(0, 35, 5)]
    assert held_out(remembering, text, limit=10).tolist() == rows[[0, -1]].tolist()
    naive = [
        remembering.nats(
            remembering(torch.tensor(row[None, :-1].astype(int)), "router").state_BTD[0], torch.tensor(row[1:].astype(int))
        )
        for row in rows
    ]
    assert score_tokens(remembering, rows, "router", "perplexity") == pytest.approx(
        torch.cat(naive).mean().exp().item(), rel=1e-5
    )


def test_where_a_row_has_ended_no_expert_is_reached(remembering, monkeypatch):
    monkeypatch.setattr(validation, "ROWS", 4)
    tally, seen = RoutingTally(remembering), []
    rows = held_out(remembering, np.arange(34, dtype=np.uint16))
    assert rows.shape == (4, 10) and (rows == -1).sum() == 3
    score_tokens(
        remembering, rows, "router", "bpc", watch=lambda hidden: (tally(hidden), seen.append(len(hidden.layers[0].index_NK)))
    )
    assert sum(seen) == 33


def test_the_tally_counts_every_assignment_over_batches(model, segments, monkeypatch):
    monkeypatch.setattr(validation, "BATCH", 3)
    tally, seen = RoutingTally(model), []
    score_tokens(model, segments, "both", "bpc", watch=lambda hidden: (tally(hidden), seen.append(hidden.layers)))
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
    score_tokens(model.eval(), segments, "router", "bpc", watch=tally)
    assert tally.code_shares() == []
    assert set(tally.summary()) == {"load_imbalance", "load_entropy", "load_variation", "load_unused"}


def test_classes_keep_the_order_of_the_passages(tiny_spec, seeded, monkeypatch):
    model = build(tiny_spec("vqmoe", "classifier", labels=("a", "b", "c"))).eval()
    ids = [np.arange(1, 2 + n, dtype=np.uint16) for n in range(9)]
    alone = torch.cat([classify(model, [one], 0, "discrete") for one in ids])
    monkeypatch.setattr(validation, "BATCH", 4)
    torch.testing.assert_close(classify(model, ids, 0, "discrete"), alone, atol=1e-5, rtol=1e-4)
