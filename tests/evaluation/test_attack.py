from types import SimpleNamespace

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

    def attack(self, most=99, queries=10_000, candidates=4, symbols=SYMBOLS):
        most_S = torch.full((len(self.tokens_ST),), most)
        return greedy(self, self.embedding, self.tokens_ST, self.changeable_ST, symbols, most_S, queries, candidates)


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


def naive(bag, row, most, queries, candidates):
    """The documented search, one sequence and one candidate at a time."""
    rounds = queries // (1 + candidates)
    tokens_T, made, size, used = bag.tokens_ST[row], [], -(-most // rounds), 0
    for _ in range(rounds):
        size = min(size, most - len(made))
        if size == 0 or not options(bag, tokens_T, row, made):
            break
        x_TD = bag.embedding(tokens_T).detach().requires_grad_()
        hook = bag.embedding.register_forward_hook(lambda module, inputs, output, x_TD=x_TD: x_TD[None])
        loss = bag.one(tokens_T, row)
        hook.remove()
        (g_TD,) = torch.autograd.grad(loss, x_TD)
        gain = {
            (t, c): (g_TD[t] @ (bag.embedding.weight[c] - bag.embedding.weight[tokens_T[t]])).item()
            for t, c in options(bag, tokens_T, row, made)
        }
        ranking = []
        for edit in sorted(gain, key=lambda edit: -gain[edit]):
            if edit[0] not in [position for position, _ in ranking]:
                ranking.append(edit)
        blocks = [ranking[i * size : (i + 1) * size] for i in range(candidates) if ranking[i * size :]]
        used += 1 + len(blocks)
        best = max(blocks, key=lambda block: bag.one(put(tokens_T, *block), row).item())
        if bag.one(put(tokens_T, *best), row) > loss:
            tokens_T, made = put(tokens_T, *best), [*made, *best]
        else:
            size //= 2
    return made, used


@pytest.mark.parametrize(("most", "queries"), [(1, 5), (3, 15), (7, 10_000), (6, 10), (4, 7)])
def test_on_a_linear_model_it_is_brute_force(most, queries):
    bag = Bag()
    edits = bag.attack(most, queries)
    found = [pairs(edits, row) for row in range(3)]
    if most <= queries // 5:
        assert found == [brute_force(bag, row, most) for row in range(3)]
    else:
        # A block may hold an edit that lowers the loss; what rises comes first and is all there.
        assert all(edits_[: len(best)] == best for edits_, best in ((found[r], brute_force(bag, r, most)) for r in range(3)))
    assert any(len(edits_) == min(most, int(bag.changeable_ST[r].sum())) for r, edits_ in enumerate(found))


@pytest.mark.parametrize("candidates", [1, 2, 4])
@pytest.mark.parametrize(("most", "queries"), [(3, 40), (7, 40), (7, 12), (9, 6), (40, 35)])
def test_on_a_bent_model_it_is_the_documented_search(most, queries, candidates):
    bag = Bag(sequences=6, length=20, bend=True)
    edits = bag.attack(most, queries, candidates)
    for row in range(6):
        made, used = naive(bag, row, most, queries, candidates)
        assert pairs(edits, row) == made
        assert edits.queries_S[row] == used


@pytest.mark.parametrize("queries", [5, 9, 10, 34, 1000])
def test_the_budget_is_kept_and_counted(queries):
    bag = Bag(sequences=40, length=12, bend=True)
    edits = bag.attack(8, queries)
    assert torch.equal(edits.queries_S, bag.reads_S)
    assert 0 < edits.queries_S.min() <= edits.queries_S.max() <= queries


def test_a_budget_of_few_rounds_is_enough_for_many_edits():
    bag = Bag(sequences=5, length=60, bend=True)
    bag.changeable_ST[:] = True
    few, many = bag.attack(24, 30), bag.attack(24, 120)
    assert (few.position_SK >= 0).sum() > 0.8 * 5 * 24
    rows_S = torch.arange(5)
    clean, blocks, single = (
        bag(tokens_ST, rows_S).mean()
        for tokens_ST in (bag.tokens_ST, *(apply(bag.tokens_ST, edits, torch.full((5,), 24)) for edits in (few, many)))
    )
    assert blocks - clean > 0.5 * (single - clean) > 0


def test_most_is_each_sequence_s_own():
    bag = Bag(sequences=3, bend=True)
    most_S = torch.tensor([0, 1, 3])
    edits = greedy(bag, bag.embedding, bag.tokens_ST, bag.changeable_ST, SYMBOLS, most_S, 100)
    assert edits.position_SK.shape == (3, 3)
    assert [len(pairs(edits, row)) for row in range(3)] == [0, 1, 3]
    assert edits.queries_S[0] == 0


def test_the_loss_rises_with_every_edit_and_only_what_may_be_changed_is():
    bag = Bag(sequences=40, length=15, bend=True)
    edits = bag.attack(10)
    before = bag(bag.tokens_ST, torch.arange(40))
    for count in range(1, 11):
        edited_ST = apply(bag.tokens_ST, edits, torch.full((40,), count))
        after = bag(edited_ST, torch.arange(40))
        made = edits.position_SK[:, count - 1] >= 0
        assert (after > before)[made].all()
        assert torch.equal(after[~made], before[~made])
        before = after
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
    for queries in (10, 1000):
        edits = bag.attack(6, queries)
        assert [len(pairs(edits, row)) > 0 for row in range(4)] == [False, False, False, True]
        assert edits.queries_S[2] == 0
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
    assert pairs(edits, 1) == [(1, 3), (3, 3), (5, 3)]


def test_equal_gains_go_to_the_lower_position():
    bag = Bag(sequences=1, length=80)
    bag.w_STD[:], bag.tokens_ST[:], bag.changeable_ST[:] = 1.0, 0, True
    with torch.no_grad():
        bag.embedding.weight[:] = torch.arange(10.0)[:, None]
    assert pairs(bag.attack(20), 0) == [(t, 8) for t in range(20)]
    assert pairs(bag.attack(20, 10), 0) == [(t, 8) for t in range(20)]


def test_the_first_edits_of_each_sequence_are_applied():
    bag = Bag(sequences=2)
    edits = bag.attack()
    edited_ST = apply(bag.tokens_ST, edits, torch.tensor([2, 0]))
    assert torch.equal(edited_ST, torch.stack([put(bag.tokens_ST[0], *pairs(edits, 0)[:2]), bag.tokens_ST[1]]))


def test_bad_losses_and_budgets_are_one_line():
    bag = Bag()
    with pytest.raises(UsageError, match="attack: 4 queries are less than a round of 5; allow more"):
        bag.attack(queries=4)
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


def test_a_classifier_loses_more_than_to_random_substitutions(classifier):
    rows_S = torch.arange(40)
    edited_ST = apply(classifier.tokens_ST, attacked(classifier), torch.full((40,), 4))
    with torch.no_grad():
        clean, adversarial = (classifier.loss(tokens_ST, rows_S).mean() for tokens_ST in (classifier.tokens_ST, edited_ST))
        random = []
        for _ in range(10):
            position_SK = torch.rand(40, 32).masked_fill(~classifier.valid_ST, 2.0).argsort(1)[:, :4]
            random_ST = classifier.tokens_ST.scatter(1, position_SK, torch.randint(97, 123, (40, 4)))
            random.append(classifier.loss(random_ST, rows_S).mean())
    assert adversarial - clean > 3 * (max(random) - clean) > 0
    assert torch.equal(edited_ST[~classifier.valid_ST], classifier.tokens_ST[~classifier.valid_ST])


def test_a_language_model_loses_more_than_to_random_substitutions(tiny_spec, seeded):
    model = build(tiny_spec("smoe")).eval()
    with torch.no_grad():
        model.embedding.weight *= 20
    text_ST = torch.randint(97, 123, (6, 33))
    rows_S, most_S = torch.arange(6), torch.full((6,), 4)

    def loss(tokens_BT, rows_B):
        return model.nats(model(tokens_BT, model.infer_mode).state_BTD[:, -8:], text_ST[rows_B, -8:]).mean(1)

    tokens_ST, letters = text_ST[:, :-1], torch.arange(97, 123)
    changeable_ST = torch.ones_like(tokens_ST, dtype=torch.bool)
    edits = greedy(loss, model.embedding, tokens_ST, changeable_ST, letters, most_S, 20)
    with torch.no_grad():
        clean, adversarial = (loss(given_ST, rows_S) for given_ST in (tokens_ST, apply(tokens_ST, edits, most_S)))
        position_SK = torch.rand(6, 32).argsort(1)[:, :4]
        random = loss(tokens_ST.scatter(1, position_SK, torch.randint(97, 123, (6, 4))), rows_S)
    assert (adversarial > clean).all()
    assert adversarial.mean() > random.mean()


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
