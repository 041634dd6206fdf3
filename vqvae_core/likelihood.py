"""log p(x | z): what the decoder's output says about pixels, in nats.

A Gaussian of fixed width is a density: its value is a training loss, never bits/dim.
"""

import math

from torch import Tensor

from vqvae_core.shapes import Float


def gaussian_nll_nats(
    mean: Float[Tensor, "b 3 h w"], images: Float[Tensor, "b 3 h w"], sigma: float
) -> Float[Tensor, "b"]:
    """-log N(images; mean, sigma^2) of each image (B,), summed over pixels and channels; both (B, 3, H, W)."""
    error = (images - mean.to(images.dtype)).square().flatten(1).sum(dim=1)
    num_values = images[0].numel()
    return error / (2 * sigma**2) + num_values * (math.log(sigma) + 0.5 * math.log(2 * math.pi))
