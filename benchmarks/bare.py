"""Trainings on a bare machine, without Ray: data in memory, states in a folder, visits of some minutes."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from pipelines.config import PipelineConfig, check_equal_steps
from pipelines.presets import PRESETS
from pipelines.search_space import with_fields
from vqvae_core.checkpoint import History, StateFolder
from vqvae_core.errors import InputError
from vqvae_core.order import Order, OrderConfig
from vqvae_core.train import NonFiniteLossError, StoppedError, Trainable, Worker, best_step, train
from vqvae_core.train_config import Precision, TrainConfig, best_precision
from vqvae_core.weight_average import load_weights

VERSION = 3  # of what a step computes: a state of another is not gone on from
_SAVE_SECONDS = 60.0  # what a visit that is killed loses at most


class InMemory:
    """Batches out of tensors in memory, samples in front, in the order of `Order`: a tensor, or a tuple of several."""

    def __init__(self, config: OrderConfig, first: Tensor, *more: Tensor) -> None:
        self.data: tuple[Tensor, ...] = (first, *more)
        self.order = Order([("all", len(first))], config)

    def batches(self, start: int, stop: int) -> Iterator[Any]:
        for step in range(start, stop):
            rows = torch.from_numpy(self.order.batch(step, range(self.order.config.num_lanes)).rows)
            chosen = [values[rows] for values in self.data]
            yield tuple(chosen) if len(chosen) > 1 else chosen[0]


@dataclass(frozen=True)
class Visit:
    """What a visit leaves. steps: done so far; weights_of_step: what the model has now, those that did best in
    validation where the schedule is done, the newest where it is not; seconds: of training; images_per_second: None
    where all was done before."""

    steps: int
    weights_of_step: int
    seconds: float
    images_per_second: float | None
    history: History

    def curve(self, *names: str) -> list[list[float]]:
        """[step, value] of each validation that has one of these figures."""
        return [[point["step"], point[name]] for point in self.history for name in names if name in point]


def visit(
    make_task: Callable[[Worker], Trainable],
    batches: InMemory,
    schedule: TrainConfig,
    states: StateFolder,
    *,
    device: str,
    seconds: float,
    compiled: bool = False,
) -> Visit | None:
    """Train for so many seconds from the newest state on, and give the model its weights; None where no step was ever
    done. A state is written each minute."""
    resume = states.newest()
    saved = time.monotonic()
    deadline = saved + seconds

    def asked() -> Literal["", "save", "stop"]:
        nonlocal saved
        now = time.monotonic()
        if now > deadline:
            return "stop"
        if now - saved < _SAVE_SECONDS:
            return ""
        saved = now
        return "save"

    worker = Worker(
        device=device,
        checkpoint_every=10**9,
        compile=compiled and device == "cuda",
        save=states.save,
        flush=states.wait,
        asked=asked,
        warn=print,
    )
    task = make_task(worker)
    start, begin = resume.step if resume is not None else 0, time.monotonic()
    if seconds > 0 and start < schedule.steps:
        with contextlib.suppress(StoppedError):
            train(task, batches, schedule, worker, states.identity, resume)
    took = time.monotonic() - begin
    newest = states.newest()
    if newest is None:
        return None
    best = best_step(newest.history, task) if newest.step == schedule.steps else None
    chosen = newest if best is None else states.load(best)
    load_weights(task.model, chosen.tensors)
    rate = (newest.step - start) * schedule.batch_size / took if newest.step > start else None
    return Visit(newest.step, chosen.step, took, None if rate is None else round(rate, 1), newest.history)


def preset(name: str, fields: Sequence[str], reads: Sequence[str], device: str) -> PipelineConfig:
    """A preset with other values in some fields, from `FIELD=VALUE` each, and the precision of its schedules resolved.

    reads: the beginnings of the fields that a program reads. Raises `InputError` that says what is wrong.
    """
    for text in fields:
        field = text.partition("=")[0].lstrip("-").replace("_", "-")
        if not field.startswith(tuple(reads)):
            raise InputError(f"expected a field that this program reads ({', '.join(reads)}), found {field}")
    config = with_fields(PRESETS[name][0], fields)
    check_equal_steps(config, "train", "train_prior")
    best = best_precision(device)
    return replace(
        config,
        train=_resolved(config.train, best),
        train_prior=_resolved(config.train_prior, best),
    )


def _resolved(schedule: TrainConfig, best: Precision) -> TrainConfig:
    return replace(schedule, precision=best) if schedule.precision == "auto" else schedule


def run(main: Callable[[], int]) -> int:
    """The program's exit code: 2 where its input is not as it must be, with the reason on stderr."""
    try:
        return main()
    except (InputError, NonFiniteLossError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
