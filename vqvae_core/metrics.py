"""Measures with one definition each: PSNR pooled over pixels, perplexity and usage of codes, entropy of tokens."""

import math

import numpy as np
import torch
from torch import Tensor

_CHUNK = 256  # images at a time in float64


class PooledPSNR:
    """PSNR from the mean squared error over every pixel value of every image (not the mean of PSNRs), peak 255."""

    def __init__(self) -> None:
        self.squared_error = 0.0
        self.num_values = 0

    def add(self, pixels: Tensor | np.ndarray, reference: Tensor | np.ndarray) -> None:
        """Two uint8 arrays of one shape, (N, ...)."""
        found, expected = torch.as_tensor(pixels), torch.as_tensor(reference)
        self.add_errors(float(squared_errors(found, expected).sum()), found.numel())

    def add_errors(self, squared_error: float, num_values: int) -> None:
        """What `squared_errors` found of so many values."""
        self.squared_error += squared_error
        self.num_values += num_values

    @property
    def decibels(self) -> float:
        """inf for a perfect copy; raises ZeroDivisionError before the first image."""
        mean = self.squared_error / self.num_values
        return math.inf if mean == 0 else 10 * math.log10(255**2 / mean)


def squared_errors(pixels: Tensor, reference: Tensor) -> Tensor:
    """The sum of squared differences of each image, float64 (N,), of two uint8 tensors of one shape, (N, ...). Exact:
    these are whole numbers."""
    parts = zip(pixels.split(_CHUNK), reference.split(_CHUNK), strict=True)
    found = [(part.to(torch.float64) - other.to(torch.float64)).square() for part, other in parts]
    return torch.cat([each.reshape(len(each), -1).sum(dim=1) for each in found])


def entropy_bits(counts: Tensor | np.ndarray) -> float:
    """Entropy of the empirical distribution of counts (K,), in bits."""
    counts = torch.as_tensor(counts).to(torch.float64)
    share = counts[counts > 0] / counts.sum()
    return float(-(share * share.log2()).sum())


def perplexity(counts: Tensor | np.ndarray) -> float:
    """2 to the entropy: the number of codes that are used, if they were used equally. Over a data set, not a batch."""
    return 2.0 ** entropy_bits(counts)


def mean_perplexity(counts: Tensor) -> float:
    """Perplexity of each of some tables, counts (G, K), and their mean."""
    return sum(perplexity(table) for table in counts) / len(counts)


def usage(counts: Tensor | np.ndarray) -> float:
    """Share of the codes that occur at all."""
    counts = torch.as_tensor(counts)
    return float((counts > 0).to(torch.float64).mean())
