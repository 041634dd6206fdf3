"""What the training loop needs to know of a VQ-VAE: its loss, its table's statistics, its validation."""

import io
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vqvae_core.fp32 import whole_fp32
from vqvae_core.images import grid, images_on
from vqvae_core.likelihood import bits_per_dim
from vqvae_core.metrics import PooledPSNR, mean_perplexity, usage
from vqvae_core.order import mix
from vqvae_core.quantizer import QuantizerConfig
from vqvae_core.shapes import Float
from vqvae_core.table_upkeep import TableUpkeep
from vqvae_core.train import Piece, StepOutput, Worker, autocast, to_device
from vqvae_core.train_config import Precision
from vqvae_core.vqvae import STRIDE, VQVAE, VQVAEConfig

_PICTURES, _COLUMNS = 16, 8
_BATCH, _SMALL_BATCH = 64, 4
_BITS_PER_RGB_PIXEL = 24


class VQVAETraining:
    """The `Trainable` of a VQ-VAE. steps: of the whole run, and of an epoch. validation: uint8 (N, H, W, 3), fixed."""

    def __init__(
        self,
        model: VQVAE,
        *,
        steps: int,
        steps_per_epoch: int,
        seed: int,
        precision: Precision,
        worker: Worker,
        validation: Tensor,
    ) -> None:
        to_device(model, worker.device)
        self.model = model
        self._forward: nn.Module = torch.compile(model) if worker.compile else model  # pyright: ignore[reportAttributeAccessIssue]
        self._precision: Precision = precision
        self._upkeep = TableUpkeep(model.quantizer, steps, steps_per_epoch, seed)
        self._seed, self._worker, self._validation = seed, worker, validation

    def _images(self, pixels: Tensor) -> Tensor:
        return images_on(self._worker.device, self.model.dtype, pixels)

    def before_training(self, pieces: Sequence[tuple[Tensor, Piece]], worker: Worker) -> None:
        """Put the codes at latents of the first global batch."""
        quantizer = self.model.quantizer
        if quantizer.started:
            return
        total: Tensor | None = None
        for pixels, piece in pieces:
            with torch.no_grad(), autocast(self._worker.device, self._precision):
                rows = quantizer(self.model.encoder(self._images(pixels))).rows
            points = _drawn(rows, piece, len(pixels), self._upkeep.num_start_points, mix(self._seed, 1))
            total = points if total is None else total + points
        assert total is not None
        self._upkeep.start(total, worker.all_reduce)

    def step(self, batch: Tensor, piece: Piece, step: int) -> StepOutput:
        images = self._images(batch)
        with autocast(self._worker.device, self._precision):
            output = self._forward(images)
        quantized = output.quantized
        statistics = self.model.quantizer.statistics(quantized)
        if self._upkeep.revives(step):
            count = self.model.config.quantizer.num_codes
            statistics.append(_drawn(quantized.rows, piece, len(batch), count, mix(self._seed, 2, step)))
        error = {} if output.mean is None else {"mse": (output.mean.to(images.dtype) - images).square().mean()}
        metrics = {
            **error,
            "commitment": quantized.commitment,
            "nll_nats": output.nll_nats,
            "loss_nats": output.loss_nats,
        }
        return StepOutput(output.loss_nats / images[0].numel(), metrics, statistics)

    def after_step(self, statistics: list[Tensor], step: int, optimizer: torch.optim.Optimizer) -> None:
        self._upkeep.after_step(statistics, step, optimizer)

    def figures(self, since: int, done: int) -> dict[str, float]:
        return self._upkeep.figures(since, done)

    def validate(self) -> dict[str, float]:
        measured = evaluate(self.model, self._validation, self._precision, self._worker.device)
        return {f"validation_{name}": value for name, value in measured.items()}

    def pictures(self) -> dict[str, bytes]:
        return {"reconstructions.png": comparison(self.model, self._validation, self._precision, self._worker.device)}

    def score(self, metrics: Mapping[str, int | float]) -> float:
        """By bits where the likelihood has some: the latents' under the uniform prior are always the same."""
        found = metrics.get("validation_reconstruction_bits_per_dim")
        return -metrics["validation_psnr_db"] if found is None else found


def _drawn(rows: Tensor, piece: Piece, num_images: int, count: int, seed: int) -> Tensor:
    """Up to `count` different latents (M, D) of the global batch, drawn by the seed, out of the rows of one piece.

    Each stands in the result of the piece that has it and is zero in the others, so that the sum over pieces and ranks
    is the same however the batch is cut.
    """
    sites = len(rows) // num_images
    generator = torch.Generator().manual_seed(seed & (2**63 - 1))
    chosen = torch.randperm(sites * piece.batch_size, generator=generator)[:count]
    local = chosen.to(rows.device) - sites * piece.first
    mine = (local >= 0) & (local < len(rows))
    return rows[local.clamp(0, len(rows) - 1)] * mine[:, None]


def comparison(model: VQVAE, pixels: Tensor, precision: Precision, device: str = "cpu") -> bytes:
    """A PNG of pictures out of uint8 (N, H, W, 3), in rows, each row over what the round trip makes of it."""
    chosen = shown(pixels)
    made, _ = reconstruct(model, chosen, precision, device)
    return in_pairs(chosen, made)


def shown(pixels: Tensor) -> Tensor:
    """A few pictures out of (N, H, W, 3), evenly spaced."""
    return pixels[torch.linspace(0, len(pixels) - 1, min(_PICTURES, len(pixels))).long()]


def in_pairs(pictures: Tensor, made: Tensor) -> bytes:
    """A PNG of pictures, uint8 (N, H, W, 3), in rows, each over what was made of it. The last may be shorter."""
    columns = min(_COLUMNS, len(pictures))
    white = torch.full((-len(pictures) % columns, *pictures.shape[1:]), 255, dtype=torch.uint8)
    whole = (torch.cat([part, white]).split(columns) for part in (pictures, made))
    sheet = grid(torch.cat([row for pair in zip(*whole, strict=True) for row in pair]).numpy(), columns)
    buffer = io.BytesIO()
    Image.fromarray(sheet).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


@torch.no_grad()
def reconstruct(
    model: VQVAE, pixels: Tensor, precision: Precision, device: str = "cpu", batch_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Pixels, uint8 (N, H, W, 3), after the round trip, and their tokens (N, H/4, W/4), or (N, H/4, W/4, G)."""
    pictures, tokens = [], []
    batch_size = batch_size or _batch_of(model)
    for start in range(0, len(pixels), batch_size):
        chunk = pixels[start : start + batch_size].to(device)
        with autocast(device, precision):
            found = model.encode(chunk)
            made = model.decode(found)
        pictures.append(made.cpu())
        tokens.append(found.cpu())
    return torch.cat(pictures), torch.cat(tokens)


def evaluate(model: VQVAE, pixels: Tensor, precision: Precision, device: str = "cpu") -> dict[str, float]:
    """PSNR pooled over all pixels, perplexity and usage of the codes and, where the likelihood has bits, those of the
    reconstruction, over uint8 (N, H, W, 3)."""
    pictures, tokens = reconstruct(model, pixels, precision, device)
    psnr = PooledPSNR()
    psnr.add(pictures, pixels)
    counts = counts_of(tokens, model.config.quantizer)
    figures = {"psnr_db": psnr.decibels, "perplexity": mean_perplexity(counts), "usage": usage(counts)}
    if model.likelihood.has_bits:
        nll = nll_nats(model, pixels, precision, device)
        figures["reconstruction_bits_per_dim"] = bits_per_dim(float(nll.mean()), pixels[0].numel())
    return figures


@torch.no_grad()
@whole_fp32()
def nll_nats(
    model: VQVAE, pixels: Tensor, precision: Precision, device: str = "cpu", batch_size: int | None = None
) -> Float[Tensor, "n"]:
    """-log p(x | z_q(x)) of uint8 (N, H, W, 3), float64 (N,), in nats."""
    found = []
    for chunk in pixels.split(batch_size or _batch_of(model)):
        with autocast(device, precision):
            found.append(model.nll_nats(images_on(device, model.dtype, chunk)).double().cpu())
    return torch.cat(found)


def _batch_of(model: VQVAE) -> int:
    """Images that are decoded together: few where the likelihood has hundreds of channels."""
    return _BATCH if model.likelihood.num_channels <= _BATCH else _SMALL_BATCH


def uniform_bits_per_dim(config: VQVAEConfig, height: int, width: int) -> float:
    """What the codes of a picture cost under the uniform prior, log2 K each, for each of its sub-pixels."""
    num_codes = (height // STRIDE) * (width // STRIDE) * config.quantizer.num_groups
    return num_codes * math.log2(config.quantizer.num_codes) / (3 * height * width)


def counts_of(tokens: Tensor, config: QuantizerConfig) -> Tensor:
    """How often each code occurs, (G, K), in tokens (..., G), or (...) for one group."""
    groups = tokens.reshape(-1, config.num_groups).unbind(dim=1)
    return torch.stack([torch.bincount(group, minlength=config.num_codes) for group in groups])


def against_shrunken(config: VQVAEConfig, pixels: Tensor) -> dict[str, int | float]:
    """What a PSNR is seen beside, over uint8 (N, H, W, 3): that of pictures with a pixel a site, and of those with as
    many bits as the codes have, at 24 a pixel."""
    sites = pixels.shape[1] // STRIDE
    num_bits = sites * sites * config.quantizer.num_groups * math.log2(config.quantizer.num_codes)
    same_bits_side = max(1, round((num_bits / _BITS_PER_RGB_PIXEL) ** 0.5))
    return {
        "shrunken_side": sites,
        "shrunken_psnr_db": shrunken_psnr_db(pixels, sites),
        "same_bits_side": same_bits_side,
        "same_bits_psnr_db": shrunken_psnr_db(pixels, same_bits_side),
    }


def shrunken_psnr_db(pixels: Tensor, side: int) -> float:
    """PSNR, pooled over all pixels, of pictures shrunk to side x side and enlarged again, both bicubic."""
    psnr = PooledPSNR()
    for picture in pixels.numpy():
        height, width = picture.shape[:2]
        small = Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC)
        psnr.add(np.array(small.resize((width, height), Image.Resampling.BICUBIC)), picture)
    return psnr.decibels
