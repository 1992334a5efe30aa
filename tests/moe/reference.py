"""The layer as loops over tokens and experts in float64: the simplest correct version, to test the fast one against."""

import math

import torch
from torch import Tensor


def expert(experts, e: int, x_D: Tensor) -> Tensor:
    """FFN_e of one token, with weights that may be double copies."""
    hidden = x_D @ experts.w1_EDH[e] + experts.b1_EH[e]
    hidden = torch.stack([0.5 * value * (1 + torch.erf(value / math.sqrt(2))) for value in hidden])
    return hidden @ experts.w2_EHD[e] + experts.b2_ED[e]


def sparse(layer, x_ND: Tensor) -> Tensor:
    """SparseMoE: the k highest scores, softmax over those (the value 1 for k = 1)."""
    rows = []
    for x_D in x_ND:
        scores = [w @ x_D + b for w, b in zip(layer.router.scores.weight, layer.router.scores.bias, strict=True)]
        chosen = sorted(range(len(scores)), key=lambda e: -scores[e].item())[: layer.router.settings.top_k]
        if len(chosen) > 1:
            total = sum(scores[e].exp() for e in chosen)
            weights = [scores[e].exp() / total for e in chosen]
        else:
            p = scores[chosen[0]].exp() / sum(score.exp() for score in scores)
            weights = [1 + p - p.detach()]
        rows.append(sum(weight * expert(layer.experts, e, x_D) for weight, e in zip(weights, chosen, strict=True)))
    return torch.stack(rows)


def discrete(layer, x_ND: Tensor) -> Tensor:
    """VQMoE in mode `discrete`."""
    rows = []
    codebook_CD = layer.quantizer.codebook_CD
    for x_D in x_ND:
        distances = [((x_D - code_D) ** 2).sum().item() for code_D in codebook_CD]
        code = distances.index(min(distances))
        if layer.settings.input == "residual":
            given = x_D + layer.code_embedding_CD[code]
        elif layer.settings.input == "code":
            given = x_D + (codebook_CD[code] - x_D).detach()
        else:
            a = layer.settings.blend
            given = (1 - a) * x_D + a * (codebook_CD[code] - x_D).detach()
        rows.append(expert(layer.experts, code % layer.experts.count, given))
    return torch.stack(rows)


def both(layer, x_ND: Tensor) -> Tensor:
    """VQMoE in mode `both`."""
    routed, coded = sparse(layer, x_ND), discrete(layer, x_ND)
    if layer.settings.combine == "sum":
        return routed + coded
    rows = []
    for x_D, routed_D, coded_D in zip(x_ND, routed, coded, strict=True):
        gate = (layer.gate.weight @ x_D + layer.gate.bias).exp()
        gate = gate / gate.sum()
        rows.append(gate[0] * routed_D + gate[1] * coded_D)
    return torch.stack(rows)
