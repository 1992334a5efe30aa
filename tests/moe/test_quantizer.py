import torch

from pipeline.moe.quantizer import VectorQuantizer, kmeans


def _blobs(codes=4, each=50, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = 10 * torch.eye(codes, 6)
    return centres, (centres.repeat_interleave(each, 0) + 0.1 * torch.randn(codes * each, 6, generator=generator))


def test_nearest_against_loops():
    torch.manual_seed(0)
    quantizer = VectorQuantizer(7, 5, 0.0)
    x_ND = torch.randn(40, 5)
    naive = [min(range(7), key=lambda c: ((x - quantizer.codebook_CD[c]) ** 2).sum().item()) for x in x_ND]
    assert quantizer.nearest(x_ND).tolist() == naive


def test_kmeans_finds_separated_centres():
    torch.manual_seed(0)
    centres, x_ND = _blobs()
    found = kmeans(x_ND, 4)
    assert torch.cdist(centres, found).amin(1).max() < 0.1


def test_kmeans_survives_constant_input_and_too_few_tokens():
    torch.manual_seed(0)
    assert torch.equal(kmeans(torch.ones(3, 2), 5), torch.ones(5, 2))


def test_first_training_batch_starts_the_codebook_and_evaluation_does_not():
    torch.manual_seed(0)
    _, x_ND = _blobs()
    quantizer = VectorQuantizer(4, 6, 0.0)
    quantizer.eval()(x_ND)
    assert not quantizer.started
    quantized = quantizer.train()(x_ND)
    assert quantizer.started
    assert quantized.codebook_loss < 0.05
    assert len(quantized.code_N.unique()) == 4


def test_dead_codes_are_reseeded_and_frozen_ones_are_not():
    torch.manual_seed(0)
    _, x_ND = _blobs()
    quantizer = VectorQuantizer(4, 6, dead_share=0.5).train()
    quantizer.start(x_ND)
    with torch.no_grad():
        quantizer.codebook_CD[2] = 1000.0
    for _ in range(200):
        quantizer(x_ND)
    assert torch.bincount(quantizer(x_ND).code_N, minlength=4).min() > 0
    quantizer.freeze()
    with torch.no_grad():
        quantizer.codebook_CD[2] = 1000.0
    for _ in range(200):
        quantizer(x_ND)
    assert (quantizer.codebook_CD[2] == 1000.0).all()
    assert not quantizer.codebook_CD.requires_grad


def test_codebook_learns_from_its_loss():
    torch.manual_seed(0)
    _, x_ND = _blobs()
    quantizer = VectorQuantizer(4, 6, 0.0).train()
    quantizer.start(x_ND)
    with torch.no_grad():
        quantizer.codebook_CD.add_(torch.randn_like(quantizer.codebook_CD))
    before = quantizer(x_ND).codebook_loss.item()
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=5.0)
    for _ in range(20):
        optimizer.zero_grad()
        quantizer(x_ND).codebook_loss.backward()
        optimizer.step()
    assert quantizer(x_ND).codebook_loss.item() < 0.1 * before


def test_repair_brings_dead_codes_back_and_leaves_the_living_ones():
    torch.manual_seed(0)
    centres, x_ND = _blobs()
    quantizer = VectorQuantizer(4, 6, 0.0).train()
    with torch.no_grad():
        quantizer.codebook_CD.copy_(centres + 0.2)
        quantizer.codebook_CD[3] = 1000.0
    quantizer.started.fill_(True)
    quantizer.repair(x_ND)
    assert torch.equal(quantizer.codebook_CD[:3], (centres + 0.2)[:3])
    assert torch.cdist(centres[3:], quantizer.codebook_CD[3:]).item() < 0.1
    assert torch.bincount(quantizer.nearest(x_ND), minlength=4).tolist() == [50, 50, 50, 50]
    repaired = quantizer.codebook_CD.clone()
    quantizer.repair(x_ND)
    assert torch.equal(quantizer.codebook_CD, repaired)


def test_repair_starts_an_unstarted_codebook():
    torch.manual_seed(0)
    centres, x_ND = _blobs()
    quantizer = VectorQuantizer(4, 6, 0.0)
    quantizer.repair(x_ND)
    assert quantizer.started
    assert torch.cdist(centres, quantizer.codebook_CD).amin(1).max() < 0.1


def test_state_survives_save_and_load():
    torch.manual_seed(0)
    _, x_ND = _blobs()
    quantizer = VectorQuantizer(4, 6, 0.5).train()
    quantizer(x_ND)
    quantizer.freeze()
    copy = VectorQuantizer(4, 6, 0.5).train()
    copy.load_state_dict(quantizer.state_dict())
    assert copy.started
    assert copy.frozen
    assert torch.equal(copy.share_C, quantizer.share_C)
    assert torch.equal(copy(x_ND).code_N, quantizer(x_ND).code_N)
