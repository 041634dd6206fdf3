"""Probabilities of pixel values: they sum to 1, and are those of scipy."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from vqvae_core.contender import figures
from vqvae_core.images import images_to_pixels, pixels_to_images
from vqvae_core.likelihood import (
    Categorical,
    DiscretizedGaussian,
    LikelihoodConfig,
    LogisticMixture,
    bits_per_dim,
    gaussian_nll_nats,
    log_one_minus_exp,
    make_likelihood,
)
from vqvae_core.quantizer import QuantizerConfig
from vqvae_core.vqvae import VQVAE, VQVAEConfig

KINDS = {
    "gaussian": LikelihoodConfig(kind="gaussian"),
    "gaussian, learned": LikelihoodConfig(kind="gaussian", learn_sigma=True),
    "logistic": LikelihoodConfig(kind="logistic"),
    "mixture": LikelihoodConfig(kind="logistic", num_mixtures=4),
    "categorical": LikelihoodConfig(kind="categorical"),
}
EVERY = torch.arange(256, dtype=torch.uint8)


def every_value(dtype: torch.dtype) -> torch.Tensor:
    """256 images (256, 3, 1, 1), each of one value."""
    return pixels_to_images(EVERY[:, None, None, None].expand(256, 1, 1, 3)).to(dtype)


def mass(likelihood: torch.nn.Module, output: torch.Tensor) -> torch.Tensor:
    """The probability of each value (256,) of the first sub-pixel, where all three have the same output (C,)."""
    told = output[:, None, None].expand(256, -1, 1, 1)
    return (-likelihood.nll_nats(told, every_value(output.dtype)).detach() / 3).exp()  # type: ignore[operator]


def test_integer_targets_come_back_from_images() -> None:
    assert torch.equal(images_to_pixels(every_value(torch.float32))[:, 0, 0, 0], EVERY)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spread", [0.1, 3.0])
def test_the_probabilities_of_a_pixel_sum_to_1(kind: str, spread: float) -> None:
    likelihood = make_likelihood(KINDS[kind], 0.3).double()
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        shared = torch.randn(likelihood.num_channels // 3, 1, generator=generator, dtype=torch.float64) * spread
        found = mass(likelihood, shared.expand(-1, 3).reshape(-1))
        assert float(found.sum()) == pytest.approx(1, abs=1e-10)
        assert bool((found >= 0).all())


@pytest.mark.parametrize("mean", [-1.4, -1.0, -0.2, 0.0031, 0.7, 1.0, 1.3])
@pytest.mark.parametrize("log_scale", [-5.0, -2.0, 0.5])
def test_a_discretized_logistic_is_that_of_scipy(mean: float, log_scale: float) -> None:
    """In bits, to 1e-6, edge bins included: the bins of values 0 and 255 reach to infinity."""
    output = torch.tensor([mean] * 3 + [log_scale] * 3, dtype=torch.float64)
    found = -mass(LogisticMixture(1).double(), output).log2().numpy()
    known = scipy.stats.logistic(mean, math.exp(log_scale))
    edges = (np.arange(1, 256) - 0.5) / 127.5 - 1
    # Of both tails the one that is not close to 1.
    below, above = known.cdf(edges), known.sf(edges)
    middle = np.where(edges[1:] < mean, below[1:] - below[:-1], above[:-1] - above[1:])
    expected = -np.log2(np.concatenate([[below[0]], middle, [above[-1]]]))
    held = expected < 300  # beyond it scipy's difference of two tails loses digits
    assert held.sum() > 30
    np.testing.assert_allclose(found[held], expected[held], rtol=0, atol=1e-6)


@pytest.mark.parametrize("sigma", [0.02, 0.3, 2.0])
@pytest.mark.parametrize("mean", [-1.1, 0.013, 0.9])
def test_a_discretized_gaussian_is_that_of_scipy(mean: float, sigma: float) -> None:
    likelihood = DiscretizedGaussian(sigma, learned=False).double()
    likelihood.log_sigma.data = torch.tensor(math.log(sigma), dtype=torch.float64)
    found = -mass(likelihood, torch.full((3,), mean, dtype=torch.float64)).log2().numpy()
    known = scipy.stats.norm(mean, sigma)
    edges = (np.arange(1, 256) - 0.5) / 127.5 - 1
    below, above = known.cdf(edges), known.sf(edges)
    middle = np.where(edges[1:] < mean, below[1:] - below[:-1], above[:-1] - above[1:])
    with np.errstate(divide="ignore"):
        expected = -np.log2(np.concatenate([[below[0]], middle, [above[-1]]]))
    held = expected < 300
    assert held.sum() > 20
    np.testing.assert_allclose(found[held], expected[held], rtol=0, atol=1e-6)


def test_a_uniform_model_costs_8_bits_exactly() -> None:
    output, images = torch.zeros(2, 768, 4, 4), pixels_to_images(torch.randint(0, 256, (2, 4, 4, 3)).to(torch.uint8))
    nll = Categorical().double().nll_nats(output.double(), images.double())
    assert bits_per_dim(float(nll.mean()), 48) == pytest.approx(8, abs=1e-12)


def test_a_categorical_is_its_softmax() -> None:
    logits = torch.randn(256, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    pixels = torch.tensor([[[[3, 77, 255]]]], dtype=torch.uint8)
    found = Categorical().nll_nats(logits.reshape(1, 768, 1, 1), pixels_to_images(pixels).double())
    expected = -sum(float(logits.log_softmax(dim=0)[value, channel]) for channel, value in enumerate((3, 77, 255)))
    assert float(found) == pytest.approx(expected, abs=1e-12)


def test_a_mixture_is_the_sum_of_its_parts() -> None:
    generator = torch.Generator().manual_seed(2)
    output = torch.randn(3, 3, 3, dtype=torch.float64, generator=generator)  # means, scales, weights; M; channels
    output[:, :, 1:] = output[:, :, :1]
    found = mass(LogisticMixture(3), output.reshape(-1))
    weights = output[2, :, 0].softmax(dim=0)
    parts = [mass(LogisticMixture(1), output[:2, part].reshape(-1)) for part in range(3)]
    torch.testing.assert_close(found, sum(w * p for w, p in zip(weights, parts, strict=True)))


@pytest.mark.parametrize("kind", KINDS)
def test_fp32_is_close_to_fp64_and_gradients_are_finite(kind: str) -> None:
    """At edges, far tails and narrow scales too."""
    likelihood = make_likelihood(KINDS[kind], 0.05)
    generator = torch.Generator().manual_seed(3)
    images = pixels_to_images(torch.tensor([0, 255, 128, 1, 254, 90], dtype=torch.uint8).expand(8, 6, 6).reshape(
        8, 6, 6, 1).expand(8, 6, 6, 3))  # fmt: skip
    output = (torch.randn(8, likelihood.num_channels, 6, 6, generator=generator) * 3).requires_grad_()
    nll = likelihood.nll_nats(output, images)
    (gradient,) = torch.autograd.grad(nll.sum(), output)
    assert bool(gradient.isfinite().all()) and bool(nll.isfinite().all())
    double = make_likelihood(KINDS[kind], 0.05).double().nll_nats(output.double(), images.double())
    torch.testing.assert_close(nll.double(), double, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_an_island_of_fp32(kind: str) -> None:
    likelihood = make_likelihood(KINDS[kind], 0.3)
    output = torch.randn(2, likelihood.num_channels, 4, 4)
    images = pixels_to_images(torch.randint(0, 256, (2, 4, 4, 3)).to(torch.uint8))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(
            likelihood.nll_nats(output, images), make_likelihood(KINDS[kind], 0.3).nll_nats(output, images)
        )
        assert likelihood.nll_nats(output, images).dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_is_that_of_the_probabilities(kind: str) -> None:
    likelihood = make_likelihood(KINDS[kind], 0.05).double()
    shared = torch.full((likelihood.num_channels // 3, 1), 0.1, dtype=torch.float64)
    if kind in ("logistic", "mixture"):
        shared[likelihood.num_mixtures :] = -3.5  # narrow: the edges take nothing
    output = shared.expand(-1, 3).reshape(-1)
    expected = float((mass(likelihood, output) * every_value(torch.float64)[:, 0, 0, 0]).sum())
    found = likelihood.mean(output[None, :, None, None])
    assert found.shape == (1, 3, 1, 1)
    assert found.flatten().tolist() == pytest.approx([expected] * 3, abs=2e-3)


def test_only_a_density_has_no_bits() -> None:
    density = make_likelihood(LikelihoodConfig(), 0.5)
    assert not density.has_bits and all(make_likelihood(config, 0.5).has_bits for config in KINDS.values())
    mean, images = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    expected = -scipy.stats.norm(mean.numpy(), 0.5).logpdf(images.numpy()).sum(axis=(1, 2, 3))
    np.testing.assert_allclose(density.nll_nats(mean, images).numpy(), expected, rtol=1e-5)
    torch.testing.assert_close(gaussian_nll_nats(mean, images, 0.5), density.nll_nats(mean, images))


@pytest.mark.parametrize("kind", KINDS)
def test_bins_are_never_in_bf16(kind: str) -> None:
    """Under autocast a decoder gives means and scales in fp32; the logits of a softmax may be in bf16, and cost the
    same nats to a hundredth."""
    config = VQVAEConfig(hidden_channels=8, residual_channels=4, num_residual_blocks=1, likelihood=KINDS[kind],
                         quantizer=QuantizerConfig(num_codes=8, code_dim=4, init="uniform"))  # fmt: skip
    torch.manual_seed(0)
    model = VQVAE(config).eval()
    images = pixels_to_images(torch.randint(0, 256, (4, 16, 16, 3)).to(torch.uint8))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        decoded = model.decoder(torch.randn(4, 4, 4, 4))
        output = model(images)
    assert decoded.dtype == (torch.bfloat16 if kind == "categorical" else torch.float32)
    assert (output.mean is None) == (kind == "categorical")
    assert output.nll_nats.dtype == torch.float32
    with torch.no_grad():
        assert float(output.nll_nats) == pytest.approx(float(model(images).nll_nats), rel=1e-2)


def test_log_one_minus_exp() -> None:
    x = torch.tensor([1e-12, 1e-3, 0.5, 1.0, 30.0, 800.0], dtype=torch.float64, requires_grad=True)
    expected = [math.log(-math.expm1(-value)) if value < 30 else math.log1p(-math.exp(-value)) for value in x.tolist()]
    assert log_one_minus_exp(x).tolist() == pytest.approx(expected, rel=1e-12)
    (gradient,) = torch.autograd.grad(log_one_minus_exp(x).sum(), x)
    assert bool(gradient.isfinite().all())


def test_a_vqvae_of_one_code_costs_its_reconstruction() -> None:
    """K = 1: log K is 0, so that the total is the reconstruction."""
    config = VQVAEConfig(
        hidden_channels=8, residual_channels=4, num_residual_blocks=1, likelihood=LikelihoodConfig(kind="categorical"),
        quantizer=QuantizerConfig(num_codes=1, code_dim=4, init="uniform"),
    )  # fmt: skip
    model = VQVAE(config).eval()
    pixels = torch.randint(0, 256, (2, 16, 16, 3)).to(torch.uint8)
    tokens = model.encode(pixels)
    assert int(tokens.max()) == 0
    output = model.decoder(model.quantizer.lookup(tokens)).detach()
    by_hand = -output.unflatten(1, (256, 3)).log_softmax(dim=1).gather(1, pixels.movedim(-1, 1).long()[:, None]).sum()
    found = figures("vqvae", model, pixels, (1,), "fp32", "cpu", 64)
    assert found["latents_bits_per_dim"] == 0
    assert found["total_bits_per_dim"] == found["reconstruction_bits_per_dim"]
    expected = bits_per_dim(float(by_hand) / 2, pixels[0].numel())
    assert found["total_bits_per_dim"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_mixtures": 0}, "num_mixtures must be at least 1, was 0"),
        ({"num_mixtures": 2}, "num_mixtures belongs to the kind logistic, the kind was density"),
        ({"kind": "logistic", "learn_sigma": True}, "learn_sigma belongs to the kind gaussian, the kind was logistic"),
    ],
)
def test_bad_values(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LikelihoodConfig(**fields)
