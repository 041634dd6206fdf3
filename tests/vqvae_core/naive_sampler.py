"""The plain sampler: the whole network once for every code. What the cached one is compared with."""

from collections.abc import Sequence

import torch

from vqvae_core.fp32 import whole_fp32
from vqvae_core.noise import gumbel_noise
from vqvae_core.pixelcnn import NOTHING, Condition, PixelCNN
from vqvae_core.sampler import AS_IT_IS, Draw, Drawn, Given, chosen


@torch.no_grad()
@whole_fp32()
def sample_naively(
    prior: PixelCNN,
    seeds: Sequence[int],
    condition: Condition = NOTHING,
    draw: Draw = AS_IT_IS,
    given: Given | None = None,
    without: Condition = NOTHING,
) -> Drawn:
    """What `sampler.sample` draws, by one pass through the network for each code, N * G in all. without: the condition
    of the second pass where there is guidance."""
    shape, device = prior.shape, prior.embed.weight.device
    seed = torch.tensor(list(seeds), device=device)
    tokens = torch.zeros(len(seeds), shape.height, shape.width, shape.num_groups, dtype=torch.int64, device=device)
    nll_nats = torch.zeros(tokens.shape[:3], device=device)
    places = [(i, j, g) for i in range(shape.height) for j in range(shape.width) for g in range(shape.num_groups)]
    for number, (i, j, g) in enumerate(places):
        logits = as_told = prior(tokens, condition)[:, :, i, j, g].float()
        if draw.guidance != 1:
            plain = prior(tokens, without)[:, :, i, j, g].float()
            logits = plain + draw.guidance * (as_told - plain)
        codes = chosen(logits, gumbel_noise(seed, number, 1, shape.num_codes)[:, 0], draw)
        nll = torch.nn.functional.cross_entropy(as_told, codes, reduction="none")
        if given is not None:
            known = given.where[:, i, j].to(device)
            codes = torch.where(known, given.tokens.view_as(tokens)[:, i, j, g].to(device), codes)
            nll = nll.masked_fill(known, 0)
        tokens[:, i, j, g] = codes
        nll_nats[:, i, j] += nll
    return Drawn(tokens if shape.num_groups > 1 else tokens[..., 0], nll_nats)
