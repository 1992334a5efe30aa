"""Every quantizer, and VQMoE around it, as loops over tokens and codes in float64."""

import math

import torch
from torch import Tensor

from tests.moe import reference


def distances(quantizer, x_D: Tensor) -> list[Tensor]:
    """Squared distance to each code, in the variant's own space."""
    given, codes = x_D, list(quantizer.codebook_CD)
    if type(quantizer).__name__ == "LowDim":
        given = quantizer.down.weight @ x_D + quantizer.down.bias
    if type(quantizer).__name__ == "Cosine":
        given, codes = given / given.norm(), [code / code.norm() for code in codes]
    return [sum((a - b) ** 2 for a, b in zip(given, code, strict=True)) for code in codes]


def digits(quantizer, x_D: Tensor) -> tuple[list[Tensor], int]:
    """FSQ: levels 0..L-1 of tanh, whose gradient the rounding keeps, scaled to -1..1; and the number they make."""
    values, number, base = [], 0, 1
    for w_D, b, levels in zip(quantizer.down.weight, quantizer.down.bias, quantizer.grid._levels.tolist(), strict=True):
        soft = torch.tanh(w_D @ x_D + b)
        level = math.floor((levels - 1) * (soft.item() + 1) / 2 + 0.5)
        values.append(2 * level / (levels - 1) - 1 + soft - soft.detach())
        number, base = number + level * base, base * levels
    return values, number


def code(quantizer, x_D: Tensor) -> int:
    if type(quantizer).__name__ == "Fsq":
        return digits(quantizer, x_D)[1]
    found = [distance.item() for distance in distances(quantizer, x_D)]
    return found.index(min(found))


def affine(linear, parts) -> Tensor:
    return sum(linear.weight[:, i] * part for i, part in enumerate(parts)) + linear.bias


def value(quantizer, x_D: Tensor) -> Tensor:
    """The quantized token, with the gradient it has in the codebook loss; none of it reaches the token."""
    name, x_D = type(quantizer).__name__, x_D.detach()
    if name == "Fsq":
        return affine(quantizer.up, [digit.detach() for digit in digits(quantizer, x_D)[0]])
    v = quantizer.codebook_CD[code(quantizer, x_D)]
    if name == "LowDim":
        z = quantizer.down.weight @ x_D + quantizer.down.bias
        return affine(quantizer.up, v + z - z.detach())
    return v / v.norm() * math.sqrt(len(v)) if name == "Cosine" else v


def losses(quantizer, x_ND: Tensor) -> dict[str, Tensor]:
    name, terms = type(quantizer).__name__, {"codebook": [], "commitment": []}
    for x_D in x_ND:
        quantized = value(quantizer, x_D)
        codebook = sum((x_D.detach() - quantized) ** 2) / len(x_D)
        if name == "LowDim":
            z = quantizer.down.weight @ x_D.detach() + quantizer.down.bias
            v = quantizer.codebook_CD[code(quantizer, x_D)]
            codebook = codebook + sum((z - v) ** 2) / len(z)
        terms["codebook"].append(codebook)
        terms["commitment"].append(sum((x_D - quantized.detach()) ** 2) / len(x_D))
    there = {"Ema": ["commitment"], "Cosine": ["commitment"], "Fsq": ["codebook"]}.get(name, ["codebook", "commitment"])
    return {kind: sum(terms[kind]) / len(x_ND) for kind in there}


def discrete(layer, x_ND: Tensor) -> Tensor:
    """VQMoE in mode `discrete`."""
    quantizer, rows = layer.quantizer, []
    for x_D in x_ND:
        j = code(quantizer, x_D)
        if layer.settings.input == "code":
            given = x_D + (value(quantizer, x_D) - x_D).detach()
        elif layer.settings.input == "blend":
            a = layer.settings.blend
            given = (1 - a) * x_D + a * (value(quantizer, x_D) - x_D).detach()
        elif type(quantizer).__name__ == "Fsq":
            given = x_D + affine(quantizer.embedding, digits(quantizer, x_D)[0])
        else:
            given = x_D + layer.code_embedding_CD[j]
        y_D = reference.expert(layer.experts, j % layer.experts.count, given)
        if type(quantizer).__name__ == "Task":
            scores = [(-distance / len(x_D) / 0.05).exp() for distance in distances(quantizer, x_D)]
            p = scores[j] / sum(scores)
            y_D = y_D * (1 + p - p.detach())
        rows.append(y_D)
    return torch.stack(rows)


def both(layer, x_ND: Tensor) -> Tensor:
    """VQMoE in mode `both`, its paths summed."""
    return reference.smoe(layer, x_ND).y_ND + discrete(layer, x_ND)
