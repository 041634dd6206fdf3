"""The VAE of arXiv:1312.6114 with the VQ-VAE's encoder and decoder: a Gaussian posterior, N(0, 1) as its prior."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from vqvae_core.gaussian import Gaussian, normal_log_prob
from vqvae_core.latent_model import LatentModel
from vqvae_core.noise import drawn_by
from vqvae_core.shapes import Float
from vqvae_core.vqvae import VQVAEConfig


@dataclass(frozen=True)
class VAEOutput:
    """Of each image (B,), in nats: -log p(x | z), the mean over its draws, and KL(q || p). Their sum is at least
    -log p(x) in the mean over draws: the ELBO."""

    nll_nats: Tensor
    kl_nats: Tensor


class VAE(LatentModel):
    """Its latent has as many channels a site as the VQ-VAE's."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__(config, 2 * config.quantizer.channels)

    def noise(self, seeds: Sequence[int], num_samples: int, sites: tuple[int, int]) -> Tensor:
        return drawn_by(seeds, (num_samples, self.config.quantizer.channels, *sites))

    def forward(
        self, images: Float[Tensor, "b 3 h w"], noise: Float[Tensor, "b s c h4 w4"], at_once: int | None = None
    ) -> VAEOutput:
        """The two terms of the ELBO, the KL in closed form. noise: standard normal."""
        posterior = Gaussian.of(self.encoder(images))
        latents = _drawn(posterior, noise.to(posterior.mean))
        return VAEOutput(self.decode_nats(latents, images, at_once).mean(dim=1), posterior.kl_nats())

    def draws(self, images: Float[Tensor, "b 3 h w"], noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return gaussian_draws(Gaussian.of(self.encoder(images)), noise)


def gaussian_draws(posterior: Gaussian, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Latents (B, S, C, H, W) of standard normal noise, and log q and log p of each, (B, S)."""
    noise = noise.to(posterior.mean)
    latents = _drawn(posterior, noise)
    log_q = normal_log_prob(latents, posterior.mean[:, None], posterior.log_sigma[:, None])
    return latents, log_q.flatten(2).sum(dim=2), normal_log_prob(latents).flatten(2).sum(dim=2)


def _drawn(posterior: Gaussian, noise: Tensor) -> Tensor:
    return Gaussian(posterior.mean[:, None], posterior.log_sigma[:, None]).draw(noise)
