import pytest
import torch

from vqvae_core.bound_training import measure
from vqvae_core.gaussian import Gaussian, normal_log_prob
from vqvae_core.images import pixels_to_images
from vqvae_core.likelihood import LikelihoodConfig
from vqvae_core.noise import drawn_by, place_seeds
from vqvae_core.quantizer import QuantizerConfig
from vqvae_core.vae import VAE
from vqvae_core.vimco import CategoricalVIMCO, multi_sample_bound
from vqvae_core.vqvae import VQVAEConfig

CONFIG = VQVAEConfig(
    hidden_channels=6, residual_channels=4, num_residual_blocks=1, likelihood=LikelihoodConfig(kind="logistic"),
    quantizer=QuantizerConfig(num_codes=8, code_dim=2, num_groups=2),
)  # fmt: skip
PIXELS = torch.randint(0, 256, (130, 8, 8, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_the_divergence_is_that_of_torch() -> None:
    mean, log_sigma = torch.randn(5, 4, 2, 3, dtype=torch.float64), torch.randn(5, 4, 2, 3, dtype=torch.float64)
    normal, standard = torch.distributions.Normal(mean, log_sigma.exp()), torch.distributions.Normal(0.0, 1.0)
    expected = torch.distributions.kl_divergence(normal, standard).sum(dim=(1, 2, 3))
    torch.testing.assert_close(Gaussian(mean, log_sigma).kl_nats(), expected)
    z = torch.randn_like(mean)
    torch.testing.assert_close(normal_log_prob(z, mean, log_sigma), normal.log_prob(z))
    torch.testing.assert_close(normal_log_prob(z), standard.log_prob(z))


def test_the_elbo_is_the_mean_of_the_log_weights() -> None:
    """nll + KL in closed form against the mean of -log w over many draws: the same number."""
    torch.manual_seed(0)
    model = VAE(CONFIG).double()
    images = pixels_to_images(PIXELS[:2]).double()
    noise = model.noise(place_seeds(0, 2, 1), 4000, (2, 2))
    with torch.no_grad():
        output = model(images, noise)
        latents, log_q, log_p = model.draws(images, noise)
        log_w = -model.decode_nats(latents, images) + log_p - log_q
    error = log_w.std(dim=1) / 4000**0.5
    assert bool(((output.nll_nats + output.kl_nats + log_w.mean(dim=1)).abs() < 5 * error).all())
    assert bool((multi_sample_bound(log_w) >= log_w.mean(dim=1)).all())


def test_the_encoder_learns_through_the_draw() -> None:
    torch.manual_seed(0)
    model = VAE(CONFIG)
    noise = model.noise(place_seeds(0, 2, 1), 1, (2, 2))
    model(pixels_to_images(PIXELS[:2]), noise).nll_nats.sum().backward()
    assert all(bool(p.grad.any()) for p in model.encoder.parameters())  # type: ignore[union-attr]


def test_noise_belongs_to_a_place_in_the_global_batch() -> None:
    whole = drawn_by(place_seeds(0, 12, 7, 5), (3, 2))
    assert torch.equal(torch.cat([drawn_by(place_seeds(first, 4, 7, 5), (3, 2)) for first in (0, 4, 8)]), whole)
    assert not torch.equal(drawn_by(place_seeds(0, 12, 8, 5), (3, 2)), whole)
    assert len({tuple(row.flatten().tolist()) for row in whole}) == 12
    many = drawn_by(place_seeds(0, 4000, 1), (2,))
    assert abs(float(many.mean())) < 0.05 and float(many.std()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("at_once", [None, 3])
def test_a_measured_bound_does_not_depend_on_memory(at_once: int | None) -> None:
    torch.manual_seed(0)
    model = CategoricalVIMCO(CONFIG).eval()
    found = measure(model, PIXELS, (1, 4), "fp32", at_once=at_once)
    other = measure(model, PIXELS, (1, 4), "fp32", at_once=50)
    assert found.bits_per_dim == pytest.approx(other.bits_per_dim, rel=1e-6)
    assert found.bits_per_dim[4] < found.bits_per_dim[1]


def test_a_measured_bound_does_not_depend_on_how_images_are_cut() -> None:
    """Draws belong to an image's place in the split, so that shards of any size give one figure."""
    torch.manual_seed(0)
    model = CategoricalVIMCO(CONFIG).eval()
    whole = measure(model, PIXELS, (4,), "fp32").bits_per_dim[4]
    parts = [measure(model, PIXELS[first : first + 26], (4,), "fp32", first=first) for first in range(0, 130, 26)]
    assert sum(part.bits_per_dim[4] for part in parts) / 5 == pytest.approx(whole, rel=1e-6)
    other = measure(model, PIXELS[26:52], (4,), "fp32").bits_per_dim[4]
    assert other != pytest.approx(parts[1].bits_per_dim[4], rel=1e-6)


def test_a_measured_elbo_has_two_parts() -> None:
    torch.manual_seed(0)
    found = measure(VAE(CONFIG).eval(), PIXELS, (2,), "fp32")
    assert found.reconstruction_bits_per_dim is not None and found.kl_bits_per_dim is not None
    total = found.reconstruction_bits_per_dim + found.kl_bits_per_dim
    assert found.bits_per_dim == {2: pytest.approx(total)}
