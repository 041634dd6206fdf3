"""One training loop for all models. It counts steps, not epochs, and knows no Ray: only a small `Worker`."""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from vqvae_core.checkpoint import History, TrainingState, collect_tensors, restore_tensors
from vqvae_core.errors import StoppedError
from vqvae_core.gradients import FlatGradients
from vqvae_core.kept_memory import kept_memory
from vqvae_core.order import mix
from vqvae_core.quantizer import at_least_fp32
from vqvae_core.train_config import Precision, TrainConfig, learning_rate
from vqvae_core.weight_average import WeightAverage


class NonFiniteLossError(ArithmeticError):
    """Training stopped because a number was no longer finite. The last checkpoint is good."""


@dataclass(frozen=True)
class Piece:
    """Where a piece of a batch stands: the number of its first sample in the global batch of so many samples."""

    first: int
    batch_size: int


@dataclass(frozen=True)
class StepOutput:
    """loss: a scalar, the mean over the piece's samples. metrics: scalars, likewise. statistics: tensors that are
    summed over pieces and ranks, and handed to `Trainable.after_step`."""

    loss: Tensor
    metrics: dict[str, Tensor]
    statistics: list[Tensor]


@runtime_checkable
class Trainable(Protocol):
    """A model with its loss, as the loop sees it. It has an attribute `model`, an nn.Module."""

    model: Any

    def before_training(self, pieces: Sequence[tuple[Any, Piece]], worker: "Worker") -> None:
        """Called once, at step 0, with the rank's part of the first batch: data-dependent starts."""
        ...

    def step(self, batch: Any, piece: Piece, step: int) -> StepOutput: ...

    def after_step(self, statistics: list[Tensor], step: int, optimizer: torch.optim.Optimizer) -> None:
        """Called after the optimizer's step, with the statistics summed over all ranks."""
        ...

    def figures(self, since: int, done: int) -> dict[str, float]:
        """What a point of the curves holds beside the means of its steps, `since` + 1 to `done`."""
        ...

    def validate(self) -> dict[str, float]: ...

    def pictures(self) -> dict[str, bytes]:
        """PNG files by name: what to look at after a validation."""
        ...

    def score(self, metrics: Mapping[str, int | float]) -> float:
        """How bad a validation was: the weights with the lowest score are the best."""
        ...


@runtime_checkable
class Batches(Protocol):
    """A rank's part of each global batch, by step. A batch is a tensor, or a tuple of them, with samples in front."""

    def batches(self, start: int, stop: int) -> Iterator[Any]: ...


def _keep(_: Tensor) -> None:
    """The sum over one rank."""


@dataclass(frozen=True, kw_only=True)
class Worker:
    """Where a training loop runs: one of `world_size` ranks, and the way out for what it reports.

    micro_batch: samples that the device takes at once; more are taken one part after the other; None: all. all_reduce:
    sums a tensor over ranks, in place. log(step, metrics), show(step, pictures) and save(state, step of the best state)
    are called on rank 0; save may go on in the background until flush(). load(step): a saved state. warn(line): to
    whoever watches. asked(), on rank 0 after each step: whether to save now, or to save and stop with `StoppedError`.
    compile: where the device gains from it. until: a step after which the loop ends, with a validation and a state, for
    another training to go on from; None: that of the schedule. begin: the step of another training's state that this
    one went on from: its best weights are of a validation after it.
    """

    rank: int = 0
    world_size: int = 1
    device: str = "cpu"
    checkpoint_every: int = 1000
    micro_batch: int | None = None
    compile: bool = False
    until: int | None = None
    begin: int = 0
    all_reduce: Callable[[Tensor], None] = _keep
    log: Callable[[int, dict[str, float]], None] = lambda step, metrics: None
    show: Callable[[int, dict[str, bytes]], None] = lambda step, pictures: None
    warn: Callable[[str], None] = print
    save: Callable[[TrainingState, int | None], None] = lambda state, best_step: None
    flush: Callable[[], None] = lambda: None
    load: Callable[[int], TrainingState | None] = lambda step: None
    asked: Callable[[], Literal["", "save", "stop"]] = lambda: ""


def to_device(model: nn.Module, device: str) -> None:
    """Move a model, in the layout that convolutions run fastest in."""
    model.to(device)
    model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def autocast(device: str, precision: Precision) -> torch.autocast:
    """bf16 where the precision says so."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16")


@dataclass
class _Curves:
    """What was measured so far. pending: the metrics of each step since the last point."""

    history: History = field(default_factory=list)
    pending: list[dict[str, Tensor]] = field(default_factory=list)

    @property
    def last_point(self) -> int:
        return int(self.history[-1]["step"]) if self.history else 0

    def check_finite(self, done: int, saved: int) -> None:
        for step, point in enumerate(self.pending, done - len(self.pending) + 1):
            for name, value in point.items():
                if not torch.isfinite(value):
                    kept = f"the checkpoint of step {saved} is good and kept" if saved else "there is no checkpoint yet"
                    raise NonFiniteLossError(
                        f"expected finite numbers, found {name} = {float(value)} in step {step}; "
                        f"lower the learning rate, set a max_gradient_norm or run in fp32; {kept}"
                    )

    def means(self) -> dict[str, float]:
        """In double precision, so that metrics that came out of a state count as those that did not."""
        count = len(self.pending)
        return {name: sum(float(point[name]) for point in self.pending) / count for name in self.pending[0]}


def best_step(history: History, task: Trainable, begin: int = 0) -> int | None:
    """The step of the validation after `begin` with the lowest score, the first of equals; None where there was
    none."""
    points = validations(history, begin)
    return int(min(points, key=task.score)["step"]) if points else None


def validations_since_best(history: History, task: Trainable) -> int:
    """How many validations there were after the best one."""
    points, best = validations(history), best_step(history, task)
    return sum(point["step"] > best for point in points) if best is not None else 0


def validations(history: History, begin: int = 0) -> History:
    """The points of the curves after `begin` at which there was a validation."""
    return [
        point for point in history
        if point["step"] > begin and any(name.startswith("validation_") for name in point)
    ]  # fmt: skip


def train(
    task: Trainable,
    batches: Batches,
    config: TrainConfig,
    worker: Worker,
    identity: str,
    resume: TrainingState | None = None,
) -> History:
    """Train to `config.steps` and return the curves: one dict for each logged step, the same after any restart.

    Random numbers are a function of (seed, step, rank), the order of samples of (seed, step): a state needs neither.
    Gradients and statistics go through one flat sum in a fixed order, in the first step after a restart as in any
    other. States are saved every `checkpoint_every` steps, where a validation is the best so far, and at the end, which
    comes early where `patience` is over.
    Raises `NonFiniteLossError` where a loss or gradient is not finite, `StoppedError` where it was asked to stop.
    """
    with kept_memory(worker.device), _deterministic(config.deterministic, worker.device):
        return _Loop(task, config, worker, identity).run(batches, resume)


class _Loop:
    def __init__(self, task: Trainable, config: TrainConfig, worker: Worker, identity: str) -> None:
        self._task, self._config, self._worker, self._identity = task, config, worker, identity
        self._optimizer = make_optimizer(task.model, config, worker.device)
        self._parameters = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        self._gradients = FlatGradients(self._parameters)
        self._average = WeightAverage(task.model, config.ema_decay) if config.ema_decay else None
        self._curves = _Curves()
        self._saved = 0
        self._best: int | None = None
        self._is_over = False  # by patience
        self._stop = min(config.steps, worker.until or config.steps)

    def run(self, batches: Batches, resume: TrainingState | None) -> History:
        start = self._restore(resume) if resume is not None else 0
        try:
            self._go(batches, start)
        finally:  # also where a number is not finite: the message names a state that is then written, or this says why
            self._worker.flush()
        return self._curves.history

    def _go(self, batches: Batches, start: int) -> None:
        config, worker = self._config, self._worker
        if self._is_over:
            return
        with contextlib.closing(batches.batches(start, self._stop)) as waiting:  # type: ignore[type-var]
            for step, batch in enumerate(waiting, start):
                torch.manual_seed(mix(config.seed, step, worker.rank) & 0x7FFFFFFFFFFFFFFF)
                pieces = _pieces(batch, config.batch_size, worker)
                if step == 0:
                    self._task.before_training(pieces, worker)
                self._curves.pending.append(self._step(pieces, step))
                self._after(step + 1)
                if self._is_over:
                    return

    def _restore(self, state: TrainingState) -> int:
        restore_tensors(self._task.model, self._optimizer, state.tensors)
        if self._average is not None:
            self._average.restore(state.tensors)
        self._curves.history = list(state.history)
        self._curves.pending = [
            {name: torch.tensor(value, dtype=torch.float64) for name, value in point.items()} for point in state.pending
        ]
        self._saved, self._best = state.step, best_step(state.history, self._task, self._worker.begin)
        self._is_over = self._patience_is_over()
        return state.step

    def _step(self, pieces: list[tuple[Any, Piece]], step: int) -> dict[str, Tensor]:
        """One step of the optimizer: the metrics, means over the global batch."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self._config, step)
        sums: list[Tensor] = []
        names: list[str] = []
        for number, (part, piece) in enumerate(pieces):
            output = self._task.step(part, piece, step)
            names = list(output.metrics)
            metrics = [at_least_fp32(value.detach()) / len(pieces) for value in output.metrics.values()]
            found = [*metrics, *output.statistics]
            if number == 0:
                self._gradients.clear(sum(value.numel() for value in found))
            sums = found if number == 0 else [one + other for one, other in zip(sums, found, strict=True)]
            (output.loss / len(pieces)).backward()
        sums = self._gradients.reduce(self._worker.all_reduce, self._worker.world_size, sums)
        metrics = {name: value / self._worker.world_size for name, value in zip(names, sums[: len(names)], strict=True)}
        metrics["gradient_norm"] = norm = self._gradients.norm()
        if self._config.max_gradient_norm is not None:
            self._gradients.clip(norm, self._config.max_gradient_norm)
        self._optimizer.step()
        self._task.after_step(sums[len(names) :], step, self._optimizer)
        if self._average is not None:
            self._average.update(step)
        return metrics

    def _after(self, done: int) -> None:
        config, worker, curves = self._config, self._worker, self._curves
        validates = done % config.validate_every == 0 or done == self._stop
        if validates or done % config.log_every == 0:
            curves.check_finite(done, self._saved)
            point = {"step": done, **curves.means(), **self._task.figures(curves.last_point, done)}
            curves.pending.clear()
            if validates and worker.rank == 0:
                point |= self._validate(done)
            curves.history.append(point)
            if worker.rank == 0:
                worker.log(done, {name: value for name, value in point.items() if name != "step"})
                self._best = best_step(curves.history, self._task, worker.begin) if validates else self._best
        if validates and config.patience is not None:
            self._is_over = self._all_told(self._patience_is_over())
        if worker.rank != 0:
            return
        if self._is_over and done < config.steps:
            worker.warn(f"stopped at step {done}, since no validation was better than that of step {self._best}")
        asked = worker.asked()
        is_last = done == self._stop or self._is_over
        if done - self._saved >= worker.checkpoint_every or is_last or done == self._best or asked:
            curves.check_finite(done, self._saved)
            worker.save(self._state(done), self._best)
            self._saved = done
        if asked == "stop" and not is_last:
            raise StoppedError(f"training was asked to stop and did so at step {done}, after a checkpoint")

    def _patience_is_over(self) -> bool:
        patience = self._config.patience
        return patience is not None and validations_since_best(self._curves.history, self._task) >= patience

    def _all_told(self, value: bool) -> bool:
        """What rank 0 has: others' curves have no validations."""
        told = torch.tensor([float(value and self._worker.rank == 0)], device=self._worker.device)
        self._worker.all_reduce(told)
        return bool(told.item())

    def _validate(self, done: int) -> dict[str, float]:
        with self._average.applied() if self._average is not None else contextlib.nullcontext():
            metrics = self._task.validate()
            self._worker.show(done, self._task.pictures())
        return metrics

    def _state(self, done: int) -> TrainingState:
        tensors = collect_tensors(self._task.model, self._optimizer)
        if self._average is not None:
            tensors |= self._average.tensors()
        pending = [{name: float(value) for name, value in point.items()} for point in self._curves.pending]
        return TrainingState(
            step=done, identity=self._identity, tensors=tensors, history=list(self._curves.history), pending=pending
        )


def make_optimizer(model: nn.Module, config: TrainConfig, device: str) -> torch.optim.Adam:
    """Adam over what is trained, fused where there is a kernel for it."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fused = torch.device(device).type in ("cpu", "cuda")
    return torch.optim.Adam(parameters, lr=config.learning_rate, betas=(0.9, config.beta2), fused=fused)


def _pieces(batch: Any, batch_size: int, worker: Worker) -> list[tuple[Any, Piece]]:
    """A rank's batch in equal pieces of at most `micro_batch` samples: as few as there can be."""
    parts = batch if isinstance(batch, tuple) else (batch,)
    share = len(parts[0])
    limit = min(worker.micro_batch or share, share)
    count = next(number for number in range(-(-share // limit), share + 1) if share % number == 0)
    size = share // count
    cut = [
        tuple(part[start : start + size] for part in parts) if isinstance(batch, tuple) else batch[start : start + size]
        for start in range(0, share, size)
    ]
    return [(part, Piece(worker.rank * share + number * size, batch_size)) for number, part in enumerate(cut)]


@contextlib.contextmanager
def _deterministic(wanted: bool, device: str) -> Iterator[None]:
    """Only kernels that give the same bits each time; an operation that has none raises."""
    if not wanted:
        yield
        return
    settings: Any = torch.utils.deterministic  # a module that is an object
    before = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    tries = torch.backends.cudnn.benchmark
    if torch.device(device).type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False  # a check for forgotten values, at the cost of a pass
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        settings.fill_uninitialized_memory = before[1]
        torch.backends.cudnn.benchmark = tries
