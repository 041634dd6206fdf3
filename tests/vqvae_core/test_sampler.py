import itertools

import torch

from tests.vqvae_core.test_pixelcnn import CONFIGS, prior
from vqvae_core.sampler import sample


def test_a_sample_depends_on_its_own_seed_only() -> None:
    model = prior(CONFIGS["three layers"], 3, 4, num_codes=7)
    together, nll = sample(model, [5, 6, 7])
    alone, nll_alone = sample(model, [6])
    assert torch.equal(together[1:2], alone)
    torch.testing.assert_close(nll[1:2], nll_alone)
    assert len({tuple(tokens.flatten().tolist()) for tokens in together}) == 3


def test_the_log_likelihood_is_the_priors() -> None:
    model = prior(CONFIGS["wide first"], 3, 5, num_codes=4, num_classes=2)
    labels = torch.tensor([0, 1])
    tokens, nll = sample(model, [1, 2], labels, temperature=0.7)
    torch.testing.assert_close(nll, model.nll_nats(tokens, labels).sum(dim=(1, 2)))


def test_frequencies_follow_the_distribution() -> None:
    """Chi-squared of 4,000 draws on 1x2 sites of 3 codes, 8 degrees of freedom: 26.1 is the 99.9 % point."""
    model = prior(CONFIGS["one layer"], 1, 2, num_codes=3)
    grids = torch.tensor(list(itertools.product(range(3), repeat=2))).view(-1, 1, 2)
    expected = (-model.nll_nats(grids).sum(dim=(1, 2))).exp().detach() * 4000
    tokens, _ = sample(model, list(range(4000)))
    found = torch.bincount(tokens[:, 0, 0] * 3 + tokens[:, 0, 1], minlength=9)
    assert ((found - expected).square() / expected).sum() < 26.1
