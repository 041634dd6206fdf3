"""VIMCO, arXiv:1602.06725: a bound of S samples for latents that no gradient passes through.

log w_s = log p(x | z_s) + log p(z_s) - log q(z_s | x); L = logsumexp_s(log w_s) - log S. Weights and bounds are in
double: log w is about -1e4 nats, and differences of some nats count.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqvae_core.gaussian import Gaussian, normal_log_prob
from vqvae_core.latent_model import LatentModel
from vqvae_core.noise import drawn_by
from vqvae_core.quantizer import at_least_fp32
from vqvae_core.shapes import Float
from vqvae_core.vae import gaussian_draws
from vqvae_core.vqvae import VQVAEConfig


def multi_sample_bound(log_weights: Float[Tensor, "b s"]) -> Float[Tensor, "b"]:
    """L (B,) of log weights (B, S), float64, in nats."""
    log_weights = log_weights.double()
    return torch.logsumexp(log_weights, dim=1) - math.log(log_weights.shape[1])


def learning_signal(log_weights: Float[Tensor, "b s"]) -> Float[Tensor, "b s"]:
    """L - L_{-s} (B, S), float64: what sample s adds to the bound. Needs S > 1.

    In L_{-s} the mean of the other log weights, the log of their geometric mean, stands for log w_s.
    """
    values = log_weights.double()
    samples = values.shape[1]
    assert samples > 1, "of one sample nothing is left"
    others = (values.sum(dim=1, keepdim=True) - values) / (samples - 1)
    # (B, S, S): row s has the weights with the s-th replaced.
    replaced = torch.where(
        torch.eye(samples, dtype=torch.bool, device=values.device), others[:, :, None], values[:, None]
    )
    return multi_sample_bound(values)[:, None] - (torch.logsumexp(replaced, dim=2) - math.log(samples))


@dataclass(frozen=True)
class VIMCOOutput:
    """bound_nats: L of each image, float64 (B,), without gradient. loss_nats: what is minimized, (B,): its gradient is
    that of -L as VIMCO estimates it, its value means nothing (of one sample, which VIMCO has no signal for, nothing in
    it tells the encoder how to draw: to measure by, not to train by). log_weights: (B, S), float64."""

    bound_nats: Tensor
    loss_nats: Tensor
    log_weights: Tensor


class VIMCO(LatentModel):
    """Trained by VIMCO's gradient. The encoder runs once, the decoder S times."""

    def forward(self, images: Float[Tensor, "b 3 h w"], noise: Tensor, at_once: int | None = None) -> VIMCOOutput:
        latents, log_q, log_p = self.draws(images, noise)
        nll = self.decode_nats(latents, images, at_once)
        return vimco_output(-nll.double() + log_p.double() - log_q.double(), log_q)


def vimco_output(log_weights: Tensor, log_q: Tensor) -> VIMCOOutput:
    """The bound and the loss, of log weights and log q with their gradients, (B, S) each."""
    bound = multi_sample_bound(log_weights)
    if log_weights.shape[1] > 1:
        signal = learning_signal(log_weights.detach())
        loss = -(bound + (signal * log_q.double()).sum(dim=1))
    else:
        loss = -bound
    return VIMCOOutput(bound.detach(), loss, log_weights.detach())


class CategoricalVIMCO(VIMCO):
    """Independent categoricals, G a site, each over the K rows of its own table; their prior is uniform."""

    def __init__(self, config: VQVAEConfig) -> None:
        quantizer = config.quantizer
        super().__init__(config, quantizer.num_groups * quantizer.num_codes)
        self.tables = nn.Parameter(torch.randn(quantizer.num_groups * quantizer.num_codes, quantizer.code_dim))

    def noise(self, seeds: Sequence[int], num_samples: int, sites: tuple[int, int]) -> Tensor:
        return drawn_by(seeds, (num_samples, *sites, self.config.quantizer.num_groups), torch.rand)

    def draws(self, images: Float[Tensor, "b 3 h w"], noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        quantizer = self.config.quantizer
        output = at_least_fp32(self.encoder(images)).permute(0, 2, 3, 1)
        logits = output.unflatten(3, (quantizer.num_groups, quantizer.num_codes))  # (B, H, W, G, K)
        log_shares = logits.log_softmax(dim=4)
        places = noise.to(logits).permute(0, 2, 3, 4, 1)
        tokens = drawn_tokens(log_shares.detach(), places)  # (B, H, W, G, S)
        log_q = log_shares.gather(4, tokens).sum(dim=(1, 2, 3))
        offsets = torch.arange(quantizer.num_groups, device=tokens.device) * quantizer.num_codes
        rows = tokens.permute(0, 4, 1, 2, 3) + offsets  # (B, S, H, W, G)
        latents = F.embedding(rows, self.tables).flatten(4).permute(0, 1, 4, 2, 3)
        num_latents = math.prod(tokens.shape[1:4])
        return latents, log_q, torch.full_like(log_q, -num_latents * math.log(quantizer.num_codes))


def drawn_tokens(log_shares: Float[Tensor, "*n k"], places: Float[Tensor, "*n s"]) -> Tensor:
    """Draws (..., S) out of categoricals (..., K), by the inverse of their distribution function, from uniform places
    in [0, 1)."""
    ends = log_shares.exp().cumsum(dim=-1)
    ends = ends / ends[..., -1:]  # rounding leaves no place without a code, and none to a code of share 0 at the end
    return torch.searchsorted(ends, places.contiguous(), right=True).clamp(max=log_shares.shape[-1] - 1)


class GaussianVIMCO(VIMCO):
    """A Gaussian posterior, N(0, 1) as its prior; draws pass no gradient."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__(config, 2 * config.quantizer.channels)

    def noise(self, seeds: Sequence[int], num_samples: int, sites: tuple[int, int]) -> Tensor:
        return drawn_by(seeds, (num_samples, self.config.quantizer.channels, *sites))

    def draws(self, images: Float[Tensor, "b 3 h w"], noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        posterior = Gaussian.of(self.encoder(images))
        with torch.no_grad():
            latents, _, log_p = gaussian_draws(posterior, noise)
        log_q = normal_log_prob(latents, posterior.mean[:, None], posterior.log_sigma[:, None])
        return latents, log_q.flatten(2).sum(dim=2), log_p
