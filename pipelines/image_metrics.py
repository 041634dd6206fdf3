"""SSIM and MS-SSIM of each picture. The only file that knows torchmetrics.

Both with its defaults: a Gaussian window of 11 pixels and deviation 1.5, K1 = 0.01, K2 = 0.03, red, green and blue
alike, images in [0, 1] with a data range of 1, whatever range a picture fills. SSIM is the mean over every pixel of a
picture that is reflected at its edges; programs that leave the outer 5 pixels out give slightly other numbers.
"""

import torch
from torch import Tensor

_WINDOW = 11
_BETAS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # section 3.2 of Wang, Simoncelli and Bovik 2003
_RANGE = 1.0


def num_scales(size: int) -> int:
    """Scales of MS-SSIM that pictures of so many pixels a side have room for: the window must fit into the coarsest.
    All five need 176 pixels. 0 where not even SSIM has room.

    torchmetrics asks for a little more than that at four scales: 99 pixels, not 88.
    """
    return sum(size // max(2**number, number**2) >= _WINDOW for number in range(len(_BETAS)))


def ssim(pixels: Tensor, reference: Tensor) -> Tensor | None:
    """SSIM, float32 (N,), of two uint8 tensors (N, H, W, 3). None where they are smaller than its window."""
    from torchmetrics.functional.image import structural_similarity_index_measure as measure

    if not num_scales(min(pixels.shape[1:3])):
        return None
    found = measure(_unit(pixels), _unit(reference), data_range=_RANGE, reduction="none")
    assert isinstance(found, Tensor)
    return found.reshape(len(pixels))


def ms_ssim(pixels: Tensor, reference: Tensor) -> Tensor | None:
    """MS-SSIM, float32 (N,), of two uint8 tensors (N, H, W, 3), over the first scales that there is room for, whose
    weights are scaled to the sum of all five. None where there is room for less than two."""
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as measure

    count = num_scales(min(pixels.shape[1:3]))
    if count < 2:
        return None
    found = measure(
        _unit(pixels), _unit(reference), data_range=_RANGE, betas=scale_weights(count), reduction="none"
    )  # fmt: skip
    return found.reshape(len(pixels))


def scale_weights(count: int) -> tuple[float, ...]:
    """The weights of the first scales, as large together as all five."""
    share = sum(_BETAS) / sum(_BETAS[:count])
    return tuple(beta * share for beta in _BETAS[:count])


def _unit(pixels: Tensor) -> Tensor:
    return pixels.movedim(-1, -3).to(torch.float32) / 255
