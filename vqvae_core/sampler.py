"""Samples of the prior, site by site in raster order. Each sample depends on its own seed only, not on its batch."""

import torch
from torch import Tensor

from vqvae_core.pixelcnn import PixelCNN


def gumbel_noise(seed: int, num_sites: int, num_codes: int) -> Tensor:
    """Noise (num_sites, K) for one sample: argmax(logits + noise) is a draw from softmax(logits).

    One stream a sample, so that neither the batch nor the worker changes a draw. Made on the CPU: the same everywhere.
    """
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(num_sites, num_codes, dtype=torch.float64, generator=generator)
    return -(-uniform.clamp_min(1e-300).log()).log().float()


@torch.no_grad()
def sample(
    prior: PixelCNN, seeds: list[int], labels: Tensor | None = None, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Tokens (B, H, W), one sample for each seed, and their -log p in nats (B,) at temperature 1.

    Plain: one pass through the network for each site, over the rows down to it.
    """
    height, width, num_codes = prior.shape.height, prior.shape.width, prior.shape.num_codes
    device = prior.embed.weight.device
    noise = torch.stack([gumbel_noise(seed, height * width, num_codes) for seed in seeds]).to(device)
    tokens = torch.zeros(len(seeds), height, width, dtype=torch.int64, device=device)
    nll_nats = torch.zeros(len(seeds), device=device)
    for row in range(height):
        for column in range(width):
            logits = prior(tokens[:, : row + 1], labels)[:, :, row, column].float()
            draw = (logits / temperature + noise[:, row * width + column]).argmax(dim=1)
            tokens[:, row, column] = draw
            nll_nats -= logits.log_softmax(dim=1).gather(1, draw[:, None])[:, 0]
    return tokens, nll_nats
