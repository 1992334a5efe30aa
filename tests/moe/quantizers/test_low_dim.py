from types import SimpleNamespace

import torch

from pipeline.moe.quantizers.low_dim import LowDim


def test_it_starts_in_the_plane_of_the_tokens(seeded):
    plane_26 = torch.linalg.qr(torch.randn(6, 2)).Q.T
    corners = torch.tensor([[5.0, 2.0], [5, -2], [-5, 2], [-5, -2]])
    x_ND = 3 + (corners.repeat_interleave(50, 0) + 0.05 * torch.randn(200, 2)) @ plane_26
    made = LowDim(SimpleNamespace(codes=4, dead_share=0.0, code_width=2), 6)
    made.start(x_ND)
    answer = made.eval()(x_ND)
    assert made.codebook_CD.shape == (4, 2)
    assert answer.error < 0.01


def test_the_projection_learns_the_plane_of_the_tokens(seeded):
    made = LowDim(SimpleNamespace(codes=4, dead_share=0.0, code_width=2), 6).train()
    made(torch.randn(200, 6))
    corners = torch.tensor([[5.0, 2, 0, 0, 0, 0], [5, -2, 0, 0, 0, 0], [-5, 2, 0, 0, 0, 0], [-5, -2, 0, 0, 0, 0]])
    x_ND = corners.repeat_interleave(50, 0) + 0.05 * torch.randn(200, 6)
    first = made(x_ND).error
    optimizer = torch.optim.Adam(made.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        made(x_ND).losses["codebook"].backward()
        optimizer.step()
    assert made(x_ND).error < 0.1 * first


def test_no_more_dimensions_than_the_model_has():
    assert LowDim(SimpleNamespace(codes=4, dead_share=0.0, code_width=8), 6).codebook_CD.shape == (4, 6)
