"""Noise that is a function of a sample's seed and a place, by counters: the same for any batch or worker, and on other
devices but for the last digits of a logarithm.

Philox4x32-10 of Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", in integer operations of torch.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vqvae_core.order import mix

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_MASK = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Four words for each counter under a key. All are int64 tensors that hold 32 bits, of shapes that broadcast."""
    (a, b, c, d), (low, high) = counter, key
    for _ in range(_ROUNDS):
        # A product may fill the sign bit: the shift then brings ones in, which the mask takes away.
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, c = (second >> 32) & _MASK ^ b ^ low, (first >> 32) & _MASK ^ d ^ high
        b, d = second & _MASK, first & _MASK
        low, high = (low + _WEYL[0]) & _MASK, (high + _WEYL[1]) & _MASK
    return [a, b, c, d]


def gumbel_noise(seeds: Tensor, first: int, count: int, num_codes: int) -> Tensor:
    """float32 (B, count, num_codes) for seeds, int64 (B,), at the places first to first + count - 1 of their samples:
    argmax(logits + noise) is a draw from softmax(logits)."""
    device = seeds.device
    block = torch.arange(-(-num_codes // 4), device=device)[None, None]
    place = torch.arange(first, first + count, device=device)[None, :, None]
    seed = seeds[:, None, None]
    zero = torch.zeros((), dtype=torch.int64, device=device)
    words = philox((block, place, zero, zero), (seed & _MASK, (seed >> 32) & _MASK))
    bits = torch.stack(words, dim=-1).flatten(2)[..., :num_codes]
    # Near 0, where the largest noise comes from, float32 has all its digits; and 1 itself is not reached.
    uniform = (bits.float() + 0.5).mul_(2.0**-32).clamp_(max=1 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def place_seeds(first: int, count: int, *seed: int) -> list[int]:
    """A seed for each of some samples, by its place: first to first + count - 1 of a global batch, or of a split."""
    return [mix(*seed, first + number) & (2**63 - 1) for number in range(count)]


def drawn_by(seeds: Sequence[int], shape: Sequence[int], draw: Callable[..., Tensor] = torch.randn) -> Tensor:
    """Noise (N, *shape), float32 on the CPU, of which each sample's is a function of its own seed: the same however a
    batch is cut. draw: torch.randn or torch.rand."""
    rows = [draw(*shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows) if rows else torch.zeros(0, *shape)
