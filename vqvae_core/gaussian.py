"""Diagonal Gaussians as posteriors: what an encoder's output says, draws from it, and its divergence from N(0, 1)."""

import math
from dataclasses import dataclass

from torch import Tensor

from vqvae_core.quantizer import at_least_fp32
from vqvae_core.shapes import Float

_LOG_SIGMA = 8.0  # beyond it exp() of twice as much leaves fp32


@dataclass(frozen=True)
class Gaussian:
    """q(z | x): mean and log of the standard deviation, both (B, ...)."""

    mean: Tensor
    log_sigma: Tensor

    @classmethod
    def of(cls, output: Float[Tensor, "b c *d"]) -> "Gaussian":
        """From an encoder's output (B, 2 C, ...): means, then logs of the deviations."""
        mean, log_sigma = at_least_fp32(output).chunk(2, dim=1)
        return cls(mean, log_sigma.clamp(-_LOG_SIGMA, _LOG_SIGMA))

    def draw(self, noise: Tensor) -> Tensor:
        """z of standard normal noise, with a gradient for mean and deviation."""
        return self.mean + self.log_sigma.exp() * noise

    def kl_nats(self) -> Float[Tensor, "b"]:
        """KL(q || N(0, 1)) of each image, in nats, (B,): appendix B of arXiv:1312.6114."""
        terms = 0.5 * (self.mean.square() + (2 * self.log_sigma).exp() - 1) - self.log_sigma
        return terms.flatten(1).sum(dim=1)


def normal_log_prob(z: Tensor, mean: Tensor | float = 0.0, log_sigma: Tensor | None = None) -> Tensor:
    """log N(z; mean, sigma^2) of each number, in nats; without log_sigma the deviation is 1."""
    if log_sigma is None:
        return -0.5 * (z - mean).square() - 0.5 * math.log(2 * math.pi)
    return -0.5 * ((z - mean) * (-log_sigma).exp()).square() - log_sigma - 0.5 * math.log(2 * math.pi)
