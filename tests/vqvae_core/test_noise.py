"""Counter-based noise: known answers, and the distribution that it is to have."""

import math

import pytest
import torch

from vqvae_core.noise import gumbel_noise, philox

# From the known answers of the authors' library, philox4x32 with 10 rounds.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]) -> None:
    found = philox(tuple(torch.tensor(value) for value in counter), tuple(torch.tensor(value) for value in key))
    assert tuple(int(word) for word in found) == words


def test_a_part_is_that_of_the_whole() -> None:
    """By seed, by place, and by number of codes."""
    seeds = torch.tensor([3, 2**40 + 5, 9])
    whole = gumbel_noise(seeds, 0, 12, 18)
    assert whole.shape == (3, 12, 18)
    assert torch.equal(gumbel_noise(seeds[1:2], 4, 3, 18), whole[1:2, 4:7])
    assert torch.equal(gumbel_noise(seeds, 0, 12, 7), whole[..., :7])
    assert len({tuple(row.tolist()) for row in whole.flatten(0, 1)}) == 36


def test_it_is_gumbels() -> None:
    """Kolmogorov-Smirnov: with 400,000 draws a distance above 0.0031 has a probability of 1 in 1,000."""
    values = gumbel_noise(torch.arange(8), 0, 100, 500).flatten().double().sort().values
    assert torch.isfinite(values).all()
    expected = (-(-values).exp()).exp()
    steps = torch.arange(1, len(values) + 1) / len(values)
    assert float((steps - expected).abs().max()) < 1.95 / math.sqrt(len(values))


def test_the_rarest_are_as_rare_as_they_should_be() -> None:
    """Above 12 lie 6.1 of a million: float32 must not cut the tail off."""
    values = gumbel_noise(torch.arange(64), 0, 128, 512)
    expected = values.numel() * -math.expm1(-math.exp(-12))
    found = int((values > 12).sum())
    assert abs(found - expected) < 4.5 * math.sqrt(expected)
