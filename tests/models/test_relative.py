"""Relative attention against the same as loops over queries and keys in float64."""

import math

import pytest
import torch

from pipeline.models.relative import RelativeAttention, RelativePositions

B, D, H, F = 2, 6, 3, 4


@pytest.fixture
def parts(seeded):
    positions, attention = RelativePositions(D, H, F, dropout=0.0).double(), RelativeAttention(D, H, F).double()
    for bias in positions.parameters():  # as far from zero as what they are added to
        torch.nn.init.normal_(bias)
    return positions, attention


def encoding(distance):
    angles = [distance / 10000 ** (2 * i / D) for i in range(D // 2)]
    return torch.tensor([*map(math.sin, angles), *map(math.cos, angles)], dtype=torch.double)


def naive(positions, attention, seen_BSD, queries):
    """Equation of section 3.3 of the paper, head by head, query by query, key by key."""
    keys = seen_BSD.shape[1]
    key_weight, value_weight = attention.key_value.weight.chunk(2)
    result = []
    for seen_SD in seen_BSD:
        for i in range(keys - queries, keys):
            heads = []
            for head in range(H):
                rows = slice(head * F, (head + 1) * F)
                query = attention.query.weight[rows] @ seen_SD[i]
                scores = [
                    (query + positions.content_HF[head]) @ (key_weight[rows] @ seen_SD[j])
                    + (query + positions.position_HF[head]) @ (attention.distance.weight[rows] @ encoding(i - j))
                    for j in range(i + 1)
                ]
                weights = [(score / math.sqrt(F)).exp() for score in scores]
                values = [value_weight[rows] @ seen_SD[j] for j in range(i + 1)]
                heads.append(sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights))
            result.append(attention.project.weight @ torch.cat(heads))
    return torch.stack(result).view(len(seen_BSD), queries, D)


@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (4, 9), (1, 6), (1, 1)])
def test_values_and_gradients(parts, queries, keys):
    positions, attention = parts
    seen_BSD = torch.randn(B, keys, D, dtype=torch.double, requires_grad=True)
    direction = torch.randn(B, queries, D, dtype=torch.double)
    learned = [seen_BSD, *positions.parameters(), *attention.parameters()]
    fast, slow = attention(seen_BSD, positions(queries, keys)), naive(positions, attention, seen_BSD, queries)
    torch.testing.assert_close(fast, slow)
    grads = [torch.autograd.grad((y * direction).sum(), learned, materialize_grads=True) for y in (fast, slow)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-7, rtol=1e-5)  # the frequencies are rounded to float32
        assert keys == 1 or other.abs().max() > 1e-3


def test_without_gradients_the_result_is_the_same(parts):
    # Another kernel then computes it.
    positions, attention = (part.float() for part in parts)
    seen_BSD = torch.randn(B, 9, D)
    with_gradients = attention(seen_BSD, positions(4, 9))
    with torch.no_grad():
        torch.testing.assert_close(attention(seen_BSD, positions(4, 9)), with_gradients)


def test_dropout_of_the_encodings_is_for_training_only(seeded):
    positions = RelativePositions(D, H, F, dropout=0.5)
    assert (positions(3, 5).encoding_ZD == 0).sum() > (positions.eval()(3, 5).encoding_ZD == 0).sum()
