import torch

from pipeline.moe.chance import happens, settled


def test_it_happens_as_often_as_it_should(seeded):
    for probability in (0.0, 0.3, 1.0):
        assert abs(sum(happens(probability) for _ in range(2000)) / 2000 - probability) < 0.05


def test_it_may_be_settled_but_what_cannot_happen_does_not(seeded):
    with settled(True):
        assert happens(1e-9) and not happens(0.0)
        with settled(False):
            assert not happens(1.0)
        assert happens(1e-9)
    assert happens(1.0) and not happens(1e-9)


def test_settings_change_no_other_draw():
    drawn = []
    for probability, outcome in ((0.0, True), (0.5, True), (0.5, False)):
        torch.manual_seed(0)
        with settled(outcome):
            happens(probability)
        drawn.append(torch.rand(()).item())
    assert len(set(drawn)) == 1
