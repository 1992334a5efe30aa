"""The layer as loops over tokens and experts in float64: the simplest correct version, to test the fast one against.

Each function takes a layer with weights that may be double copies, tokens (N, D) and, where they count, their ids.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Naive(NamedTuple):
    """Result (N, D), raw auxiliary losses, and the experts of each token."""

    y_ND: Tensor
    losses: dict[str, Tensor]
    index: list[list[int]]


def expert(experts, e: int, x_D: Tensor, relu: bool = False) -> Tensor:
    """FFN_e of one token."""
    hidden = _activated(x_D @ experts.w1_EDH[e] + experts.b1_EH[e], relu)
    return hidden @ experts.w2_EHD[e] + experts.b2_ED[e]


def smoe(layer, x_ND: Tensor, id_N=None) -> Naive:
    """The k highest scores, softmax over those (the value 1 for k = 1)."""
    scores = [[w @ x_D + b for w, b in zip(layer.router.scores.weight, layer.router.scores.bias, strict=True)] for x_D in x_ND]
    return _routed(layer, x_ND, scores, layer.router.settings.top_k, balanced=True)


def xmoe(layer, x_ND: Tensor, id_N=None) -> Naive:
    """Cosine of the projected token and each expert's embedding over a temperature."""
    scores = []
    for x_D in x_ND:
        p = [sum(row[d] * x_D[d] for d in range(len(x_D))) for row in layer.router.project.weight]
        scores.append([])
        for e in layer.router.expert_EP:
            product = sum(a * b for a, b in zip(p, e, strict=True))
            norms = sum(a**2 for a in p).sqrt() * sum(b**2 for b in e).sqrt()
            scores[-1].append(product / norms / layer.router.log_temperature.exp())
    return _routed(layer, x_ND, scores, layer.router.settings.top_k, balanced=True)


def stablemoe(layer, x_ND: Tensor, id_N: Tensor) -> Naive:
    """Weights sigmoid(x . e); x . e decides in stage 1, the light router in stage 2."""
    router = layer.router
    embedding, linear = router.light[0].weight, router.light[1].weight
    rows, index, light = [], [], []
    for x_D, i in zip(x_ND, id_N.tolist(), strict=True):
        scores = [x_D @ e for e in router.expert_ED]
        light.append([row @ embedding[i] for row in linear])
        index.append(_highest(light[-1] if router.frozen else scores, router.settings.top_k))
        rows.append([(1 / (1 + (-scores[e]).exp()), e) for e in index[-1]])
    losses = {}
    if not router.frozen:
        weights = [[weight for weight, _ in row] for row in rows]
        losses = {"balance": overload(weights, index, len(linear)), "distil": distillation(light, index)}
    return Naive(_mixed(layer, x_ND, rows), losses, index)


def smoe_dropout(layer, x_ND: Tensor, k: int) -> Naive:
    """A linear router as drawn, k experts."""
    scores = [[w @ x_D + b for w, b in zip(layer.router.weight_ED, layer.router.bias_E, strict=True)] for x_D in x_ND]
    return _routed(layer, x_ND, scores, k)


def hyperrouter(layer, x_ND: Tensor, k: int) -> Naive:
    """A linear router made of one embedding, k experts."""
    width, hidden = layer.router.a_DH.shape
    units = [(layer.router.embedding_D @ layer.router.a_DH[:, h]).clamp(min=0) for h in range(hidden)]
    made = [torch.stack(units) @ layer.router.b_HR[:, r] for r in range(layer.router.b_HR.shape[1])]
    rows = [made[start : start + width + 1] for start in range(0, len(made), width + 1)]
    scores = [[sum(x_D[d] * row[d] for d in range(width)) + row[width] for row in rows] for x_D in x_ND]
    return _routed(layer, x_ND, scores, k)


def competesmoe(layer, x_ND: Tensor, id_N=None) -> Naive:
    """Between competitions: a linear router without bias."""
    scores = [[w @ x_D for w in layer.router.scores.weight] for x_D in x_ND]
    return _routed(layer, x_ND, scores, layer.router.settings.top_k, balanced=True)


def competition(layer, x_ND: Tensor, id_N=None) -> Naive:
    """All experts answer; those with the highest mean softplus win, and the router's softmax learns theirs."""
    rows, index, probs, squares = [], [], [], []
    for x_D in x_ND:
        answers = [expert(layer.experts, e, x_D) for e in range(layer.experts.count)]
        affinity = [sum((1 + value.exp()).log() for value in y_D) / len(y_D) for y_D in answers]
        chosen = _weighted(affinity, layer.router.settings.top_k)
        index.append([e for _, e in chosen])
        probs.append(_softmax(affinity))
        learner = _softmax([w @ x_D for w in layer.router.scores.weight])
        target = {e: weight.item() for weight, e in chosen}
        squares += [(learner[e] - target.get(e, 0.0)) ** 2 for e in range(len(learner))]
        rows.append(sum(weight * answers[e] for weight, e in chosen))
    return Naive(torch.stack(rows), {"balance": balance(probs, index), "distil": sum(squares) / len(squares)}, index)


def vmoe(layer, x_ND: Tensor, id_N=None, noise_NE=None) -> Naive:
    """Tokens queue up for their experts; -1 is a choice that came too late. `noise` has the deviation 1."""
    made, count, index = layer.router.settings, layer.experts.count, [[] for _ in x_ND]
    scores = [[w @ x_D for w in layer.router.scores.weight] for x_D in x_ND]
    noisy = (
        scores if noise_NE is None else [[scores[n][e] + noise_NE[n, e] / count for e in range(count)] for n in range(len(x_ND))]
    )
    chosen, probs = [_highest(row, made.top_k) for row in noisy], [_softmax(row) for row in noisy]
    queue = list(range(len(x_ND)))
    if made.priority == "batch":
        queue.sort(key=lambda n: -max(p.item() for p in probs[n]))
    room = [max(1, round(made.top_k * len(x_ND) * made.capacity / count)) if made.capacity else len(x_ND)] * count
    for place in range(made.top_k):
        for n in queue:
            e = chosen[n][place]
            index[n].append(e if room[e] > 0 else -1)
            room[e] -= 1
    rows = [[(row[e], e) for e in given if e >= 0] for row, given in zip(probs, index, strict=True)]
    importance = [sum(_softmax(row)[e] for row in scores) for e in range(count)]
    load = [0.0] * count
    for row, others in zip(scores, noisy, strict=True):
        threshold = others[_highest(others, made.top_k)[-1]]
        for e in range(count):
            load[e] = load[e] + 0.5 * (1 + torch.erf((row[e] - threshold) * count / math.sqrt(2)))
    losses = {"importance": variation(importance), "load": variation(load)}
    if made.capacity:
        losses["dropped"] = x_ND.new_tensor([float(e < 0) for given in index for e in given]).mean()
    return Naive(_mixed(layer, x_ND, rows), losses, index)


def softmoe(layer, x_ND: Tensor, length: int) -> Naive:
    """Each slot reads a mix of a sequence's tokens, each token gets a mix of all slots' answers."""
    rows, index, count = [], [], layer.experts.count
    for start in range(0, len(x_ND), length):
        tokens, answers = x_ND[start : start + length], []
        scores = [[layer.scale * (x_D @ m_D) / x_D.norm() / m_D.norm() for m_D in layer.slot_MD] for x_D in tokens]
        for m in range(len(layer.slot_MD)):
            weights = _softmax([row[m] for row in scores])
            given = sum(w * x_D for w, x_D in zip(weights, tokens, strict=True))
            answers.append(expert(layer.experts, m // layer.slots, given))
        for row in scores:
            weights = _softmax(row)
            rows.append(sum(w * y_D for w, y_D in zip(weights, answers, strict=True)))
            parts = [sum(weights[e * layer.slots : (e + 1) * layer.slots]).item() for e in range(count)]
            index.append([parts.index(max(parts))])
    return Naive(torch.stack(rows), {}, index)


def dense(layer, x_ND: Tensor, id_N=None) -> Naive:
    """One feed-forward, without a router."""
    made = layer.experts
    rows = [made.w2.weight @ _activated(made.w1.weight @ x_D + made.w1.bias, False) + made.w2.bias for x_D in x_ND]
    return Naive(torch.stack(rows), {}, [[0] for _ in x_ND])


def discrete(layer, x_ND: Tensor, id_N=None) -> Naive:
    """VQMoE in mode `discrete`."""
    codes, losses = _codes(layer, x_ND)
    rows = []
    for x_D, code in zip(x_ND, codes, strict=True):
        v_D = layer.quantizer.codebook_CD[code]
        if layer.settings.input == "residual":
            given = x_D + layer.code_embedding_CD[code]
        elif layer.settings.input == "code":
            given = x_D + (v_D - x_D).detach()
        else:
            given = _blend(x_D, v_D, layer.settings.blend)
        rows.append(expert(layer.experts, code % layer.experts.count, given))
    return Naive(torch.stack(rows), losses, [[code % layer.experts.count] for code in codes])


def both(layer, x_ND: Tensor, id_N=None) -> Naive:
    """VQMoE in mode `both`."""
    routed, coded = smoe(layer, x_ND), discrete(layer, x_ND)
    if layer.settings.combine == "sum":
        return _joined(routed, coded, routed.y_ND + coded.y_ND)
    return _joined(routed, coded, _gated(layer, x_ND, routed, coded))


def by_distance(layer, x_ND: Tensor, id_N=None) -> Naive:
    """VQMoE in mode `both` with a task-trained codebook that decides for both paths."""
    codes, losses = _codes(layer, x_ND)
    count, rows, index, probs = layer.experts.count, [], [], []
    for x_D, code in zip(x_ND, codes, strict=True):
        scores = [-((x_D - v_D) ** 2).mean() / 0.05 for v_D in layer.quantizer.codebook_CD]
        best = [max(scores[e::count], key=lambda score: score.item()) for e in range(count)]
        probs.append(_softmax(best))
        first = code % count
        others = sorted((e for e in range(count) if e != first), key=lambda e: -best[e].item())[: layer.settings.top_k]
        index.append([first, *others])
        weights = _softmax([best[e] for e in index[-1]])
        given = [x_D + layer.code_embedding_CD[code]] + [x_D] * len(others)
        rows.append(sum(w * expert(layer.experts, e, x) for w, e, x in zip(weights, index[-1], given, strict=True)))
    return Naive(torch.stack(rows), losses | {"balance": balance(probs, index)}, index)


def released_router(layer, x_ND: Tensor, id_N=None) -> Naive:
    """The released VQMoE in mode `router`: one expert, whose weight is the softmax of one number."""
    rows, index = [], []
    for x_D in x_ND:
        scores = [x_D @ e / e.norm() for e in layer.router.expert_ED]
        index.append(_highest(scores, 1))
        weight = scores[index[-1][0]].exp() / scores[index[-1][0]].exp()
        rows.append(weight * expert(layer.experts, index[-1][0], x_D, relu=True))
    return Naive(torch.stack(rows), {}, index)


def released_discrete(layer, x_ND: Tensor, id_N=None) -> Naive:
    """The released VQMoE in mode `discrete`."""
    codes, losses = _codes(layer, x_ND)
    rows = []
    for x_D, code in zip(x_ND, codes, strict=True):
        given = _normalised(_blend(x_D, layer.quantizer.codebook_CD[code], layer.settings.blend), layer.norm)
        rows.append(_normalised(expert(layer.experts, code % layer.experts.count, given, relu=True), layer.norm))
    return Naive(torch.stack(rows), losses, [[code % layer.experts.count] for code in codes])


def released_both(layer, x_ND: Tensor, id_N=None) -> Naive:
    """The released VQMoE in mode `both`."""
    routed, coded = released_router(layer, x_ND), released_discrete(layer, x_ND)
    return _joined(routed, coded, _gated(layer, x_ND, routed, coded))


def balance(probs: list[list[Tensor]], index: list[list[int]]) -> Tensor:
    """E * sum_e f_e P_e."""
    tokens, experts = len(probs), len(probs[0])
    share = [sum(e in row for row in index) / sum(map(len, index)) for e in range(experts)]
    return experts * sum(share[e] * sum(row[e] for row in probs) / tokens for e in range(experts))


def variation(totals: list[Tensor]) -> Tensor:
    """Variance over squared mean."""
    mean = sum(totals) / len(totals)
    return sum((total - mean) ** 2 for total in totals) / len(totals) / mean**2


def overload(weights: list[list[Tensor]], index: list[list[int]], experts: int) -> Tensor:
    """sum_e (n_e - n) / n * (sum of the weights of e), per assignment; n is the mean number per expert."""
    assignments = sum(map(len, index))
    mean, total = assignments / experts, 0.0
    for e in range(experts):
        given = [w for row, chosen in zip(weights, index, strict=True) for w, i in zip(row, chosen, strict=True) if i == e]
        total = total + (len(given) - mean) / mean * sum(given)
    return total / assignments


def distillation(scores: list[list[Tensor]], index: list[list[int]]) -> Tensor:
    """Cross-entropy to the chosen experts, per assignment."""
    terms = [-_softmax(row)[e].log() for row, chosen in zip(scores, index, strict=True) for e in chosen]
    return sum(terms) / len(terms)


def _routed(layer, x_ND: Tensor, scores: list[list[Tensor]], k: int, balanced: bool = False) -> Naive:
    rows = [_weighted(row, k) for row in scores]
    index = [[e for _, e in row] for row in rows]
    losses = {"balance": balance([_softmax(row) for row in scores], index)} if balanced else {}
    return Naive(_mixed(layer, x_ND, rows), losses, index)


def _mixed(layer, x_ND: Tensor, rows: list[list[tuple[Tensor, int]]]) -> Tensor:
    return torch.stack(
        [
            sum((weight * expert(layer.experts, e, x_D) for weight, e in row), torch.zeros_like(x_D))
            for x_D, row in zip(x_ND, rows, strict=True)
        ]
    )


def _weighted(scores: list[Tensor], k: int) -> list[tuple[Tensor, int]]:
    """The k highest with their softmax; one alone has the value 1 and the gradient of its probability among all."""
    chosen = _highest(scores, k)
    if k > 1:
        return list(zip(_softmax([scores[e] for e in chosen]), chosen, strict=True))
    p = _softmax(scores)[chosen[0]]
    return [(1 + p - p.detach(), chosen[0])]


def _highest(scores: list[Tensor], k: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda e: -scores[e].item())[:k]


def _softmax(scores: list[Tensor]) -> list[Tensor]:
    total = sum(score.exp() for score in scores)
    return [score.exp() / total for score in scores]


def _activated(hidden: Tensor, relu: bool) -> Tensor:
    return torch.where(hidden > 0, hidden, 0.0) if relu else 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))


def _codes(layer, x_ND: Tensor) -> tuple[list[int], dict[str, Tensor]]:
    codebook_CD, codes, pulls, pushes = layer.quantizer.codebook_CD, [], [], []
    for x_D in x_ND:
        distances = [((x_D - v_D) ** 2).sum().item() for v_D in codebook_CD]
        codes.append(distances.index(min(distances)))
        pulls.append(((x_D.detach() - codebook_CD[codes[-1]]) ** 2).mean())
        pushes.append(((x_D - codebook_CD[codes[-1]].detach()) ** 2).mean())
    return codes, {"codebook": sum(pulls) / len(pulls), "commitment": sum(pushes) / len(pushes)}


def _blend(x_D: Tensor, v_D: Tensor, a: float) -> Tensor:
    return (1 - a) * x_D + a * (v_D - x_D).detach()


def _normalised(x_D: Tensor, norm) -> Tensor:
    centred = x_D - x_D.mean()
    return centred / ((centred**2).mean() + norm.eps).sqrt() * norm.weight + norm.bias


def _joined(routed: Naive, coded: Naive, y_ND: Tensor) -> Naive:
    index = [one + other for one, other in zip(routed.index, coded.index, strict=True)]
    return Naive(y_ND, routed.losses | coded.losses, index)


def _gated(layer, x_ND: Tensor, routed: Naive, coded: Naive) -> Tensor:
    rows = []
    for x_D, routed_D, coded_D in zip(x_ND, routed.y_ND, coded.y_ND, strict=True):
        gate = _softmax([w @ x_D + b for w, b in zip(layer.gate.weight, layer.gate.bias, strict=True)])
        rows.append(gate[0] * routed_D + gate[1] * coded_D)
    return torch.stack(rows)
