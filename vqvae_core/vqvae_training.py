"""What the training loop needs to know of a VQ-VAE: its loss, its table's statistics, its validation."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vqvae_core.image_shards import Sample
from vqvae_core.images import images_to_pixels, pixels_to_images
from vqvae_core.metrics import PooledPSNR, perplexity, usage
from vqvae_core.quantizer import at_least_fp32
from vqvae_core.stream import mix
from vqvae_core.train import Precision, StepOutput, Worker, to_device
from vqvae_core.vqvae import VQVAE

_START_POINTS_PER_CODE = 16


def collate_pixels(samples: Sequence[Sample]) -> Tensor:
    """Pixels, uint8 (B, H, W, 3), of samples of one size."""
    return torch.from_numpy(np.stack([sample.pixels() for sample in samples]))


class VQVAETraining:
    """The `Trainable` of a VQ-VAE. validation: uint8 (N, H, W, 3), a fixed set."""

    def __init__(
        self, model: VQVAE, *, steps: int, seed: int, precision: Precision, worker: Worker, validation: Tensor
    ) -> None:
        to_device(model, worker.device)
        self.model = model
        self._precision: Precision = precision
        self._steps, self._seed, self._worker = steps, seed, worker
        self._validation = validation

    def _autocast(self) -> torch.autocast:
        device = torch.device(self._worker.device).type
        return torch.autocast(device, torch.bfloat16, enabled=self._precision == "bf16")

    def _images(self, pixels: Tensor) -> Tensor:
        images = pixels_to_images(pixels.to(self._worker.device)).to(self.model.quantizer.table.dtype)
        return images.contiguous(memory_format=torch.channels_last)

    def before_training(self, batch: Tensor, worker: Worker) -> None:
        """Put the codes at latents of the first global batch."""
        if bool(self.model.quantizer.started):
            return
        with torch.no_grad(), self._autocast():
            latents = at_least_fp32(self.model.encoder(self._images(batch)))
        count = _START_POINTS_PER_CODE * self.model.config.quantizer.num_codes
        points = self._drawn(latents, count, mix(self._seed, 1))
        worker.all_reduce(points)
        self.model.quantizer.start(points, torch.Generator().manual_seed(self._seed))

    def _drawn(self, latents: Tensor, count: int, seed: int) -> Tensor:
        """Up to `count` different latents (M, D) of the global batch, drawn by the seed.

        Each stands in the result of the rank that has it and is zero in the others, so that the sum over ranks is the
        same for any number of ranks.
        """
        rows = latents.detach().permute(0, 2, 3, 1).reshape(-1, latents.shape[1])
        total = len(rows) * self._worker.world_size
        chosen = torch.randperm(total, generator=torch.Generator().manual_seed(seed & (2**63 - 1)))[:count]
        local = chosen.to(rows.device) - len(rows) * self._worker.rank
        mine = (local >= 0) & (local < len(rows))
        return rows[local.clamp(0, len(rows) - 1)] * mine[:, None]

    def _revives(self, step: int) -> bool:
        config = self.model.config.quantizer
        every = config.revive_every
        return bool(every) and (step + 1) % every == 0 and step + 1 <= config.revive_until * self._steps

    def step(self, batch: Tensor, step: int) -> StepOutput:
        images = self._images(batch)
        with self._autocast():
            output = self.model(images)
        quantized = output.quantized
        statistics = list(self.model.quantizer.statistics(output.latents, quantized.tokens))
        if self._revives(step):
            count = self.model.config.quantizer.num_codes
            statistics.append(self._drawn(at_least_fp32(output.latents), count, mix(self._seed, 2, step)))
        squared_error = (output.mean.detach().to(images.dtype) - images).square().mean()
        metrics = {
            "mse": squared_error,
            "commitment": quantized.commitment,
            "nll_nats": output.nll_nats,
            "loss_nats": output.loss_nats,
        }
        return StepOutput(output.loss_nats / images[0].numel(), metrics, statistics)

    def after_step(self, statistics: list[Tensor], step: int, optimizer: torch.optim.Optimizer) -> None:
        quantizer = self.model.quantizer
        quantizer.learn(statistics[0], statistics[1])
        if len(statistics) > 2:
            revived = quantizer.revive(statistics[2])
            for value in optimizer.state.get(quantizer.table, {}).values():
                if value.shape == quantizer.table.shape:
                    value[revived] = 0

    def validate(self) -> dict[str, float]:
        measured = evaluate(self.model, self._validation, self._precision, self._worker.device)
        return {f"validation_{name}": value for name, value in measured.items()}


@torch.no_grad()
def reconstruct(
    model: VQVAE, pixels: Tensor, precision: Precision, device: str = "cpu", batch_size: int = 64
) -> tuple[Tensor, Tensor]:
    """Pixels, uint8 (N, H, W, 3), after the round trip, and their tokens (N, H/4, W/4)."""
    pictures, tokens = [], []
    for start in range(0, len(pixels), batch_size):
        chunk = pixels[start : start + batch_size].to(device)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16"):
            found = model.encode(chunk)
            mean = model.decoder(model.quantizer.lookup(found))
        pictures.append(images_to_pixels(mean).cpu())
        tokens.append(found.cpu())
    return torch.cat(pictures), torch.cat(tokens)


def evaluate(model: VQVAE, pixels: Tensor, precision: Precision, device: str = "cpu") -> dict[str, float]:
    """PSNR pooled over all pixels, perplexity and usage of the codes, over uint8 (N, H, W, 3)."""
    pictures, tokens = reconstruct(model, pixels, precision, device)
    psnr = PooledPSNR()
    psnr.add(pictures, pixels)
    counts = torch.bincount(tokens.flatten(), minlength=model.config.quantizer.num_codes)
    return {"psnr_db": psnr.decibels, "perplexity": perplexity(counts), "usage": usage(counts)}


def shrunken_psnr_db(pixels: Tensor, side: int) -> float:
    """PSNR, pooled over all pixels, of pictures shrunk to side x side and enlarged again, both bicubic."""
    psnr = PooledPSNR()
    for picture in pixels.numpy():
        height, width = picture.shape[:2]
        small = Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC)
        psnr.add(np.array(small.resize((width, height), Image.Resampling.BICUBIC)), picture)
    return psnr.decibels
