"""One training loop for all models. It counts steps, not epochs, and knows no Ray: only a small `Worker`."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from vqvae_core.checkpoint import History, TrainingState, collect_tensors, restore_tensors, save_state
from vqvae_core.quantizer import at_least_fp32
from vqvae_core.stream import Stream, StreamConfig, mix

Precision = Literal["auto", "fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig(StreamConfig):
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
    precision: Precision = "auto"
    """Of convolutions; the quantizer is always fp32. auto: bf16 where the hardware gains from it. Becomes part of the
    recipe as what it resolves to."""
    log_every: int = 20
    """Steps that a point of the curves is the mean of."""
    validate_every: int = 5000
    """Steps between two validations on a fixed set."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "log_every", "validate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, was {getattr(self, name)}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be a number above 0, was {self.learning_rate}")
        if not 0 < self.beta2 < 1:
            raise ValueError(f"beta2 must lie between 0 and 1, was {self.beta2}")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must be 0 or more, was {self.warmup_steps}")


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


class NonFiniteLossError(ArithmeticError):
    """Training stopped because a number was no longer finite. The last checkpoint is good."""


@dataclass(frozen=True)
class StepOutput:
    """loss: a scalar, the mean over this rank's samples. metrics: scalars, likewise. statistics: tensors that are
    summed over ranks together with the gradients and handed to `Trainable.after_step`."""

    loss: Tensor
    metrics: dict[str, Tensor]
    statistics: list[Tensor]


@runtime_checkable
class Trainable(Protocol):
    """A model with its loss, as the loop sees it. It has an attribute `model`, an nn.Module."""

    model: Any

    def before_training(self, batch: Any, worker: "Worker") -> None:
        """Called once, at step 0, with the first batch: data-dependent starts."""
        ...

    def step(self, batch: Any, step: int) -> StepOutput: ...

    def after_step(self, statistics: list[Tensor], step: int, optimizer: torch.optim.Optimizer) -> None:
        """Called after the optimizer's step, with the statistics summed over all ranks."""
        ...

    def validate(self) -> dict[str, float]: ...


def _keep(_: Tensor) -> None:
    """The sum over one rank."""


@dataclass(frozen=True, kw_only=True)
class Worker:
    """Where a training loop runs: one of `world_size` ranks, and the way out for what it reports.

    all_reduce: sums a tensor over ranks, in place. log(step, metrics): rank 0's curves. save(step, metrics, write):
    called by every rank at a checkpoint; write(folder) writes the state and is None on ranks other than 0. A checkpoint
    falls on the first logged step from `checkpoint_every` steps after the last on, so that no curve is cut.
    """

    rank: int = 0
    world_size: int = 1
    device: str = "cpu"
    checkpoint_every: int = 1000
    all_reduce: Callable[[Tensor], None] = _keep
    log: Callable[[int, dict[str, float]], None] = lambda step, metrics: None
    save: Callable[[int, dict[str, float], Callable[[Path], None] | None], None] = lambda step, metrics, write: None


def to_device(model: nn.Module, device: str) -> None:
    """Move a model, in the layout that convolutions run fastest in."""
    model.to(device)
    model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of a step: linear warm-up, then constant or half a cosine."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    progress = max(0, step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    decay = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1.0
    return config.learning_rate * warm * decay


def train(
    task: Trainable,
    stream: Stream,
    collate: Callable[[list], Any],
    config: TrainConfig,
    worker: Worker,
    identity: str,
    resume: TrainingState | None = None,
) -> History:
    """Train to `config.steps` and return the curves: one dict for each logged step, the same after any restart.

    Random numbers are a function of (seed, step, rank), the order of samples of (seed, step): a state needs neither.
    Gradients and statistics go through one flat sum in a fixed order, in the first step after a restart as in any
    other. Raises `NonFiniteLossError` where a loss or gradient is not finite.
    """
    model = task.model
    optimizer = make_optimizer(model, config, worker.device)
    start, history, saved = 0, [], 0
    if resume is not None:
        restore_tensors(model, optimizer, resume.tensors)
        start, history, saved = resume.step, list(resume.history), resume.step
    window: list[dict[str, Tensor]] = []
    for step, batch in enumerate(stream.batches(start, config.steps, collate), start):
        torch.manual_seed(mix(config.seed, step, worker.rank) & 0x7FFFFFFFFFFFFFFF)
        if step == 0:
            task.before_training(batch, worker)
        window.append(_one_step(task, batch, step, optimizer, config, worker))
        done = step + 1
        validates = done % config.validate_every == 0 or done == config.steps
        if not (done % config.log_every == 0 or validates):
            continue
        _check_finite(window, done)
        metrics = {name: float(torch.stack([point[name] for point in window]).mean()) for name in window[0]}
        window.clear()
        if validates and worker.rank == 0:
            metrics |= task.validate()
        history.append({"step": done, **metrics})
        worker.log(done, metrics)
        if done - saved >= worker.checkpoint_every or done == config.steps:
            saved = done
            state = TrainingState(
                step=done, identity=identity, tensors=collect_tensors(model, optimizer), history=list(history)
            )
            write = (lambda folder, state=state: save_state(folder, state)) if worker.rank == 0 else None
            worker.save(done, history[-1], write)
    return history


def make_optimizer(model: nn.Module, config: TrainConfig, device: str) -> torch.optim.Adam:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fused = device in ("cpu", "cuda")
    return torch.optim.Adam(parameters, lr=config.learning_rate, betas=(0.9, config.beta2), fused=fused)


def _one_step(
    task: Trainable, batch: Any, step: int, optimizer: torch.optim.Optimizer, config: TrainConfig, worker: Worker
) -> dict[str, Tensor]:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step)
    output = task.step(batch, step)
    optimizer.zero_grad(set_to_none=True)
    output.loss.backward()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    metrics = {name: at_least_fp32(value.detach()) for name, value in output.metrics.items()}
    statistics = output.statistics
    if worker.world_size > 1:
        gradients = [_gradient(parameter) for parameter in parameters]
        flat = torch.cat([part.reshape(-1) for part in (*gradients, *metrics.values(), *statistics)])
        worker.all_reduce(flat)
        parts = _split(flat, [*gradients, *metrics.values(), *statistics])
        for parameter, part in zip(parameters, parts[: len(parameters)], strict=True):
            parameter.grad = (part / worker.world_size).contiguous(memory_format=_memory_format(parameter))
        reduced = parts[len(parameters) : len(parameters) + len(metrics)]
        metrics = {name: part / worker.world_size for name, part in zip(metrics, reduced, strict=True)}
        statistics = parts[len(parameters) + len(metrics) :]
    metrics["gradient_norm"] = torch.nn.utils.get_total_norm([_gradient(parameter) for parameter in parameters])
    optimizer.step()
    task.after_step(statistics, step, optimizer)
    return metrics


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _memory_format(tensor: Tensor) -> torch.memory_format:
    channels_last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


def _split(flat: Tensor, like: list[Tensor]) -> list[Tensor]:
    parts = flat.split([part.numel() for part in like])
    return [part.view(shape.shape) for part, shape in zip(parts, like, strict=True)]


def _check_finite(window: list[dict[str, Tensor]], done: int) -> None:
    for step, point in enumerate(window, done - len(window) + 1):
        for name, value in point.items():
            if not torch.isfinite(value):
                raise NonFiniteLossError(
                    f"expected finite numbers, found {name} = {float(value)} in step {step}; "
                    "lower the learning rate or run in fp32; the last checkpoint is kept"
                )
