"""VIMCO against a model whose latents can be enumerated, and against numpy."""

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from vqvae_core.bound_training import BoundTraining
from vqvae_core.images import pixels_to_images
from vqvae_core.latent_model import decodings_in
from vqvae_core.likelihood import LikelihoodConfig
from vqvae_core.noise import place_seeds
from vqvae_core.quantizer import QuantizerConfig
from vqvae_core.train import Worker
from vqvae_core.vimco import (
    CategoricalVIMCO,
    GaussianVIMCO,
    drawn_tokens,
    learning_signal,
    multi_sample_bound,
    vimco_output,
)
from vqvae_core.vqvae import VQVAEConfig

K, G = 3, 2
CONFIG = VQVAEConfig(
    hidden_channels=6, residual_channels=4, num_residual_blocks=1, likelihood=LikelihoodConfig(kind="logistic"),
    quantizer=QuantizerConfig(num_codes=K, code_dim=2, num_groups=G),
)  # fmt: skip


def tiny() -> tuple[CategoricalVIMCO, torch.Tensor]:
    """A model of one site with G = 2 latents of K = 3, sharp enough that draws matter, and one image."""
    torch.manual_seed(0)
    model = CategoricalVIMCO(CONFIG).double()
    with torch.no_grad():
        model.encoder.project.bias.copy_(torch.tensor([1.0, 0.0, -0.5, 0.3, -1.0, 0.7]))
        model.decoder.expand.weight.mul_(6)
        model.decoder.conv_out.bias[3:] -= 1.0
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(60, 200, (1, 4, 4, 3), generator=generator, dtype=torch.uint8)
    return model, pixels_to_images(pixels).double()


def enumerated(model: CategoricalVIMCO, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """log q(z | x) and log p(x, z) of all K^G values of z."""
    log_shares = model.encoder(image)[0, :, 0, 0].view(G, K).log_softmax(dim=1)
    log_q, log_joint = [], []
    for codes in itertools.product(range(K), repeat=G):
        rows = torch.cat([model.tables[group * K + code] for group, code in enumerate(codes)])
        nll = model.likelihood.nll_nats(model.decoder(rows[None, :, None, None]), image)[0]
        log_q.append(sum(log_shares[group, code] for group, code in enumerate(codes)))
        log_joint.append(-nll - G * math.log(K))
    return torch.stack(log_q), torch.stack(log_joint)


def expected_bound(log_q: torch.Tensor, log_joint: torch.Tensor, samples: int) -> torch.Tensor:
    """E[L] over all draws of S samples."""
    log_w = log_joint - log_q
    total = torch.zeros((), dtype=torch.float64)
    for chosen in itertools.product(range(len(log_q)), repeat=samples):
        index = torch.tensor(chosen)
        total = total + log_q[index].sum().exp() * (torch.logsumexp(log_w[index], 0) - math.log(samples))
    return total


def flat(gradients) -> torch.Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients])


@pytest.mark.parametrize("samples", [2, 3])
def test_the_gradient_is_exact_in_expectation(samples: int) -> None:
    """The estimator over all draws, each by its probability, is the gradient of E[L]: to rounding."""
    model, image = tiny()
    parameters = list(model.parameters())
    log_q, log_joint = enumerated(model, image)
    exact = flat(torch.autograd.grad(expected_bound(log_q, log_joint, samples), parameters, retain_graph=True))
    draws = torch.tensor(list(itertools.product(range(len(log_q)), repeat=samples)))
    output = vimco_output((log_joint - log_q)[draws], log_q[draws])
    chances = log_q.detach()[draws].sum(dim=1).exp()
    assert float(chances.sum()) == pytest.approx(1)
    found = flat(torch.autograd.grad(-(chances * output.loss_nats).sum(), parameters))
    error = float((found - exact).norm() / exact.norm())
    print(f"S = {samples}: the gradient is exact to {error:.1e} of its length, over {len(draws)} draws of S samples")
    assert error < 1e-9
    assert float(exact.norm()) > 0.1


def test_the_gradient_of_the_model_is_exact_in_the_mean_over_many_draws() -> None:
    """The same with the model's own draws, by noise."""
    model, image = tiny()
    parameters = list(model.parameters())
    exact = flat(torch.autograd.grad(expected_bound(*enumerated(model, image), 2), parameters))
    total, count = torch.zeros_like(exact), 0
    for part in range(6):
        images = image.expand(5000, -1, -1, -1)
        noise = model.noise(place_seeds(5000 * part, 5000, 5), 2, (1, 1))
        loss = model(images, noise).loss_nats.mean()
        total += flat(torch.autograd.grad(-loss, parameters))
        count += 1
    error = float((total / count - exact).norm() / exact.norm())
    print(f"over 30,000 draws the mean gradient is {error:.2e} of its length from the exact one")
    assert error < 0.02


def test_the_bound_is_below_the_likelihood_and_tightens() -> None:
    model, image = tiny()
    with torch.no_grad():
        log_q, log_joint = enumerated(model, image)
        exact = float(torch.logsumexp(log_joint, 0))
        bounds = [float(expected_bound(log_q, log_joint, samples)) for samples in (1, 2, 3, 4)]
    print(f"log p(x) = {exact:.4f}; bounds of 1 to 4 samples: {', '.join(f'{bound:.4f}' for bound in bounds)}")
    assert bounds == sorted(bounds) and bounds[-1] <= exact
    assert bounds[3] - bounds[0] > 0.05
    with torch.no_grad():
        noise = model.noise(place_seeds(0, 4000, 2), 4, (1, 1))
        found = model(image.expand(4000, -1, -1, -1), noise).bound_nats
    assert float(found.mean()) == pytest.approx(bounds[3], abs=5 * float(found.std()) / 4000**0.5)


def test_the_signal_is_that_of_numpy() -> None:
    log_w = np.random.default_rng(0).normal(-1e4, 30, (5, 7))
    bound, signal = np.zeros(5), np.zeros((5, 7))
    for row, values in enumerate(log_w):
        bound[row] = np.logaddexp.reduce(values) - np.log(7)
        for sample in range(7):
            other = values.copy()
            other[sample] = np.delete(values, sample).mean()
            signal[row, sample] = bound[row] - (np.logaddexp.reduce(other) - np.log(7))
    tensor = torch.from_numpy(log_w)
    np.testing.assert_allclose(multi_sample_bound(tensor).numpy(), bound, rtol=1e-14)
    np.testing.assert_allclose(learning_signal(tensor).numpy(), signal, atol=1e-8)


def test_nats_in_fp32_are_summed_in_double() -> None:
    """At -1e4 nats fp32 has steps of 1e-3: the bound of equal weights is exact all the same."""
    weights = torch.full((1, 50), -10000.123, dtype=torch.float32)
    assert float(multi_sample_bound(weights)) == pytest.approx(float(weights[0, 0]), abs=1e-9)


def test_the_decoder_learns_from_the_weights_and_the_encoder_from_the_signal() -> None:
    model, image = tiny()
    noise = model.noise([0], 4, (1, 1))
    model(image, noise).loss_nats.sum().backward()
    for part in (model.encoder, model.decoder):
        assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in part.parameters())
    assert model.tables.grad is not None and bool(model.tables.grad.any())


def test_draws_follow_their_shares() -> None:
    shares = torch.tensor([[0.5, 0.0, 0.3, 0.2, 0.0]], dtype=torch.float64)
    places = torch.rand(1, 40000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts = torch.bincount(drawn_tokens(shares.log(), places)[0], minlength=5)
    expected = 40000 * shares[0, [0, 2, 3]]
    assert float(((counts[[0, 2, 3]] - expected).square() / expected).sum()) < 20
    assert counts[1] == counts[4] == 0
    ends = torch.tensor([[0.0, 0.5, 0.8, 1 - 2**-53]], dtype=torch.float64)
    assert drawn_tokens(shares.log(), ends).tolist() == [[0, 2, 3, 3]]


@pytest.mark.parametrize("kind", [CategoricalVIMCO, GaussianVIMCO])
def test_parts_of_the_decodings_equal_the_whole(kind: type) -> None:
    """Values and gradients, whatever is computed twice."""
    torch.manual_seed(0)
    model = kind(CONFIG).double()
    images = pixels_to_images(torch.randint(0, 256, (3, 8, 12, 3), dtype=torch.uint8)).double()
    noise = model.noise([1, 2, 3], 5, (2, 3))
    found = []
    for at_once in (None, 1, 4, 7):
        output = model(images, noise, at_once)
        gradient = flat(torch.autograd.grad(output.loss_nats.sum(), list(model.parameters())))
        found.append((output.bound_nats, gradient))
    for bound, gradient in found[1:]:
        torch.testing.assert_close(bound, found[0][0], rtol=1e-12, atol=0)
        assert float((gradient - found[0][1]).norm() / gradient.norm()) < 1e-10


def test_a_gaussian_posterior_has_the_density_of_torch() -> None:
    torch.manual_seed(0)
    model = GaussianVIMCO(CONFIG).double()
    images = pixels_to_images(torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)).double()
    latents, log_q, log_p = model.draws(images, model.noise([1, 2], 4, (2, 2)))
    assert not latents.requires_grad and log_q.requires_grad
    mean, log_sigma = model.encoder(images).chunk(2, dim=1)
    normal = torch.distributions.Normal(mean[:, None], log_sigma.exp()[:, None])
    torch.testing.assert_close(log_q, normal.log_prob(latents).sum(dim=(2, 3, 4)))
    standard = torch.distributions.Normal(0.0, 1.0).log_prob(latents).sum(dim=(2, 3, 4))
    torch.testing.assert_close(log_p, standard)


def kept_bytes(model: CategoricalVIMCO, num_decodings: int, at_once: int | None) -> int:
    """What is kept for the gradient of so many decodings of a 32x32 image, beside weights and latents."""
    latents = torch.randn(1, num_decodings, CONFIG.quantizer.channels, 8, 8, requires_grad=True)
    images = pixels_to_images(torch.zeros(1, 32, 32, 3, dtype=torch.uint8))
    ours = {tensor.untyped_storage().data_ptr() for tensor in (latents, images, *model.parameters())}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.decode_nats(latents, images, at_once)
    return sum(kept.values())


@pytest.mark.parametrize("kind", ["logistic", "gaussian", "categorical"])
def test_decodings_within_a_limit_of_memory(kind: Any) -> None:
    """As many as the limit says keep less than it, and an eighth of it or more; of twice as many nothing is kept but
    what they are computed from again."""
    config = replace(CONFIG, likelihood=LikelihoodConfig(kind=kind))
    model, limit = CategoricalVIMCO(config), 16
    at_once = decodings_in(limit, config, 32, 32)
    kept = kept_bytes(model, at_once, at_once)
    assert limit * 2**20 / 8 < kept < limit * 2**20
    assert kept_bytes(model, 2 * at_once, at_once) < kept / 4
    assert decodings_in(0, config, 32, 32) == 1


@pytest.mark.parametrize("kind", [CategoricalVIMCO, GaussianVIMCO])
def test_one_sample_trains_no_vimco(kind: type) -> None:
    with pytest.raises(ValueError, match="num_samples of VIMCO must be at least 2, was 1"):
        BoundTraining(kind(CONFIG), num_samples=1, seed=0, precision="fp32", worker=Worker(),
                      validation=torch.zeros(1, 8, 8, 3, dtype=torch.uint8))  # fmt: skip
