"""What the training loop needs to know of a prior: its loss and its validation."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vqvae_core.metrics import entropy_bits
from vqvae_core.pixelcnn import PixelCNN
from vqvae_core.token_shards import TokenTable
from vqvae_core.train import Precision, StepOutput, Worker, to_device

TokenItem = tuple[np.ndarray, int]  # tokens (H, W), label or -1


def token_items(table: TokenTable) -> list[TokenItem]:
    """The rows of a token shard with one code a site."""
    return [(tokens[:, :, 0], int(label)) for tokens, label in zip(table.tokens, table.labels, strict=True)]


def collate_tokens(items: Sequence[TokenItem]) -> tuple[Tensor, Tensor]:
    """Tokens, int64 (B, H, W), and labels, int64 (B,)."""
    tokens = torch.from_numpy(np.stack([tokens for tokens, _ in items]).astype(np.int64))
    return tokens, torch.tensor([label for _, label in items], dtype=torch.int64)


class PriorTraining:
    """The `Trainable` of a prior. validation: tokens (N, H, W) and labels (N,), a fixed set."""

    def __init__(
        self, model: PixelCNN, *, precision: Precision, worker: Worker, validation: tuple[Tensor, Tensor]
    ) -> None:
        to_device(model, worker.device)
        self.model = model
        self._precision: Precision = precision
        self._worker, self._validation = worker, validation

    def before_training(self, batch: tuple[Tensor, Tensor], worker: Worker) -> None:
        """A prior starts from its initial weights."""

    def step(self, batch: tuple[Tensor, Tensor], step: int) -> StepOutput:
        tokens, labels = (part.to(self._worker.device) for part in batch)
        device = torch.device(self._worker.device).type
        with torch.autocast(device, torch.bfloat16, enabled=self._precision == "bf16"):
            loss = self.model.nll_nats(tokens, labels).mean()
        return StepOutput(loss, {"bits_per_token": loss / math.log(2)}, [])

    def after_step(self, statistics: list[Tensor], step: int, optimizer: torch.optim.Optimizer) -> None:
        """A prior keeps no statistics."""

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
