"""log p(x | z): what a decoder's output says about pixels, in nats.

A density is a training loss and has no bits. The other likelihoods are probabilities of the 256 values of a sub-pixel,
which sum to 1: their nats over log 2 are bits, and those over the number of sub-pixels bits/dim. All are fp32 islands.
"""

import contextlib
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqvae_core.images import images_to_pixels
from vqvae_core.quantizer import at_least_fp32
from vqvae_core.shapes import Float

_LEVELS = 256
_HALF = (_LEVELS - 1) / 2  # values to a unit of an image in [-1, 1]
_MIN_LOG_SCALE = -7.0  # a scale of 0.12 of a bin: a value in its middle has a probability of 0.97


@dataclass(frozen=True, kw_only=True)
class LikelihoodConfig:
    """p(x | z) of a sub-pixel, given the decoder's output."""

    kind: Literal["density", "gaussian", "logistic", "categorical"] = "density"
    """density: a Gaussian of width sigma, which has no bits; gaussian: its mass in the bins of pixel values; logistic:
    the mass of a mixture of logistics (arXiv:1701.05517), without its links between channels; categorical: a softmax
    over the 256 values, as in the paper."""
    learn_sigma: bool = False
    """Of gaussian: sigma is where the width starts, and one number that is learned (arXiv:2006.13202)."""
    num_mixtures: int = 1
    """Of logistic: its components."""

    def __post_init__(self) -> None:
        if self.num_mixtures < 1:
            raise ValueError(f"num_mixtures must be at least 1, was {self.num_mixtures}")
        if self.num_mixtures > 1 and self.kind != "logistic":
            raise ValueError(f"num_mixtures belongs to the kind logistic, the kind was {self.kind}")
        if self.learn_sigma and self.kind != "gaussian":
            raise ValueError(f"learn_sigma belongs to the kind gaussian, the kind was {self.kind}")


class Likelihood(nn.Module, ABC):
    """num_channels: what the decoder has to give for each pixel. has_bits: whether it is a probability. needs_fp32:
    of a decoder's last layer, since means and scales of a bin in bf16 would be bins apart. mean_is_cheap: beside the
    rest of a training step."""

    num_channels: int
    has_bits = True
    needs_fp32 = True
    mean_is_cheap = True

    @abstractmethod
    def nll_nats(self, output: Float[Tensor, "b c h w"], images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b"]:
        """-log p of images (B, 3, H, W) in [-1, 1], summed over their sub-pixels, (B,). output: the decoder's
        (B, C, H, W). A probability takes the pixels that the images were made of."""

    @abstractmethod
    def mean(self, output: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 h w"]:
        """What stands for the image (B, 3, H, W) in pictures and PSNR: the mean, before it is cut to bins; of logistics
        within [-1, 1]."""


def make_likelihood(config: LikelihoodConfig, sigma: float) -> Likelihood:
    """The likelihood of a config. sigma: the width of a Gaussian, for images in [-1, 1]."""
    if config.kind == "density":
        return Density(sigma)
    if config.kind == "gaussian":
        return DiscretizedGaussian(sigma, learned=config.learn_sigma)
    return LogisticMixture(config.num_mixtures) if config.kind == "logistic" else Categorical()


def bits_per_dim(nll_nats: float, num_dims: int) -> float:
    """Nats of an image as bits for each of its num_dims sub-pixels."""
    return nll_nats / math.log(2) / num_dims


def no_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Autocast is off where the tensor lies."""
    return torch.autocast(tensor.device.type, enabled=False)


def gaussian_nll_nats(
    mean: Float[Tensor, "b 3 h w"], images: Float[Tensor, "b 3 h w"], sigma: float
) -> Float[Tensor, "b"]:
    """-log N(images; mean, sigma^2) of each image (B,), summed over pixels and channels; both (B, 3, H, W)."""
    error = (images - mean.to(images.dtype)).square().flatten(1).sum(dim=1)
    num_values = images[0].numel()
    return error / (2 * sigma**2) + num_values * (math.log(sigma) + 0.5 * math.log(2 * math.pi))


class Density(Likelihood):
    """A Gaussian of fixed width. Its value depends on how pixels are scaled: never bits/dim."""

    num_channels = 3
    has_bits = False
    needs_fp32 = False

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.sigma = sigma

    def nll_nats(self, output: Float[Tensor, "b c h w"], images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b"]:
        return gaussian_nll_nats(output, images, self.sigma)

    def mean(self, output: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 h w"]:
        return output


class DiscretizedGaussian(Likelihood):
    """The mass of a Gaussian in the bin of a pixel value; the outermost bins reach to infinity."""

    num_channels = 3

    def __init__(self, sigma: float, *, learned: bool) -> None:
        super().__init__()
        self.log_sigma = nn.Parameter(torch.tensor(math.log(sigma)), requires_grad=learned)

    def nll_nats(self, output: Float[Tensor, "b c h w"], images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b"]:
        with no_autocast(output):
            means = at_least_fp32(output)
            low, high = _edges(images, means, (-self.log_sigma.to(means.dtype)).exp())
            # Mirrored above the mean, where both tails below the edges are close to 1 and their difference is lost.
            mirrored = low + high > 0
            low, high = torch.where(mirrored, -high, low), torch.where(mirrored, -low, high)
            log_below, log_upto = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
            # With one edge at infinity the mass is a whole tail: log(1 - e^-inf) adds nothing.
            open_bin = torch.isinf(low)
            step = torch.where(open_bin, torch.ones_like(low), log_upto - torch.where(open_bin, log_upto, log_below))
            log_mass = log_upto + torch.where(open_bin, torch.zeros_like(low), log_one_minus_exp(step))
            return -log_mass.flatten(1).sum(dim=1)

    def mean(self, output: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 h w"]:
        return output


class LogisticMixture(Likelihood):
    """The mass of a mixture of logistics in the bin of a pixel value; the outermost bins reach to infinity. Each
    sub-pixel has its own mixture, and given z they are independent."""

    def __init__(self, num_mixtures: int) -> None:
        super().__init__()
        self.num_mixtures = num_mixtures
        self.num_channels = 3 * num_mixtures * (3 if num_mixtures > 1 else 2)

    def _parts(self, output: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Means, log scales and log weights (B, M, 3, H, W); no weights for one component."""
        parts = at_least_fp32(output).unflatten(1, (-1, self.num_mixtures, 3))
        weights = parts[:, 2].log_softmax(dim=1) if self.num_mixtures > 1 else None
        return parts[:, 0], parts[:, 1].clamp(min=_MIN_LOG_SCALE), weights

    def nll_nats(self, output: Float[Tensor, "b c h w"], images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b"]:
        with no_autocast(output):
            means, log_scales, log_weights = self._parts(output)
            scale = (-log_scales).exp()
            low, high = _edges(images[:, None], means, scale)
            # s(high) - s(low) = s(high) s(-low) (1 - e^(low - high)), s the sigmoid: no difference of equal numbers.
            # An edge at infinity makes one of the first two 1, and the last.
            width = scale / _HALF
            is_open = torch.isinf(low) | torch.isinf(high)
            inside = torch.where(is_open, torch.zeros_like(width), log_one_minus_exp(width))
            log_mass = F.logsigmoid(high) + F.logsigmoid(-low) + inside
            if log_weights is not None:
                log_mass = torch.logsumexp(log_weights + log_mass, dim=1)
            return -log_mass.flatten(1).sum(dim=1)

    def mean(self, output: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 h w"]:
        means, _, log_weights = self._parts(output)
        means = means.clamp(-1, 1)
        return means[:, 0] if log_weights is None else (means * log_weights.exp()).sum(dim=1)


class Categorical(Likelihood):
    """A softmax over the 256 values of each sub-pixel."""

    num_channels = 3 * _LEVELS
    needs_fp32 = False  # roundings of 256 logits are small beside what they are apart, and the softmax is in fp32
    mean_is_cheap = False

    def nll_nats(self, output: Float[Tensor, "b c h w"], images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b"]:
        with no_autocast(output):
            logits = at_least_fp32(output).unflatten(1, (_LEVELS, 3))
            values = images_to_pixels(images).movedim(-1, -3).long()
            return F.cross_entropy(logits, values, reduction="none").flatten(1).sum(dim=1)

    def mean(self, output: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 h w"]:
        shares = at_least_fp32(output).unflatten(1, (_LEVELS, 3)).softmax(dim=1)
        values = torch.linspace(-1, 1, _LEVELS, dtype=shares.dtype, device=shares.device)
        return (shares * values[:, None, None, None]).sum(dim=1)


def _edges(images: Tensor, means: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The edges of the bin that a pixel lies in, as multiples of the scale from the mean; -inf below the lowest value,
    inf above the highest. They are taken from whole numbers, so that one bin ends where the next begins."""
    pixels = images_to_pixels(images).movedim(-1, -3).to(means.dtype)
    low = torch.where(pixels == 0, -math.inf, ((pixels - 0.5) / _HALF - 1 - means) * scale)
    high = torch.where(pixels == _LEVELS - 1, math.inf, ((pixels + 0.5) / _HALF - 1 - means) * scale)
    return low, high


def log_one_minus_exp(x: Tensor) -> Tensor:
    """log(1 - e^-x) for x > 0, without loss near 0 or far from it (Maechler 2012)."""
    near = x < math.log(2)
    return torch.where(
        near, (-torch.expm1(-torch.where(near, x, 1.0))).log(), torch.log1p(-(-torch.where(near, 1.0, x)).exp())
    )
