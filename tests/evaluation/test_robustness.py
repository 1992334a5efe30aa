import math

import numpy as np
import pytest
import torch

from pipeline.data.corruption import KINDS, Alphabet, alphabet
from pipeline.data.tokenizers import Tokenizer
from pipeline.errors import Failure
from pipeline.evaluation.robustness import (
    Noise,
    Trace,
    classifier_effect,
    classifier_trace,
    language_effect,
    language_trace,
    shift_effect,
    texts,
)
from pipeline.models.build import build
from pipeline.training.validation import score_tokens

SEGMENTS = np.stack([np.frombuffer(b"the cat sat on a mat and the dog", dtype=np.uint8).astype(np.uint16)] * 3)
LENGTH = SEGMENTS.shape[1] - 1


def noise(kind, rate=0.3):
    return Noise(kind, rate, 0, alphabet("text27"))


@pytest.fixture
def model(tiny_spec, seeded):
    return build(tiny_spec("smoe")).eval()


def test_clean_text_scores_as_in_validation(model):
    given = texts(SEGMENTS[:, :-1], LENGTH, 256)
    clean = language_trace(model, given, SEGMENTS, "router")
    effect = language_effect(clean, clean, given.source_ST, experts=len(model.moe_layers[0].experts.w1_EDH))
    assert effect.score_S.mean() == pytest.approx(score_tokens(model, SEGMENTS, "router", "bpc"), rel=1e-5)
    assert effect.lost_S.tolist() == [0] * len(SEGMENTS)
    assert effect.consistency == [1.0] * len(model.moe_layers)


@pytest.mark.parametrize("kind", KINDS)
def test_every_scored_symbol_is_judged_on_its_true_successor(model, kind):
    given = texts(SEGMENTS[:, :-1], LENGTH, 256, noise(kind))
    trace = language_trace(model, given, SEGMENTS, "router")
    for row in range(len(SEGMENTS)):
        state_TD = model(given.tokens_ST[row : row + 1], "router").state_BTD[0]
        logits = (state_TD @ model.embedding.weight.T).log_softmax(-1)
        for position in range(LENGTH):
            source = int(given.source_ST[row, position])
            if source < 0 or (kind == "swap" and source != position):
                assert math.isnan(trace.scores[row, position])
            else:
                assert trace.scores[row, position].item() == pytest.approx(
                    -logits[position, SEGMENTS[row, source + 1]].item(), abs=1e-4
                )


def test_texts_repeat_and_differ_by_example():
    one, other = (texts(SEGMENTS[:, :-1], LENGTH, 256, noise("replace")) for _ in range(2))
    assert torch.equal(one.tokens_ST, other.tokens_ST)
    assert not torch.equal(one.tokens_ST[0], one.tokens_ST[1])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "case"])  # capitals are none of the 27
def test_characters_get_the_noise_that_bytes_get(kind):
    tokenizer = Tokenizer.characters()
    ids = [tokenizer.encode(bytes(row.tolist()).decode()) for row in SEGMENTS]
    of_bytes = texts(SEGMENTS, LENGTH, 256, noise(kind))
    of_characters = texts(ids, LENGTH, tokenizer.pad, noise(kind)._replace(symbols=tokenizer.symbols))
    back = np.append(tokenizer.symbols, 256)[of_characters.tokens_ST.numpy()]
    assert (back == of_bytes.tokens_ST.numpy()).all()
    assert torch.equal(of_characters.source_ST, of_bytes.source_ST)


@pytest.mark.parametrize("kind", ["swap", "delete", "insert", "replace"])
def test_words_get_noise_as_tokens_of_their_vocabulary(kind):
    ids = np.random.default_rng(0).integers(0, 70_000, (3, 200)).astype(np.uint32)
    given = texts(ids, 200, 70_000, Noise(kind, 0.3, 0, Alphabet(np.arange(70_000), np.array([1]), None)))
    for row, length in enumerate(given.lengths_S.tolist()):
        tokens, source = given.tokens_ST[row, :length].numpy(), given.source_ST[row, :length].numpy()
        assert ((0 <= tokens) & (tokens < 70_000)).all()
        same = tokens[source >= 0] == ids[row, source[source >= 0]]
        assert same.all() if kind != "replace" else 0.5 < same.mean() < 0.9
        assert not np.array_equal(tokens, ids[row])


def test_insertions_are_cut_and_deletions_padded():
    longer = texts(SEGMENTS[:, :-1], LENGTH, 256, noise("insert"))
    assert (longer.lengths_S == LENGTH).all()
    shorter = texts(SEGMENTS[:, :-1], LENGTH, 256, noise("delete"))
    assert (shorter.lengths_S < LENGTH).any()
    for row, length in enumerate(shorter.lengths_S.tolist()):
        assert (shorter.tokens_ST[row, length:] == 256).all()
        assert (shorter.source_ST[row, length:] == -1).all()


def trace(*rows, index=()):
    """Of nats that are these bits."""
    return Trace(torch.tensor(rows) * math.log(2), list(index))


def test_degradation_pairs_positions_and_is_that_of_each_segment():
    clean = trace([1.0, 2.0, 3.0], [1.0, 1.0, 1.0])
    noisy = trace([2.0, math.nan, 5.0], [1.0, 2.0, 4.0])
    effect = language_effect(clean, noisy, torch.tensor([[0, -1, 1], [0, 1, 2]]), experts=0)
    assert effect.score_S == pytest.approx([3.5, 7 / 3])
    # Noisy position 2 of the first came from clean position 1: (2 - 1 + 5 - 2) / 2.
    assert effect.lost_S == pytest.approx([2.0, 4 / 3])
    assert effect.consistency is None


def test_a_shift_is_measured_against_the_mean_of_the_clean_text():
    effect = shift_effect(trace([1.0, 2.0], [2.0, 3.0]), trace([4.0, 4.0], [5.0, 7.0], [2.0, 2.0]))
    assert effect.score_S == pytest.approx([4, 6, 2])
    assert effect.lost_S == pytest.approx([2, 4, 0])


def test_consistency_follows_moved_characters_in_every_layer():
    def effect(source):
        clean = Trace(torch.zeros(1, 3), [torch.tensor([[[0], [1], [2]]]), torch.tensor([[[0], [0], [0]]])])
        noisy = Trace(torch.zeros(1, 3), [torch.tensor([[[1], [0], [7]]]), torch.tensor([[[0], [0], [0]]])])
        return language_effect(clean, noisy, torch.tensor([source]), experts=8)

    assert effect([1, 0, 2]).consistency == [pytest.approx(2 / 3), 1.0]
    assert effect([1, 0, -1]).consistency == [1.0, 1.0]
    # By chance: loads 1/3, 1/3, 1/3 and, of the noisy ones, 1/3 each of experts 0, 1 and 7; one expert leaves no choice.
    assert effect([1, 0, 2]).kappa == [pytest.approx((2 / 3 - 2 / 9) / (1 - 2 / 9)), None]


def test_padding_takes_no_part_in_consistency(tiny_spec, seeded):
    made = build(tiny_spec("smoe", "classifier", pooling="last", head_dropout=0.0)).eval()
    trace = classifier_trace(made, texts([SEGMENTS[0, :5], SEGMENTS[0, :9]], 12, 256), "router")
    assert trace.scores.shape == (2, 2)
    assert (trace.index[0][0, 5:] == -1).all()
    assert (trace.index[0][1, :9] >= 0).all()


def test_a_classifier_loses_what_it_had_right():
    clean, noisy = (
        Trace(torch.tensor(rows), []) for rows in ([[9.0, 0.0], [0.0, 9.0], [0.0, 9.0]], [[0.0, 9.0], [0.0, 9.0], [9.0, 0.0]])
    )
    effect = classifier_effect(clean, noisy, torch.tensor([0, 1, 0]), torch.zeros(3, 1, dtype=torch.long), experts=0)
    assert effect.score_S.tolist() == [0, 1, 1]
    assert effect.lost_S.tolist() == [1, 0, -1]
    assert effect.flips == pytest.approx(2 / 3)
    # Surely right twice and surely wrong once.
    assert effect.ece == pytest.approx(1 / 3, abs=1e-3)


def test_of_some_texts():
    whole = trace([1.0], [2.0], [3.0], index=[torch.arange(3)[:, None, None]])
    some = whole.some(np.array([0, 2]))
    assert (some.scores / math.log(2)).flatten().tolist() == pytest.approx([1, 3])
    assert some.index[0].flatten().tolist() == [0, 2]


def test_nan_is_an_error_not_a_score():
    source = torch.tensor([[0, 1]])
    with pytest.raises(Failure, match="bits per token is not finite; train the model again"):
        language_effect(trace([1.0, 1.0]), trace([math.inf, 1.0]), source, experts=0)
    with pytest.raises(Failure, match="noise leaves nothing to score of a segment; lower"):
        language_effect(trace([1.0, 1.0]), trace([math.nan, math.nan]), source, experts=0)
    with pytest.raises(Failure, match="a class score is not finite"):
        classifier_effect(trace([1.0, 1.0]), trace([math.nan, 1.0]), torch.tensor([0]), source, experts=0)
