"""Where a projection of the tokens starts.

Shapes: N tokens, D width, K directions.
"""

import torch
from torch import Tensor


def covariance(x_ND: Tensor) -> Tensor:
    """Mean product of deviations from the mean (D, D)."""
    centred_ND = x_ND - x_ND.mean(0)
    return centred_ND.T @ centred_ND / len(x_ND)


def principal(x_ND: Tensor, count: int) -> Tensor:
    """The `count` orthonormal directions (K, D) in which the tokens vary most, the largest first."""
    return torch.linalg.eigh(covariance(x_ND)).eigenvectors[:, -count:].T.flip(0)
