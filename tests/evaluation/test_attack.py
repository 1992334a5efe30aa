import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pipeline.errors import Failure, UsageError
from pipeline.evaluation.attack import apply, greedy
from pipeline.models.build import build

SYMBOLS = torch.tensor([3, 1, 7, 4, 8])


class Bag(nn.Module):
    """loss_s = (sum_t w_st . E[x_st]) in float64, with a tanh around each term or none; counts how often each s is read."""

    def __init__(self, sequences=3, length=7, vocabulary=10, width=4, bend=False):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Embedding(vocabulary, width, dtype=torch.float64)
        nn.init.normal_(self.embedding.weight, generator=generator)
        self.w_STD = torch.randn(sequences, length, width, dtype=torch.float64, generator=generator)
        self.tokens_ST = torch.randint(vocabulary, (sequences, length), generator=generator)
        self.changeable_ST = torch.rand(sequences, length, generator=generator) < 0.8
        self.bend, self.reads_S = bend, torch.zeros(sequences, dtype=torch.long)

    def forward(self, tokens_BT, rows_B):
        self.reads_S += torch.bincount(rows_B, minlength=len(self.reads_S))
        value_BT = (self.embedding(tokens_BT) * self.w_STD[rows_B]).sum(-1)
        return (value_BT.tanh() + 0.3 * value_BT.roll(1, 1).sin() * value_BT if self.bend else value_BT).sum(1)

    def one(self, tokens_T, row):
        return self(tokens_T[None], torch.tensor([row]))[0]

    def attack(self, most=99, queries=200, symbols=SYMBOLS, seed=0):
        most_S = torch.full((len(self.tokens_ST),), most)
        return greedy(self, self.embedding, self.tokens_ST, self.changeable_ST, symbols, most_S, queries, seed=seed)


def pairs(edits, row):
    """The edits (position, symbol) of a sequence, which stand before its first -1."""
    position, symbol = edits.position_SK[row].tolist(), edits.symbol_SK[row].tolist()
    count = sum(p >= 0 for p in position)
    assert position[count:] == symbol[count:] == [-1] * (len(position) - count)
    return list(zip(position[:count], symbol[:count], strict=True))


def options(bag, tokens_T, row, made):
    """Every substitution that is allowed."""
    free = [t for t in range(len(tokens_T)) if bag.changeable_ST[row, t] and t not in [position for position, _ in made]]
    return [(t, c) for t in free for c in SYMBOLS.tolist() if c != tokens_T[t]]


def put(tokens_T, *edits):
    tokens_T = tokens_T.clone()
    for position, symbol in edits:
        tokens_T[position] = symbol
    return tokens_T


def brute_force(bag, row, most):
    """Greedy search that tries every substitution."""
    tokens_T, made = bag.tokens_ST[row], []
    while len(made) < most and (open_ := options(bag, tokens_T, row, made)):
        best = max(open_, key=lambda edit: bag.one(put(tokens_T, edit), row).item())
        if bag.one(put(tokens_T, best), row) <= bag.one(tokens_T, row):
            break
        tokens_T, made = put(tokens_T, best), [*made, best]
    return made


def naive(bag, row, most, queries, seed=0):
    """The documented search, one sequence at a time."""
    clean_T, symbols = bag.tokens_ST[row].tolist(), sorted(SYMBOLS.tolist())
    draw = np.random.default_rng((seed, row))
    order = [t for t in np.argsort(-draw.random(len(clean_T))).tolist() if bag.changeable_ST[row, t]]
    x_TD = bag.embedding(bag.tokens_ST[row]).detach().requires_grad_()
    hook = bag.embedding.register_forward_hook(lambda module, inputs, output: x_TD[None])
    loss = bag.one(bag.tokens_ST[row], row).item()
    (g_TD,) = torch.autograd.grad(bag.one(bag.tokens_ST[row], row), x_TD)
    hook.remove()
    made, size, turn = {}, math.ceil(2 * most / (queries - 1)), 0
    for _ in range(queries - 1):
        steps = draw.integers(1, len(symbols), len(clean_T)).tolist()
        block = {}
        for _ in range(min(size, len(order))):
            t = order[turn % len(order)]
            if turn < len(order):
                block[t] = max(set(symbols) - {clean_T[t]}, key=lambda c: (g_TD[t] @ bag.embedding.weight[c]).item())
            else:
                block[t] = symbols[(sum(c < clean_T[t] for c in symbols) + steps[t]) % len(symbols)]
            turn += 1
        turn += size - len(block)
        ranked = sorted((t for t in made if t not in block), key=lambda t: (-made[t][1], t))
        stay = ranked[: most - len(block)]
        text_T = put(bag.tokens_ST[row], *block.items(), *((t, made[t][0]) for t in stay))
        after = bag.one(text_T, row).item()
        if after > loss:
            rise = after - loss + sum(rise for t, (_, rise) in made.items() if t not in stay)
            made = {t: made[t] for t in stay} | {t: (c, rise / len(block)) for t, c in block.items()}
            loss = after
    return [(t, made[t][0]) for t in sorted(made, key=lambda t: (-made[t][1], t))]


@pytest.mark.parametrize(("most", "queries"), [(1, 8), (3, 8), (3, 300), (7, 15), (99, 300)])
def test_on_a_linear_model_it_is_brute_force(most, queries):
    bag = Bag(sequences=40)
    edits = bag.attack(most, queries)
    assert [pairs(edits, row) for row in range(40)] == [brute_force(bag, row, most) for row in range(40)]


@pytest.mark.parametrize(("most", "queries"), [(3, 40), (7, 40), (7, 12), (9, 6), (40, 35), (2, 3), (6, 70)])
def test_on_a_bent_model_it_is_the_documented_search(most, queries):
    bag = Bag(sequences=35, length=20, bend=True)
    edits = bag.attack(most, queries, seed=3)
    for row in range(35):
        assert pairs(edits, row) == naive(bag, row, most, queries, seed=3)


@pytest.mark.parametrize("queries", [3, 9, 34, 200])
def test_the_budget_is_spent_and_counted(queries):
    bag = Bag(sequences=40, length=12, bend=True)
    edits = bag.attack(8, queries)
    assert edits.queries_S.tolist() == bag.reads_S.tolist() == [queries] * 40


def test_the_loss_rises_with_the_budget():
    bag = Bag(sequences=40, length=15, bend=True)
    rows_S, most_S = torch.arange(40), torch.full((40,), 5)
    loss_SQ = torch.stack(
        [bag(apply(bag.tokens_ST, bag.attack(5, queries), most_S), rows_S) for queries in (11, 12, 20, 40, 80)], dim=1
    )
    assert (loss_SQ.diff(dim=1) >= 0).all()
    assert (loss_SQ[:, 0] > bag(bag.tokens_ST, rows_S)).all()
    assert (loss_SQ.diff(dim=1) > 0).any(0).all()


def test_a_small_budget_is_enough_for_many_edits():
    bag = Bag(sequences=5, length=60, bend=True)
    bag.changeable_ST[:] = True
    few, many = bag.attack(24, 13), bag.attack(24, 120)
    assert (few.position_SK >= 0).sum() > 0.8 * 5 * 24
    rows_S = torch.arange(5)
    clean, blocks, single = (
        bag(tokens_ST, rows_S).mean()
        for tokens_ST in (bag.tokens_ST, *(apply(bag.tokens_ST, edits, torch.full((5,), 24)) for edits in (few, many)))
    )
    assert blocks - clean > 0.5 * (single - clean) > 0


def test_every_model_is_attacked_at_the_same_positions():
    tried = []
    for seed in (1, 2):
        bag = Bag(sequences=40, length=12)
        nn.init.normal_(bag.embedding.weight, generator=torch.Generator().manual_seed(seed))
        texts = []

        def never(tokens_BT, rows_B, bag=bag, texts=texts):
            texts.append(tokens_BT.clone())
            return 1e-9 * bag(tokens_BT, rows_B) - (tokens_BT != bag.tokens_ST[rows_B]).sum(1)

        greedy(never, bag.embedding, bag.tokens_ST, bag.changeable_ST, SYMBOLS, torch.full((40,), 9), 31)
        tried.append(torch.stack(texts[:31]))
    changed = [texts_QBT != texts_QBT[:1] for texts_QBT in tried]
    assert torch.equal(*changed)
    assert changed[0][1:].any(2).all()
    different_Q = (tried[0] != tried[1]).any(2).any(1)
    # Once all positions had their best symbol, the symbols are the same too.
    assert different_Q[1:5].all()
    assert not different_Q[13:].any()


def test_draws_are_those_of_the_row_and_the_seed():
    bag = Bag(sequences=40, length=12, bend=True)
    edits, other = bag.attack(5, 30), bag.attack(5, 30, seed=1)
    assert not torch.equal(edits.position_SK, other.position_SK)
    bag.changeable_ST[:33] = False
    edits_of_few = bag.attack(5, 30)
    assert [pairs(edits_of_few, row) for row in range(33, 40)] == [pairs(edits, row) for row in range(33, 40)]
    same = Bag(sequences=2, length=12)
    for values in (same.tokens_ST, same.w_STD, same.changeable_ST):
        values[1] = values[0]
    edits = same.attack(1, 3)
    assert pairs(edits, 0) != pairs(edits, 1)


def test_most_is_each_sequence_s_own():
    bag = Bag(sequences=3, bend=True)
    most_S = torch.tensor([0, 1, 3])
    edits = greedy(bag, bag.embedding, bag.tokens_ST, bag.changeable_ST, SYMBOLS, most_S, 100)
    assert edits.position_SK.shape == (3, 3)
    assert [len(pairs(edits, row)) for row in range(3)] == [0, 1, 3]
    assert edits.queries_S[0] == 0


def test_where_effects_add_up_every_prefix_is_the_best_of_its_length():
    bag = Bag(sequences=40, length=15)
    edits = bag.attack(10, 21)
    loss_SK = torch.stack([bag(apply(bag.tokens_ST, edits, torch.full((40,), k)), torch.arange(40)) for k in range(11)], dim=1)
    rise_SK = loss_SK.diff(dim=1)
    assert (rise_SK[edits.position_SK >= 0] > 0).all()
    assert (rise_SK.diff(dim=1) < 1e-12).all()


def test_only_what_may_be_changed_is():
    bag = Bag(sequences=40, length=15, bend=True)
    for queries in (6, 21, 100):
        edits = bag.attack(10, queries)
        edited_ST = apply(bag.tokens_ST, edits, torch.full((40,), 10))
        changed_ST = edited_ST != bag.tokens_ST
        assert torch.equal(changed_ST.sum(1), (edits.position_SK >= 0).sum(1))
        assert bag.changeable_ST[changed_ST].all()
        assert torch.isin(edited_ST[changed_ST], SYMBOLS).all()


def test_a_sequence_that_cannot_be_improved_has_no_edits():
    bag = Bag(sequences=4)
    best_ST = ((bag.w_STD @ bag.embedding.weight[SYMBOLS].T).argmax(-1)).apply_(lambda i: SYMBOLS[i].item())
    bag.tokens_ST[1] = best_ST[1]
    bag.changeable_ST[2] = False
    bag.w_STD[0] = 0.0
    for queries in (13, 200):
        edits = bag.attack(6, queries)
        assert [len(pairs(edits, row)) > 0 for row in range(4)] == [False, False, False, True]
        assert edits.queries_S.tolist() == [queries, queries, 0, queries]
    assert torch.equal(apply(bag.tokens_ST, edits, torch.full((4,), 6))[:3], bag.tokens_ST[:3])


def test_the_only_symbol_does_not_replace_itself():
    bag = Bag()
    bag.tokens_ST[0] = 3
    bag.tokens_ST[1] = torch.tensor([3, 0, 3, 0, 3, 0, 3])
    bag.changeable_ST[:] = True
    bag.w_STD[1] = (bag.embedding.weight[3] - bag.embedding.weight[0]).detach()
    edits = bag.attack(symbols=torch.tensor([3, 3]))
    assert pairs(edits, 0) == []
    assert edits.queries_S[0] == 0
    assert sorted(pairs(edits, 1)) == [(1, 3), (3, 3), (5, 3)]


def test_the_first_edits_of_each_sequence_are_applied():
    bag = Bag(sequences=2)
    edits = bag.attack()
    edited_ST = apply(bag.tokens_ST, edits, torch.tensor([2, 0]))
    assert torch.equal(edited_ST, torch.stack([put(bag.tokens_ST[0], *pairs(edits, 0)[:2]), bag.tokens_ST[1]]))


def test_bad_losses_and_budgets_are_one_line():
    bag = Bag()
    with pytest.raises(UsageError, match="attack: 2 queries are less than a gradient and two tries; allow more"):
        bag.attack(queries=2)
    bag.changeable_ST[0] = torch.arange(7) == 0  # a substitution there makes the loss finite
    with pytest.raises(Failure, match="the gradient under attack is not finite"):
        greedy(
            lambda *given: (bag(*given) * 0).sqrt(), bag.embedding, bag.tokens_ST, bag.changeable_ST, SYMBOLS, torch.ones(3), 9
        )
    for bad in (float("nan"), float("inf")):
        with torch.no_grad():
            bag.embedding.weight[8] = bad  # nowhere in the text
        bag.tokens_ST[bag.tokens_ST == 8] = 0
        with pytest.raises(Failure, match="the loss under attack is not finite"):
            bag.attack(symbols=torch.tensor([8]))
        bag.tokens_ST[0, 0] = 8
        with pytest.raises(Failure, match="the loss under attack is not finite"):
            bag.attack(symbols=torch.tensor([1, 3]))
        bag.tokens_ST[0, 0] = 0
    assert not bag.embedding._forward_hooks


@pytest.fixture
def classifier(tiny_spec, seeded):
    """A tiny classifier, fresh weights made larger so that its scores depend on the text, and its loss against its choice."""
    model = build(tiny_spec("vqmoe", "classifier")).eval()
    with torch.no_grad():
        model.backbone.embedding.weight *= 20
        model.scores[1].weight *= 5
    tokens_ST = torch.randint(97, 123, (40, 32))
    lengths_S = torch.randint(20, 33, (40,))
    valid_ST = torch.arange(32) < lengths_S[:, None]
    tokens_ST = tokens_ST.masked_fill(~valid_ST, 256)

    def scores(tokens_BT, rows_B):
        return model(tokens_BT, lengths_S[rows_B], model.backbone.infer_mode)[0]

    with torch.no_grad():
        label_S = scores(tokens_ST, torch.arange(40)).argmax(1)
    return SimpleNamespace(
        model=model,
        loss=lambda tokens_BT, rows_B: F.cross_entropy(scores(tokens_BT, rows_B), label_S[rows_B], reduction="none"),
        tokens_ST=tokens_ST,
        valid_ST=valid_ST,
    )


def attacked(given, most=4, queries=40):
    most_S = torch.full((40,), most)
    embedding, letters = given.model.backbone.embedding, torch.arange(97, 123)
    return greedy(given.loss, embedding, given.tokens_ST, given.valid_ST, letters, most_S, queries)


@torch.no_grad()
def random_search(loss, tokens_ST, changeable_ST, letters, most, queries):
    """The losses (S,) that blind search reaches: in each round some texts with more random substitutions, the best is kept."""
    best_S, edited_ST = loss(tokens_ST, torch.arange(len(tokens_ST))), tokens_ST.clone()
    rounds = min(most, queries // 5)
    for round_ in range(rounds):
        size = most // rounds + (round_ < most % rounds)
        for row in range(len(tokens_ST)):
            tried_NT = edited_ST[row].repeat(queries // rounds, 1)
            for tried_T in tried_NT:
                position_P = torch.nonzero(changeable_ST[row]).flatten()
                position_P = position_P[torch.randperm(len(position_P))[:size]]
                tried_T[position_P] = letters[torch.randint(len(letters), (len(position_P),))]
            loss_N = loss(tried_NT, torch.full((len(tried_NT),), row))
            if loss_N.max() > best_S[row]:
                best_S[row], edited_ST[row] = loss_N.max(), tried_NT[loss_N.argmax()]
    return best_S


@pytest.mark.parametrize(("most", "queries"), [(1, 20), (3, 20), (6, 40)])
def test_a_classifier_loses_more_than_to_random_search(classifier, most, queries):
    edited_ST = apply(classifier.tokens_ST, attacked(classifier, most, queries), torch.full((40,), most))
    letters = torch.arange(97, 123)
    random = random_search(classifier.loss, classifier.tokens_ST, classifier.valid_ST, letters, most, queries).mean()
    with torch.no_grad():
        clean, adversarial = (
            classifier.loss(tokens_ST, torch.arange(40)).mean() for tokens_ST in (classifier.tokens_ST, edited_ST)
        )
    assert adversarial - clean > 1.2 * (random - clean) > 0
    assert torch.equal(edited_ST[~classifier.valid_ST], classifier.tokens_ST[~classifier.valid_ST])


@pytest.mark.parametrize(("most", "queries"), [(1, 20), (3, 20), (6, 40)])
def test_a_language_model_loses_more_than_to_random_search(tiny_spec, seeded, most, queries):
    model = build(tiny_spec("smoe")).eval()
    with torch.no_grad():
        model.embedding.weight *= 20
    text_ST = torch.randint(97, 123, (12, 33))
    most_S = torch.full((12,), most)

    def loss(tokens_BT, rows_B):
        return model.nats(model(tokens_BT, model.infer_mode).state_BTD[:, -8:], text_ST[rows_B, -8:]).mean(1)

    tokens_ST, letters = text_ST[:, :-1], torch.arange(97, 123)
    changeable_ST = torch.ones_like(tokens_ST, dtype=torch.bool)
    edits = greedy(loss, model.embedding, tokens_ST, changeable_ST, letters, most_S, queries)
    random = random_search(loss, tokens_ST, changeable_ST, letters, most, queries).mean()
    with torch.no_grad():
        clean, adversarial = (
            loss(given_ST, torch.arange(12)).mean() for given_ST in (tokens_ST, apply(tokens_ST, edits, most_S))
        )
    assert adversarial - clean > random - clean > 0


def test_an_attack_repeats_and_leaves_the_model_as_it_was(classifier):
    model, before = classifier.model, {name: value.clone() for name, value in classifier.model.state_dict().items()}
    parameters = list(model.parameters())
    parameters[0].grad = torch.ones_like(parameters[0])
    tokens_ST, valid_ST, state = classifier.tokens_ST.clone(), classifier.valid_ST.clone(), torch.get_rng_state()
    with torch.no_grad():
        one = attacked(classifier)
    for parameter in parameters:
        parameter.requires_grad_(False)
    assert all(torch.equal(a, b) for a, b in zip(one, attacked(classifier), strict=True))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(classifier.tokens_ST, tokens_ST)
    assert torch.equal(classifier.valid_ST, valid_ST)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (parameters[0].grad == 1).all()
    assert all(parameter.grad is None for parameter in parameters[1:])
    assert not model.backbone.embedding._forward_hooks
