"""What the training loop needs to know of a prior: its loss and its validation."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vqvae_core.fp32 import whole_fp32
from vqvae_core.metrics import entropy_bits
from vqvae_core.order import mix
from vqvae_core.pixelcnn import NO_LABEL, Condition, PixelCNN
from vqvae_core.token_shards import TokenShape
from vqvae_core.train import Piece, StepOutput, Worker, autocast, to_device
from vqvae_core.train_config import Precision
from vqvae_core.vqvae import STRIDE

Batch = tuple[Tensor, Tensor]  # tokens (B, H, W, G) and labels (B,), -1 where there is none


class PriorTraining:
    """The `Trainable` of a prior. seed: of the labels that are left out. validation: tokens (N, H, W, G) and labels
    (N,), a fixed set."""

    def __init__(self, model: PixelCNN, *, seed: int, precision: Precision, worker: Worker, validation: Batch) -> None:
        to_device(model, worker.device)
        self.model = model
        self._precision: Precision = precision
        self._seed, self._worker, self._validation = seed, worker, validation

    def before_training(self, pieces: Sequence[tuple[Batch, Piece]], worker: Worker) -> None:
        """A prior starts from its initial weights."""

    def step(self, batch: Batch, piece: Piece, step: int) -> StepOutput:
        tokens, labels = batch
        share = self.model.config.label_dropout
        if share:
            labels = labels.masked_fill(left_out(share, piece, len(labels), mix(self._seed, 3, step)), NO_LABEL)
        tokens, labels = tokens.to(self._worker.device), labels.to(self._worker.device)
        with autocast(self._worker.device, self._precision):
            loss = self.model.nll_nats(tokens, labelled(self.model, labels)).mean()
        return StepOutput(loss, {"bits_per_token": loss / math.log(2)}, [])

    def after_step(self, statistics: list[Tensor], step: int, optimizer: torch.optim.Optimizer) -> None:
        """A prior keeps no statistics."""

    def figures(self, since: int, done: int) -> dict[str, float]:
        return {}

    def pictures(self) -> dict[str, bytes]:
        return {}

    def score(self, metrics: Mapping[str, int | float]) -> float:
        return metrics["validation_bits_per_token"]

    def validate(self) -> dict[str, float]:
        tokens, labels = self._validation
        self.model.eval()
        try:
            bits = bits_per_token(self.model, tokens, labels, self._precision, self._worker.device)
        finally:
            self.model.train()
        return {
            "validation_bits_per_token": bits,
            "validation_latent_bits_per_dim": latent_bits_per_dim(bits, self.model.shape),
        }


def labelled(prior: PixelCNN, labels: Tensor) -> Condition:
    """The condition of labels (B,), where the prior has classes."""
    return Condition(labels=labels if prior.num_classes else None)


def left_out(share: float, piece: Piece, count: int, seed: int) -> Tensor:
    """bool (count,): which samples of a piece go without their label. A function of their place in the global batch, so
    that it does not matter how that is cut."""
    generator = torch.Generator().manual_seed(seed & (2**63 - 1))
    return torch.rand(piece.batch_size, generator=generator)[piece.first : piece.first + count] < share


def bits_per_token(
    model: PixelCNN, tokens: Tensor, labels: Tensor, precision: Precision, device: str = "cpu", batch_size: int = 64
) -> float:
    """-log2 p(tokens | label), the mean over all codes of tokens (N, H, W, G)."""
    total_nats = float(grid_nll_nats(model, tokens, labels, precision, device, batch_size).sum())
    return total_nats / tokens.numel() / math.log(2)


@torch.no_grad()
@whole_fp32()
def grid_nll_nats(
    model: PixelCNN, tokens: Tensor, labels: Tensor, precision: Precision, device: str = "cpu", batch_size: int = 64
) -> Tensor:
    """-log p(tokens | label) of each grid of tokens (N, H, W, G): float64 (N,)."""
    found = [torch.zeros(0, dtype=torch.float64)]
    for start in range(0, len(tokens), batch_size):
        stop = start + batch_size
        told = labelled(model, labels[start:stop].to(device))
        with autocast(device, precision):
            nll = model.nll_nats(tokens[start:stop].to(device), told)
        found.append(nll.double().flatten(1).sum(dim=1).cpu())
    return torch.cat(found)


def latent_bits_per_dim(bits_per_token: float, shape: TokenShape) -> float:
    """What tokens cost for each sub-pixel of their picture."""
    return bits_per_token * shape.num_tokens / (3 * shape.height * STRIDE * shape.width * STRIDE)


def unigram_bits_per_token(tokens: Tensor, num_codes: int) -> float:
    """Entropy of the tokens' own frequencies, the mean over groups of tokens (N, H, W, G): what a prior without context
    would cost at best."""
    groups = tokens.flatten(0, -2).unbind(dim=1)
    return sum(entropy_bits(torch.bincount(group, minlength=num_codes)) for group in groups) / len(groups)
