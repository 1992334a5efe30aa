import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline.models.build import build
from pipeline.moe import stats
from pipeline.moe.routers.base import LayerOutput
from pipeline.training import validation
from pipeline.training.validation import RoutingHistory, RoutingTally, classify, held_out, score_tokens


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
    assert set(tally.summary()) == {"load_imbalance", "load_entropy", "load_variation", "load_unused", "margin"}


LOAD = {"imbalance", "entropy", "variation", "unused"}


@pytest.mark.parametrize(
    ("method", "mode", "names"),
    [
        ("vqmoe", "both", LOAD | {"margin", "utilisation", "perplexity"}),
        ("smoe", "router", LOAD | {"margin"}),
        # All experts are asked: their load says nothing, while the router's scores still differ.
        ("smoe_dropout", "dense", {"margin"}),
        ("dense", "dense", set()),
    ],
)
def test_rows_have_what_exists_and_average_to_the_summary(tiny_spec, segments, seeded, monkeypatch, method, mode, names):
    monkeypatch.setattr(validation, "BATCH", 3)
    model = build(tiny_spec(method)).eval()
    tally, seen = RoutingTally(model), []
    score_tokens(model, segments, mode, "bpc", watch=lambda hidden: (tally(hidden), seen.append(hidden.layers)))
    rows, summary = tally.rows(), tally.summary()
    assert [row["layer"] for row in rows] == [0, 1]
    assert all(row.keys() == {"layer"} | names for row in rows)
    for name in names:
        prefix = "load_" if name in LOAD else "" if name == "margin" else "code_"
        assert summary[prefix + name] == pytest.approx(np.mean([row[name] for row in rows]))
    if "margin" in names:
        scores_NE = torch.cat([layers[1].scores for layers in seen])
        assert len(scores_NE) == 7 * 12
        assert rows[1]["margin"] == pytest.approx(stats.margin(scores_NE))


def shifted(model):
    """Other codes and experts than before."""
    with torch.no_grad():
        for layer in model.moe_layers:
            for parameter in layer.assignment_parameters():
                parameter.add_(torch.randn_like(parameter))


def kept(model, segments, mode):
    tally, seen = RoutingTally(model, keep=True), []
    score_tokens(model, segments, mode, "bpc", watch=lambda hidden: (tally(hidden), seen.append(hidden.layers)))
    return tally, [torch.cat([layers[layer].index_NK for layers in seen]) for layer in range(2)]


def test_fluctuation_is_that_of_all_assignments_layer_by_layer(tiny_spec, segments, seeded, monkeypatch):
    monkeypatch.setattr(validation, "BATCH", 3)
    model = build(tiny_spec("smoe")).eval()
    before, index = kept(model, segments, "router")
    assert kept(model, segments, "router")[0].fluctuation(before.index()) == [0.0, 0.0]
    shifted(model)
    after, other = kept(model, segments, "router")
    wanted = [
        np.mean([1 - len(set(a) & set(b)) / len(a) for a, b in zip(one.tolist(), two.tolist(), strict=True)])
        for one, two in zip(index, other, strict=True)
    ]
    assert after.fluctuation(before.index()) == pytest.approx(wanted)
    assert 0 < wanted[0] != wanted[1] > 0


def test_assignments_are_kept_whole_whatever_the_number_of_experts():
    for experts, kind in ((1, torch.int8), (128, torch.int8), (129, torch.int16), (40_000, torch.int32)):
        model = SimpleNamespace(expert_blocks=(0,), moe_layers=[SimpleNamespace(experts=SimpleNamespace(count=experts))])
        tally = RoutingTally(model, keep=True)
        index_NK = torch.tensor([[experts - 1]])
        tally(SimpleNamespace(layers=[LayerOutput(torch.zeros(1, 1), {}, index_NK, None)]))
        assert tally._index[0][0].dtype is kind
        assert torch.equal(tally._index[0][0].long(), index_NK)


def test_who_has_no_expert_counts_nowhere():
    def fed(*batches):
        layer = SimpleNamespace(experts=SimpleNamespace(count=3))
        tally = RoutingTally(SimpleNamespace(expert_blocks=(0, 1), moe_layers=[layer, layer]), keep=True)
        for batch in batches:
            tally(SimpleNamespace(layers=[LayerOutput(torch.zeros(2, 1), {}, torch.tensor(index), None) for index in batch]))
        return tally

    tally = fed(([[0, 1], [0, -1]], [[0, 1], [2, 1]]), ([[0, 2], [-1, -1]], [[0, 1], [2, -1]]))
    assert tally.expert_shares()[0].tolist() == [3 / 5, 1 / 5, 1 / 5]
    later = fed(([[0, 1], [1, 0]], [[0, 1], [2, 1]]), ([[2, -1], [-1, 0]], [[0, 1], [2, 0]]))
    assert later.fluctuation(tally.index()) == pytest.approx([1 / 5, 0])


def test_the_history_compares_each_validation_with_the_one_before(tiny_spec, segments, seeded):
    model, history = build(tiny_spec("smoe")).eval(), RoutingHistory()
    tallies, returned = [], []
    for _ in range(3):
        tallies.append(kept(model, segments, "router")[0])
        returned.append(history.add(tallies[-1]))
        if len(tallies) == 1:
            shifted(model)
    changed = tallies[1].fluctuation(tallies[0].index())
    assert returned[0] == tallies[0].summary()
    assert returned[1] == tallies[1].summary() | {"fluctuation": pytest.approx(np.mean(changed))}
    assert returned[2]["fluctuation"] == 0.0
    rows = history.rows([6, 12, 18])
    assert [(row["step"], row["layer"]) for row in rows] == [(6, 0), (6, 1), (12, 0), (12, 1), (18, 0), (18, 1)]
    assert [row["fluctuation"] for row in rows] == [None, None, *changed, 0.0, 0.0]
    assert all(tuple(row) == RoutingHistory.COLUMNS and row["perplexity"] is None for row in rows)
    assert rows[2]["unused"] == tallies[1].rows()[0]["unused"]


def test_nothing_fluctuates_where_nothing_is_chosen(tiny_spec, segments, seeded):
    for method in ("dense", "smoe_dropout"):
        model, history = build(tiny_spec(method)).eval(), RoutingHistory()
        for _ in range(2):
            assert "fluctuation" not in history.add(kept(model, segments, "dense")[0])
        assert all(row["fluctuation"] is None and row["imbalance"] is None for row in history.rows([1, 2]))


def test_classes_keep_the_order_of_the_passages(tiny_spec, seeded, monkeypatch):
    model = build(tiny_spec("vqmoe", "classifier", labels=("a", "b", "c"))).eval()
    ids = [np.arange(1, 2 + n, dtype=np.uint16) for n in range(9)]
    alone = torch.cat([classify(model, [one], 0, "discrete") for one in ids])
    monkeypatch.setattr(validation, "BATCH", 4)
    torch.testing.assert_close(classify(model, ids, 0, "discrete"), alone, atol=1e-5, rtol=1e-4)
