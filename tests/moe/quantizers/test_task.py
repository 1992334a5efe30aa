from types import SimpleNamespace

import torch

from pipeline.moe.quantizers.task import TEMPERATURE, Task


def test_the_tasks_gradient_against_the_softmaxs_by_hand(seeded):
    made, x_ND = Task(SimpleNamespace(codes=5, dead_share=0.0), 6), torch.randn(20, 6)
    upstream_N = torch.randn(20)
    answer = made.eval()(x_ND)
    (answer.weight_N1[:, 0] * upstream_N).sum().backward()
    wanted = torch.zeros(5, 6, dtype=torch.float64)
    for x_D, j, upstream in zip(x_ND.double(), answer.code_N.tolist(), upstream_N.double(), strict=True):
        codes = made.codebook_CD.detach().double()
        scores = torch.stack([-((x_D - code) ** 2).sum() / (6 * TEMPERATURE) for code in codes])
        p = scores.exp() / scores.exp().sum()
        for k in range(5):
            # dp_j / ds_k = p_j ([j = k] - p_k), ds_k / dv_k = 2 (x - v_k) / (6 t)
            wanted[k] += upstream * p[j] * (float(j == k) - p[k]) * 2 * (x_D - codes[k]) / (6 * TEMPERATURE)
    torch.testing.assert_close(made.codebook_CD.grad.double(), wanted, atol=1e-5, rtol=1e-4)
    assert wanted.abs().max() > 0.01


def test_a_code_whose_expert_helps_comes_nearer(seeded):
    made, x_ND = Task(SimpleNamespace(codes=2, dead_share=0.0), 6), torch.zeros(1, 6)
    with torch.no_grad():
        made.codebook_CD.copy_(torch.tensor([[0.3], [-0.4]]).expand(2, 6))
    (-made.eval()(x_ND).weight_N1).sum().backward()  # a larger weight lowers the loss
    step_CD = -made.codebook_CD.grad
    assert (step_CD[0] < 0).all()
    assert (step_CD[1] < 0).all()
