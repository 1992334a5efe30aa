from types import SimpleNamespace

import torch

from pipeline.moe.quantizers.cosine import Cosine


def test_the_length_of_a_token_changes_neither_its_code_nor_the_codebook(seeded):
    directions_ND, codebooks = torch.randn(10, 60, 6), []
    for lengths_N1 in (torch.ones(60, 1), torch.rand(60, 1) + 0.1):
        torch.manual_seed(1)
        made = Cosine(SimpleNamespace(codes=4, dead_share=0.1), 6).train()
        for x_ND in directions_ND:
            answer = made(lengths_N1 * x_ND)
        codebooks.append((answer.code_N, answer.value(), made.codebook_CD))
    for one, other in zip(*codebooks, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(answer.value().square().mean(1), torch.ones(60))
