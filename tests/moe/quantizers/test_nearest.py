from types import SimpleNamespace

import torch

from pipeline.moe.quantizers.nearest import Nearest


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
