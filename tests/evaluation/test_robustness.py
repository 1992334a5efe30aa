import math

import numpy as np
import pytest
import torch

from pipeline.data.corruption import KINDS, alphabet
from pipeline.data.tokenizers import Tokenizer
from pipeline.errors import Failure
from pipeline.evaluation.robustness import (
    Noise,
    Trace,
    accuracy,
    bits,
    bits_degradation,
    classifier_trace,
    consistency,
    language_trace,
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
    assert bits(language_trace(model, given, SEGMENTS, "router")) == pytest.approx(
        score_tokens(model, SEGMENTS, "router", "bpc"), rel=1e-5
    )


@pytest.mark.parametrize("kind", KINDS)
def test_every_scored_symbol_is_judged_on_its_true_successor(model, kind):
    given = texts(SEGMENTS[:, :-1], LENGTH, 256, noise(kind))
    trace = language_trace(model, given, SEGMENTS, "router")
    for row in range(len(SEGMENTS)):
        state_TD = model(given.tokens_ST[row : row + 1], "router").state_BTD[0]
        logits = (state_TD @ model.embedding.weight.T).log_softmax(-1)
        for position in range(LENGTH):
            source = int(given.source_ST[row, position])
            if source < 0:
                assert math.isnan(trace.scores[row, position])
            else:
                assert trace.scores[row, position].item() == pytest.approx(
                    -logits[position, SEGMENTS[row, source + 1]].item(), abs=1e-4
                )


def test_texts_repeat_and_differ_by_example():
    one, other = (texts(SEGMENTS[:, :-1], LENGTH, 256, noise("replace")) for _ in range(2))
    assert torch.equal(one.tokens_ST, other.tokens_ST)
    assert not torch.equal(one.tokens_ST[0], one.tokens_ST[1])


@pytest.mark.parametrize("kind", KINDS)
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
    given = texts(ids, 200, 70_000, Noise(kind, 0.3, 0, np.arange(70_000)))
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


def test_degradation_pairs_positions():
    clean = Trace(torch.tensor([[1.0, 2.0, 3.0]]) * math.log(2), [])
    noisy = Trace(torch.tensor([[2.0, math.nan, 5.0]]) * math.log(2), [])
    # Noisy position 2 came from clean position 1: (2 - 1 + 5 - 2) / 2.
    assert bits_degradation(clean, noisy, torch.tensor([[0, -1, 1]])) == pytest.approx(2.0)


def test_consistency_follows_moved_characters():
    clean = Trace(torch.zeros(1), [torch.tensor([[[0], [1], [2]]])])
    noisy = Trace(torch.zeros(1), [torch.tensor([[[1], [0], [7]]])])
    assert consistency(clean, noisy, torch.tensor([[1, 0, 2]])) == pytest.approx(2 / 3)
    assert consistency(clean, noisy, torch.tensor([[1, 0, -1]])) == 1.0


def test_padding_takes_no_part_in_consistency(tiny_spec, seeded):
    made = build(tiny_spec("smoe", "classifier", pooling="last", head_dropout=0.0)).eval()
    trace = classifier_trace(made, texts([SEGMENTS[0, :5], SEGMENTS[0, :9]], 12, 256), "router")
    assert trace.scores.shape == (2, 2)
    assert (trace.index[0][0, 5:] == -1).all()
    assert (trace.index[0][1, :9] >= 0).all()


def test_nan_is_an_error_not_a_score():
    with pytest.raises(Failure, match="bits per token is nan"):
        bits(Trace(torch.full((2, 2), math.nan), []))
    assert accuracy(Trace(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), []), torch.tensor([1, 1])) == 0.5
