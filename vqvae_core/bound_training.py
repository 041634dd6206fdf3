"""What the training loop needs to know of a VAE and of VIMCO, and their bounds on held-out images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vqvae_core.fp32 import whole_fp32
from vqvae_core.images import images_on, images_to_pixels
from vqvae_core.latent_model import decodings_in
from vqvae_core.likelihood import bits_per_dim
from vqvae_core.noise import place_seeds
from vqvae_core.train import Piece, StepOutput, Worker, autocast, to_device
from vqvae_core.train_config import Precision
from vqvae_core.vae import VAE, VAEOutput
from vqvae_core.vimco import VIMCO, multi_sample_bound
from vqvae_core.vqvae import STRIDE
from vqvae_core.vqvae_training import in_pairs, shown

_BATCH = 50  # images that are measured together


class BoundTraining:
    """The `Trainable` of a VAE or of VIMCO. num_samples: S, of VIMCO at least 2. mebibytes: memory for the activations
    of decodings: where they do not fit at once, all are computed twice, in parts that do. validation: uint8
    (N, H, W, 3), fixed."""

    def __init__(
        self,
        model: VAE | VIMCO,
        *,
        num_samples: int,
        seed: int,
        precision: Precision,
        worker: Worker,
        validation: Tensor,
        mebibytes: int = 2048,
    ) -> None:
        if isinstance(model, VIMCO) and num_samples < 2:
            raise ValueError(f"num_samples of VIMCO must be at least 2, was {num_samples}")
        to_device(model, worker.device)
        self.model = model
        self._samples, self._seed, self._worker = num_samples, seed, worker
        self._precision: Precision = precision
        self._validation = validation
        height, width = validation.shape[1:3]
        self._at_once = decodings_in(mebibytes, model.config, height, width)

    def before_training(self, pieces: Sequence[tuple[Tensor, Piece]], worker: Worker) -> None:
        """Both start from their initial weights."""

    def step(self, batch: Tensor, piece: Piece, step: int) -> StepOutput:
        images = images_on(self._worker.device, self.model.dtype, batch)
        seeds = place_seeds(piece.first, len(batch), self._seed, 5, step)
        noise = self.model.noise(seeds, self._samples, _sites(batch))
        with autocast(self._worker.device, self._precision):
            output = self.model(images, noise.to(self._worker.device), self._at_once)
        num_dims = images[0].numel()
        if isinstance(output, VAEOutput):
            nll, kl = output.nll_nats.mean(), output.kl_nats.mean()
            metrics = {"loss_nats": nll + kl, "bits_per_dim": bits(nll + kl, num_dims), "nll_nats": nll, "kl_nats": kl}
            return StepOutput((nll + kl) / num_dims, metrics, [])
        bound = -output.bound_nats.mean()
        metrics = {"loss_nats": bound, "bits_per_dim": bits(bound, num_dims)}
        return StepOutput(output.loss_nats.mean() / num_dims, metrics, [])

    def after_step(self, statistics: list[Tensor], step: int, optimizer: torch.optim.Optimizer) -> None:
        """Neither keeps statistics."""

    def figures(self, since: int, done: int) -> dict[str, float]:
        return {}

    def validate(self) -> dict[str, float]:
        measured = measure(
            self.model, self._validation, (self._samples,), self._precision, self._worker.device, self._at_once
        )
        return {"validation_bits_per_dim": measured.bits_per_dim[self._samples]}

    def pictures(self) -> dict[str, bytes]:
        return {"reconstructions.png": comparison(self.model, self._validation, self._precision, self._worker.device)}

    def score(self, metrics: Mapping[str, int | float]) -> float:
        return metrics["validation_bits_per_dim"]


def bits(nats: Tensor, num_dims: int) -> Tensor:
    """Nats of an image as bits/dim, a scalar tensor."""
    return nats * bits_per_dim(1.0, num_dims)


def _sites(pixels: Tensor) -> tuple[int, int]:
    return pixels.shape[1] // STRIDE, pixels.shape[2] // STRIDE


@dataclass(frozen=True)
class Measured:
    """Means over some images: bits_per_dim, the bound of each number of samples, of a VAE of one number; and of a VAE
    the two parts of its ELBO."""

    bits_per_dim: dict[int, float]
    reconstruction_bits_per_dim: float | None = None
    kl_bits_per_dim: float | None = None


@torch.no_grad()
@whole_fp32()
def measure(
    model: VAE | VIMCO,
    pixels: Tensor,
    samples: Sequence[int],
    precision: Precision,
    device: str = "cpu",
    at_once: int | None = None,
    first: int = 0,
) -> Measured:
    """Bounds on -log2 p of uint8 (N, H, W, 3), the mean over images, by the first S of the largest number of draws.
    first: place of the first image in its split, which its draws are a function of.

    Of a VAE one figure, its ELBO, by the most samples: the draws that the reconstruction is the mean of; its KL is in
    closed form.
    """
    most, num_dims = max(samples), pixels[0].numel()
    found: dict[int, list[Tensor]] = {number: [] for number in samples}
    parts: list[tuple[Tensor, Tensor]] = []
    for start in range(0, len(pixels), _BATCH):
        chunk = pixels[start : start + _BATCH]
        noise = model.noise(place_seeds(first + start, len(chunk), 6), most, _sites(pixels)).to(device)
        images = images_on(device, model.dtype, chunk)
        with autocast(device, precision):
            if isinstance(model, VAE):
                output = model(images, noise, at_once)
                parts.append((output.nll_nats.double().cpu(), output.kl_nats.double().cpu()))
            else:
                output = model(images, noise, at_once)
                for number, values in found.items():
                    values.append(-multi_sample_bound(output.log_weights[:, :number]).cpu())
    if isinstance(model, VAE):
        nll, kl = (float(bits(torch.cat([part[side] for part in parts]).mean(), num_dims)) for side in (0, 1))
        return Measured({most: nll + kl}, reconstruction_bits_per_dim=nll, kl_bits_per_dim=kl)
    return Measured({number: float(bits(torch.cat(values).mean(), num_dims)) for number, values in found.items()})


@torch.no_grad()
def comparison(model: VAE | VIMCO, pixels: Tensor, precision: Precision, device: str = "cpu") -> bytes:
    """A PNG of pictures out of uint8 (N, H, W, 3), in rows, each row over what a draw of their latents decodes to."""
    chosen = shown(pixels)
    noise = model.noise(place_seeds(0, len(chosen), 6), 1, _sites(pixels)).to(device)
    with autocast(device, precision):
        latents, _, _ = model.draws(images_on(device, model.dtype, chosen), noise)
        made = images_to_pixels(model.likelihood.mean(model.decoder(latents[:, 0]))).cpu()
    return in_pairs(chosen, made)
