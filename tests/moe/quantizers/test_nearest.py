from types import SimpleNamespace

import pytest
import torch

from pipeline.moe.quantizers.nearest import Nearest, compare


def test_the_codebook_learns_from_its_loss(seeded):
    made = Nearest(SimpleNamespace(codes=4, dead_share=0.0), 6).train()
    x_ND = (10 * torch.eye(4, 6)).repeat_interleave(50, 0) + 0.1 * torch.randn(200, 6)
    made.start(x_ND)
    with torch.no_grad():
        made.codebook_CD.add_(torch.randn_like(made.codebook_CD))
    before = made(x_ND).losses["codebook"].item()
    optimizer = torch.optim.SGD(made.parameters(), lr=5.0)
    for _ in range(20):
        optimizer.zero_grad()
        made(x_ND).losses["codebook"].backward()
        optimizer.step()
    assert made(x_ND).losses["codebook"].item() < 0.1 * before


@pytest.mark.parametrize("weights", [(2.0, 3.0, 0.7), (2.0, 0.0, 0.0), (0.0, 3.0, 0.0), (0.0, 0.0, 0.7)])
def test_comparing_is_distances_and_both_losses_and_their_gradients(weights, seeded):
    x_ND, codebook_CD, upstream_NC = torch.randn(20, 6), torch.randn(5, 6), torch.randn(20, 5)
    codebook_CD[4] = 1000  # nobody's
    found, gradients = [], []
    for kind in (torch.float32, torch.float64):
        x, codes = (one.to(kind, copy=True).requires_grad_() for one in (x_ND, codebook_CD))
        if kind == torch.float32:
            distance_NC, code_N, codebook, commitment = compare(x, codes)
        else:
            distance_NC = (x[:, None] - codes).square().sum(2) - x.square().sum(1, keepdim=True)
            code_N = torch.tensor([min(range(5), key=row.__getitem__) for row in distance_NC.tolist()])
            codebook = (x.detach() - codes[code_N]).square().mean()
            commitment = (x - codes[code_N].detach()).square().mean()
        terms = (codebook, commitment, (distance_NC * upstream_NC.to(kind)).sum())
        # A term that nothing asks for gives no gradient at all, not one of zeros.
        sum(weight * term for weight, term in zip(weights, terms, strict=True) if weight).backward()
        found.append([distance_NC, code_N, codebook, commitment])
        gradients.append([torch.zeros_like(one) if one.grad is None else one.grad for one in (x, codes)])
    for fast, slow in zip(*found, strict=True):
        torch.testing.assert_close(fast.double(), slow.double(), atol=1e-4, rtol=1e-5)
    for fast, slow in zip(*gradients, strict=True):
        torch.testing.assert_close(fast.double(), slow, atol=1e-4, rtol=1e-5)
    assert (gradients[0][1][4] != 0).any() == bool(weights[2])


def test_tokens_on_their_codes_are_no_error():
    codebook_CD = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    for scale in (1e-3, 1.0, 1e3):
        _, _, codebook, _ = compare(scale * codebook_CD.repeat(50, 1), scale * codebook_CD)
        assert 0 <= codebook <= 1e-6 * scale**2
