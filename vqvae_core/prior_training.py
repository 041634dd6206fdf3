"""What the training loop needs to know of a prior: its loss and its validation."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vqvae_core.metrics import entropy_bits
from vqvae_core.pixelcnn import PixelCNN
from vqvae_core.train import Piece, StepOutput, Worker, to_device
from vqvae_core.train_config import Precision

Batch = tuple[Tensor, Tensor]  # tokens (B, H, W, 1) and labels (B,)


class PriorTraining:
    """The `Trainable` of a prior. validation: tokens (N, H, W) and labels (N,), a fixed set."""

    def __init__(self, model: PixelCNN, *, precision: Precision, worker: Worker, validation: Batch) -> None:
        to_device(model, worker.device)
        self.model = model
        self._precision: Precision = precision
        self._worker, self._validation = worker, validation

    def before_training(self, pieces: Sequence[tuple[Batch, Piece]], worker: Worker) -> None:
        """A prior starts from its initial weights."""

    def step(self, batch: Batch, piece: Piece, step: int) -> StepOutput:
        tokens, labels = (part.to(self._worker.device) for part in batch)
        device = torch.device(self._worker.device).type
        with torch.autocast(device, torch.bfloat16, enabled=self._precision == "bf16"):
            loss = self.model.nll_nats(tokens[..., 0], labels).mean()
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
        return {"validation_bits_per_token": bits}


@torch.no_grad()
def bits_per_token(
    model: PixelCNN, tokens: Tensor, labels: Tensor, precision: Precision, device: str = "cpu", batch_size: int = 64
) -> float:
    """-log2 p(tokens | label), the mean over all sites of tokens (N, H, W)."""
    total_nats = 0.0
    for start in range(0, len(tokens), batch_size):
        stop = start + batch_size
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16"):
            nll = model.nll_nats(tokens[start:stop].to(device), labels[start:stop].to(device))
        total_nats += float(nll.double().sum())
    return total_nats / tokens.numel() / math.log(2)


def unigram_bits_per_token(tokens: Tensor, num_codes: int) -> float:
    """Entropy of the tokens' own frequencies: what a prior without context would cost at best."""
    return entropy_bits(torch.bincount(tokens.flatten(), minlength=num_codes))
