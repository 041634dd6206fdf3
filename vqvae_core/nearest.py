"""The nearest code of each latent (eq. 1 of arXiv:1711.00937), and a spread of codes to start from.

Distances are never B x D x H x W x K: they come in chunks of rows, in one buffer that is used again.
"""

import torch
from torch import Tensor

from vqvae_core.shapes import Float, Int

_CHUNK_ELEMENTS = 1 << 23  # 32 MiB of fp32 distances at a time
_CHUNK_ROWS = 4096  # more of them leave the cache between the product and the search
_BLOCK = 64  # codes whose least distance is found together, by vector instructions


def nearest_codes(latents: Float[Tensor, "n d"], table: Float[Tensor, "k d"]) -> Int[Tensor, "n"]:
    """Index (N,) of the nearest code (K, D), Euclidean, for each row of latents (N, D): eq. 1.

    Ties go to the lowest index. |z|^2 is the same for every code and left out: what is compared is |e|^2 / 2 - z.e, one
    product with a bias. Both sides are measured from the codes' mean, which changes no distance: where all codes lie
    close together and far from 0, |e|^2 - 2 z.e would be nothing but rounding.
    """
    centre = table.mean(dim=0)
    codes = table - centre
    bias = codes.square().sum(dim=1).mul_(0.5)
    rows = max(1, min(len(latents), _CHUNK_ELEMENTS // len(table)))
    if latents.device.type == "cpu":
        rows = min(rows, _CHUNK_ROWS)
    points = latents.new_empty(rows, latents.shape[1])
    distances = latents.new_empty(rows, len(table))
    tokens = torch.empty(len(latents), dtype=torch.int64, device=latents.device)
    for start in range(0, len(latents), rows):
        chunk = latents[start : start + rows]
        torch.sub(chunk, centre, out=points[: len(chunk)])
        found = torch.addmm(bias, points[: len(chunk)], codes.T, alpha=-1, out=distances[: len(chunk)])
        tokens[start : start + rows] = _argmin(found)
    return tokens


def _argmin(values: Tensor) -> Tensor:
    """argmin over dim 1 of values (N, K), the first of equals. torch's own is several times slower on a CPU, where only
    the least value, not its index, is found by vector instructions."""
    count = values.shape[1]
    if values.device.type != "cpu" or count % _BLOCK or count == _BLOCK:
        return values.argmin(dim=1)
    blocks = values.view(-1, _BLOCK)
    block = blocks.amin(dim=1).view(len(values), -1).argmin(dim=1)
    first = torch.arange(0, len(blocks), count // _BLOCK)
    return block * _BLOCK + blocks.index_select(0, first + block).argmin(dim=1)


def kmeans_plus_plus(points: Float[Tensor, "n d"], num_codes: int, generator: torch.Generator) -> Float[Tensor, "k d"]:
    """Codes (K, D) drawn from points (N, D), each with probability proportional to its squared distance to the
    nearest code so far (Arthur and Vassilvitskii 2007). Where points run out of distinct places, any point is taken."""
    uniform = torch.rand(num_codes, dtype=torch.float64, generator=generator).to(points.device)
    distance = torch.ones(len(points), dtype=torch.float64, device=points.device)
    chosen = torch.empty(num_codes, dtype=torch.int64, device=points.device)
    for number in range(num_codes):
        mass = distance.cumsum(0)
        if mass[-1] <= 0:
            distance = torch.ones_like(distance)
            mass = distance.cumsum(0)
        index = torch.searchsorted(mass, uniform[number] * mass[-1]).clamp(max=len(points) - 1)
        chosen[number] = index
        nearest = (points - points[index]).square().sum(dim=1).to(torch.float64)
        distance = nearest if number == 0 else torch.minimum(distance, nearest)
    return points[chosen].clone()
