import torch

from pipeline.moe.quantizers.kmeans import kmeans


def test_separated_centres_are_found(seeded):
    centres = 10 * torch.eye(4, 6)
    found = kmeans(centres.repeat_interleave(50, 0) + 0.1 * torch.randn(200, 6), 4)
    assert torch.cdist(centres, found).amin(1).max() < 0.1


def test_constant_input_and_too_few_tokens(seeded):
    assert torch.equal(kmeans(torch.ones(3, 2), 5), torch.ones(5, 2))


def test_kept_centres_stay_and_the_others_go_elsewhere(seeded):
    centres = 10 * torch.eye(4, 6)
    x_ND = centres.repeat_interleave(50, 0) + 0.1 * torch.randn(200, 6)
    kept_C = torch.tensor([True, False, True, True])
    found = kmeans(x_ND, 4, kept_CD=centres[[3, 0, 2]] + 0.2, kept_C=kept_C)
    assert torch.equal(found[kept_C], centres[[3, 0, 2]] + 0.2)
    assert torch.dist(found[1], centres[1]) < 0.1
