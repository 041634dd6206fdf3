"""What models with another latent than a table's codes have in common: the VQ-VAE's encoder and decoder around it, and
decodings of many draws within a limit of memory."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vqvae_core.likelihood import make_likelihood
from vqvae_core.shapes import Float
from vqvae_core.vqvae import STRIDE, Decoder, Encoder, VQVAEConfig


class LatentModel(nn.Module, ABC):
    """q(z | x), p(z) and p(x | z). config: of the VQ-VAE whose encoder and decoder it has; the latent of a site has as
    many channels as there, G times D. Knows no device, rank or framework."""

    def __init__(self, config: VQVAEConfig, posterior_channels: int) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, posterior_channels)
        self.decoder = Decoder(config)
        self.likelihood = make_likelihood(config.likelihood, config.sigma)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, and so of the images that it takes."""
        return self.encoder.conv_in.weight.dtype

    @abstractmethod
    def noise(self, seeds: Sequence[int], num_samples: int, sites: tuple[int, int]) -> Tensor:
        """What draws of z are made of, (B, S, ...), float32 on the CPU, for latents of height x width sites: a function
        of each image's own seed."""

    @abstractmethod
    def draws(self, images: Float[Tensor, "b 3 h w"], noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """S latents of each image, (B, S, C, H/4, W/4), with log q(z | x) and log p(z) of each, (B, S), in nats."""

    def decode_nats(
        self, latents: Float[Tensor, "b s c h4 w4"], images: Float[Tensor, "b 3 h w"], at_once: int | None = None
    ) -> Float[Tensor, "b s"]:
        """-log p(x | z) of S latents (B, S, C, H/4, W/4) of each image, (B, S). at_once: decodings whose activations
        are kept for the gradient together; where there are more, all are computed again when it is taken, so many at a
        time."""
        batch, samples = latents.shape[:2]
        flat = latents.flatten(0, 1)
        owners = torch.arange(batch, device=images.device).repeat_interleave(samples)
        if at_once is None or len(flat) <= at_once or not torch.is_grad_enabled():
            parts = [self._nats(part, images[rows]) for part, rows in _parts(flat, owners, at_once)]
        else:
            parts = [
                checkpoint(self._nats, part, images[rows], use_reentrant=False, preserve_rng_state=False)
                for part, rows in _parts(flat, owners, at_once)
            ]
        return torch.cat(parts).view(batch, samples)  # type: ignore[arg-type]

    def _nats(self, latents: Tensor, images: Tensor) -> Tensor:
        return self.likelihood.nll_nats(self.decoder(latents), images)


def _parts(latents: Tensor, owners: Tensor, at_once: int | None) -> Sequence[tuple[Tensor, Tensor]]:
    size = at_once or len(latents)
    return list(zip(latents.split(size), owners.split(size), strict=True))


def decodings_in(mebibytes: int, config: VQVAEConfig, height: int, width: int) -> int:
    """How many decodings of images of this size keep their activations in so much memory: at least 1. An estimate in
    fp32, of what the gradient needs and what stands beside it while it is taken: not below what is kept."""
    sites = (height // STRIDE) * (width // STRIDE)
    hidden, stem = config.hidden_channels, config.stem_channels or config.hidden_channels
    blocks = config.num_residual_blocks
    outputs = make_likelihood(config.likelihood, config.sigma).num_channels
    numbers = sites * (hidden * (3 + 3 * blocks) + 2 * config.residual_channels * blocks + config.quantizer.channels)
    numbers += sites * (STRIDE // 2) ** 2 * 2 * stem
    numbers += sites * STRIDE**2 * (6 * outputs + 24)  # 24: images, edges and masks of 3 sub-pixels
    return max(1, math.floor(mebibytes * 2**20 / (4 * numbers)))
