import math

import numpy as np
import pytest
import torch

from vqvae_core.metrics import PooledPSNR, entropy_bits, perplexity, usage


def test_psnr_is_pooled_over_pixels() -> None:
    psnr = PooledPSNR()
    zeros = np.zeros((1, 2, 2, 3), np.uint8)
    psnr.add(zeros, zeros)
    psnr.add(zeros + 10, zeros)
    assert psnr.decibels == pytest.approx(10 * math.log10(255**2 / 50))


def test_psnr_of_a_perfect_copy() -> None:
    psnr = PooledPSNR()
    psnr.add(torch.zeros(3, dtype=torch.uint8), torch.zeros(3, dtype=torch.uint8))
    assert psnr.decibels == math.inf


def test_entropy_and_perplexity() -> None:
    assert entropy_bits(torch.tensor([5, 5, 5, 5, 0])) == pytest.approx(2.0)
    assert perplexity(torch.tensor([5, 5, 5, 5, 0])) == pytest.approx(4.0)
    assert usage(torch.tensor([5, 5, 5, 5, 0])) == pytest.approx(0.8)
