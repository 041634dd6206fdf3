"""A VQ-VAE's encoder and decoder as ONNX files, for programs without torch. Needs the package onnxscript.

Both take any batch, and pictures of any size that is a multiple of the model's stride.
"""

import importlib
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vqvae_core.errors import InputError
from vqvae_core.images import images_to_pixels, pixels_to_images
from vqvae_core.quantizer import VectorQuantizer
from vqvae_core.vqvae import STRIDE, VQVAE


class _Encoder(nn.Module):
    """Pixels, uint8 (B, H, W, 3), to tokens, int64 (B, H/4, W/4), or (B, H/4, W/4, G)."""

    def __init__(self, model: VQVAE) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        latents, quantizer = self.model.encoder(pixels_to_images(pixels)), self.model.quantizer
        tables = quantizer.tables()
        if not tables:
            return quantizer(latents).tokens
        parts = zip(tables, latents.chunk(len(tables), dim=1), strict=True)
        tokens = [_nearest(table, part) for table, part in parts]
        return tokens[0] if len(tokens) == 1 else torch.stack(tokens, dim=3)


def _nearest(quantizer: VectorQuantizer, latents: Tensor) -> Tensor:
    """All distances at once: chunks of them are a matter of torch's memory, and loops no matter of a graph."""
    rows, table = quantizer.compared(latents), quantizer.codes()
    centre = table.mean(dim=0)
    codes = table - centre
    tokens = (0.5 * codes.square().sum(dim=1) - (rows - centre) @ codes.T).argmin(dim=1)
    return tokens.view(latents.shape[0], latents.shape[2], latents.shape[3])


class _Decoder(nn.Module):
    """Tokens, int64 (B, H/4, W/4), or (B, H/4, W/4, G), to pixels, uint8 (B, H, W, 3)."""

    def __init__(self, model: VQVAE) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        output = self.model.decoder(self.model.quantizer.codes_of(tokens))
        return images_to_pixels(self.model.likelihood.mean(output))


def export(model: VQVAE) -> dict[str, bytes]:
    """`encoder.onnx` (pixels to tokens) and `decoder.onnx` (tokens to pixels). Raises `InputError` where a package
    for it is missing."""
    try:
        importlib.import_module("onnxscript")  # torch looks for it late, and only once
    except ImportError as error:
        raise InputError(
            f"expected the packages that write ONNX, {error.name} is missing; in the checkout: "
            "python -m pip install -c constraints.txt -e '.[onnx]'"
        ) from error
    sides = {number: torch.export.Dim(f"sites_{number}", min=2) for number in (1, 2)}
    batch = torch.export.Dim("batch", min=1)
    pixels = torch.zeros(2, 8 * STRIDE, 6 * STRIDE, 3, dtype=torch.uint8)
    groups = model.config.quantizer.num_groups
    tokens = torch.zeros((2, 8, 6) if groups == 1 else (2, 8, 6, groups), dtype=torch.int64)
    whole = {number: STRIDE * side for number, side in sides.items()}
    return {
        "encoder.onnx": _exported(_Encoder(model), "pixels", pixels, "tokens", {0: batch, **whole}),
        "decoder.onnx": _exported(_Decoder(model), "tokens", tokens, "pixels", {0: batch, **sides}),
    }


def _exported(module: nn.Module, name: str, example: Tensor, output: str, shapes: dict[int, Any]) -> bytes:
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "model.onnx"
        torch.onnx.export(
            module.eval(), (example,), str(path), input_names=[name], output_names=[output],
            dynamic_shapes=(shapes,), dynamo=True, external_data=False, verbose=False,
        )  # fmt: skip
        return path.read_bytes()
