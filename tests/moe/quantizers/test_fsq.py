from types import SimpleNamespace

import pytest
import torch

from pipeline.moe.quantizers.fsq import Fsq


def _made(codes, width=10):
    return Fsq(SimpleNamespace(codes=codes, dead_share=0.1), width)


@pytest.mark.parametrize(
    ("codes", "levels"), [(2, [2]), (8, [2, 2, 2]), (12, [3, 2, 2]), (30, [5, 3, 2]), (7, [7]), (256, [2] * 8)]
)
def test_the_levels_of_the_digits_make_the_number_of_codes(codes, levels, seeded):
    made = _made(codes)
    assert made.grid._levels.tolist() == levels
    x_ND = 2 * torch.randn(20000, 10)
    assert sorted(made.eval()(x_ND).code_N.unique().tolist())[-1] < codes


@pytest.mark.parametrize("codes", [8, 12, 32])
def test_it_starts_with_every_code_in_use(codes, seeded):
    made, x_ND = _made(codes), torch.randn(4000, 10) @ torch.randn(10, 10) + 5
    made.start(x_ND)
    assert torch.bincount(made.nearest(x_ND), minlength=codes).min() > 0.5 * 4000 / codes
    # The first digits are the directions in which the tokens vary most: so little is nearer by chance.
    assert made.eval()(x_ND).error < 0.8 * x_ND.var(0).mean()


def test_the_task_trains_the_projection_and_the_tokens(seeded):
    made, x_ND = _made(8), torch.randn(40, 10, requires_grad=True)
    torch.nn.init.normal_(made.embedding.weight)
    answer = made.train()(x_ND)
    answer.embedding_ND.square().sum().backward()
    assert made.down.weight.grad.abs().max() > 0
    assert x_ND.grad.abs().max() > 0
    made.zero_grad()
    x_ND.grad = None
    made(x_ND).losses["codebook"].backward()
    assert made.down.weight.grad is None
    assert x_ND.grad is None
    assert made.up.weight.grad.abs().max() > 0


def test_centring_anew_leaves_a_good_projection_almost_alone(seeded):
    made, x_ND = _made(8), torch.randn(4000, 10)
    made.start(x_ND)
    before, codes = made.down.weight.clone(), made.nearest(x_ND)
    with torch.no_grad():
        made._spread(x_ND)
    torch.testing.assert_close(made.down.weight, before, atol=1e-4, rtol=1e-4)
    assert (made.nearest(x_ND) == codes).float().mean() > 0.99


def test_codes_that_no_projection_fills_leave_it_alone(seeded):
    """Six clusters never fill 32 codes, however often they are spread."""
    made, centre_KD, moved = _made(32).train(), 5 * torch.randn(6, 10), 0
    for _ in range(200):
        before = made.down.weight.clone()
        made(centre_KD[torch.randint(6, (512,))] + 0.1 * torch.randn(512, 10))
        moved += not torch.equal(made.down.weight, before)
    assert made.share_C.gt(0.01).sum() >= 6
    assert moved == 1  # the start


def test_tokens_that_have_left_the_grid_are_spread_anew(seeded):
    made, x_ND = _made(32).train(), torch.randn(4000, 10)
    made(x_ND)
    assert torch.bincount(made.nearest(x_ND + 5), minlength=32).min() == 0
    for _ in range(30):
        made(x_ND + 5)
    assert torch.bincount(made.nearest(x_ND + 5), minlength=32).min() > 0.5 * 4000 / 32
