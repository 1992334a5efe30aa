from types import SimpleNamespace

import torch
from vector_quantize_pytorch.vector_quantize_pytorch import Codebook

from pipeline.moe.quantizers.ema import Ema


def _started(codes=3, width=4):
    made = Ema(SimpleNamespace(codes=codes, dead_share=0.0), width).train()
    made.started.fill_(True)
    return made


def test_moving_sums_over_moving_counts_against_loops(seeded):
    made = _started()
    sums, counts = made.codebook_CD.double() / 3, [1 / 3] * 3
    for _ in range(20):
        x_ND = torch.randn(10, 4)
        codes = made.nearest(x_ND).tolist()
        made(x_ND)
        for j in range(3):
            mine = [x_D.double() for x_D, code in zip(x_ND, codes, strict=True) if code == j]
            sums[j] = 0.9 * sums[j] + 0.1 * sum(mine, torch.zeros(4)) / 10
            counts[j] = 0.9 * counts[j] + 0.1 * len(mine) / 10
            torch.testing.assert_close(made.codebook_CD[j].double(), sums[j] / counts[j], atol=1e-5, rtol=1e-4)


def test_it_agrees_with_vector_quantize_pytorch(seeded):
    made, library = _started(), Codebook(4, 3, decay=0.9, threshold_ema_dead_code=0).train()
    library.embed.copy_(made.codebook_CD[None])
    library.cluster_size.fill_(10 / 3)  # it counts tokens, 10 a batch
    library.embed_avg.copy_(library.embed * library.cluster_size[..., None])
    for _ in range(20):
        x_ND = torch.randn(10, 4)
        answer, (value_ND, code_N, _) = made(x_ND), library(x_ND[None])
        assert torch.equal(answer.code_N, code_N[0])
        torch.testing.assert_close(answer.value(), value_ND[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(made.codebook_CD, library.embed[0], atol=1e-4, rtol=1e-4)


def test_a_code_without_tokens_stays_for_any_number_of_steps(seeded):
    made = _started()
    with torch.no_grad():
        made.codebook_CD[2] = 1000.0
    made.share_C[2] = 0.0
    for _ in range(3):
        made(torch.randn(10, 4))
    assert (made.codebook_CD[2] == 1000.0).all()
