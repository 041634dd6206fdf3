"""A trained VQ-VAE's tokens and reconstructions, in batches of one size, so that how many images there are changes no
digit of any of them."""

import torch
from torch import Tensor

from vqvae_core.fp32 import whole_fp32
from vqvae_core.images import images_to_pixels, pixels_to_images
from vqvae_core.vqvae import VQVAE

_BATCH = 16
_SMALL_BATCH = 4  # for a likelihood with hundreds of channels


def filled(part: Tensor, size: int) -> Tensor:
    """At most `size` rows, (N, ...), with the last one again until there are so many."""
    return torch.cat([part, part[-1:].expand(size - len(part), *part.shape[1:])])


def encoded(model: VQVAE, pixels: Tensor) -> Tensor:
    """Tokens, int64 (N, H/4, W/4) or (N, H/4, W/4, G), of pixels, uint8 (N, H, W, 3), as `VQVAE.encode` makes them."""
    return torch.cat([model.encode(filled(part, _BATCH))[: len(part)].cpu() for part in pixels.split(_BATCH)])


@torch.no_grad()
@whole_fp32()
def decoded(model: VQVAE, tokens: Tensor, pixels: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Reconstructions, uint8 (N, H, W, 3), of tokens, as `VQVAE.decode` makes them, and, where pixels are given and the
    likelihood has bits, -log p(pixels | tokens), float64 (N,)."""
    size = _BATCH if model.likelihood.num_channels <= 64 else _SMALL_BATCH
    made, nats = [], []
    for start in range(0, len(tokens), size):
        part = tokens[start : start + size]
        count = len(part)
        output = model.decoder(model.quantizer.lookup(filled(part, size).to(model.device)))
        made.append(images_to_pixels(model.likelihood.mean(output))[:count].cpu())
        if pixels is not None and model.likelihood.has_bits:
            images = pixels_to_images(filled(pixels[start : start + size], size).to(model.device))
            nats.append(model.likelihood.nll_nats(output, images)[:count].double().cpu())
    return torch.cat(made), torch.cat(nats) if nats else None
