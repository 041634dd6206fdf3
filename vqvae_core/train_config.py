"""The schedule of a training run, and the precision that a machine is best at."""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from vqvae_core.order import OrderConfig

Precision = Literal["auto", "fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig(OrderConfig):
    """The schedule of a training run, on top of its order of samples. All of it belongs to the recipe."""

    steps: int = 250_000
    """Optimizer steps."""
    learning_rate: float = 2e-4
    """Of Adam, at its highest."""
    beta2: float = 0.999
    """Of Adam; beta1 is 0.9."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from 0."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up: constant, or half a cosine down to 0."""
    max_gradient_norm: float | None = None
    """Longer gradients, over all ranks and parameters, are scaled down to this length; None: never."""
    ema_decay: float = 0.0
    """Of a moving average of the weights, which is then what is validated and kept; 0: none."""
    precision: Precision = "auto"
    """Of convolutions; the quantizer is always fp32. auto: bf16 where the hardware gains from it. Becomes part of the
    recipe as what it resolves to."""
    deterministic: bool = True
    """Only kernels whose result is the same each time: a run that was killed ends with the same bits as one that was
    not. On a CPU it costs nothing."""
    log_every: int = 20
    """Steps that a point of the curves is the mean of."""
    validate_every: int = 5000
    """Steps between two validations on a fixed set. The weights that do best there are what later stages use."""
    validation_images: int = 256
    """Images of that set; what a finished model is judged by is the whole split."""
    patience: int | None = None
    """Validations in a row that were not better than the best before them, after which training stops; None: never."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "log_every", "validate_every", "validation_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, was {getattr(self, name)}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be a number above 0, was {self.learning_rate}")
        if not 0 < self.beta2 < 1:
            raise ValueError(f"beta2 must lie between 0 and 1, was {self.beta2}")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must be 0 or more, was {self.warmup_steps}")
        if self.max_gradient_norm is not None and not 0 < self.max_gradient_norm < math.inf:
            raise ValueError(f"max_gradient_norm must be a number above 0 or None, was {self.max_gradient_norm}")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience must be at least 1 or None, was {self.patience}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be at least 0 (none) and below 1, was {self.ema_decay}")


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of a step: linear warm-up, then constant or half a cosine."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    progress = max(0, step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    decay = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1.0
    return config.learning_rate * warm * decay


def best_precision(device: str) -> Precision:
    """bf16 where the device has units for it: any GPU from Ampere on, CPUs with AMX or AVX512-BF16.

    Elsewhere bf16 convolutions are emulated and several times slower than fp32. ONEDNN_MAX_CPU_ISA is honoured.
    """
    if device == "cuda":
        return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "fp32"
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
    if limit not in ("ALL", "DEFAULT") and not limit.endswith(("BF16", "AMX", "FP16", "AVX10_1_512", "AVX10_1")):
        return "fp32"
    features = _cpu_features()
    return "bf16" if {"amx_bf16", "avx512_bf16"} & features else "fp32"


def _cpu_features() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split(":", 1)[1].split()) for line in lines if line.startswith("flags")), set())
