"""What training on two ranks costs: together under Ray Train, and as two processes that know nothing of each other.

    python -m benchmarks.scaling            # 3 starts of 2 x 64 seconds
    python -m benchmarks.scaling --quick

The demo's model on 84x84 images that are read from shards, 64 images a rank and step (the paper's batch of 128), a core
and a thread a rank (its loader runs on the same core), in the precision that the machine is best at. Both are started
and then take turns of four seconds: while one trains, all processes of the other are stopped, Ray's own included, so
that a slow minute of the machine hits both. Some starts are faster than others, whatever the reason, so both are
started three times. Steps are counted after the first ten. The two independent processes run side by side: whatever
cores share, they share too, so their summed rate is the limit. Bar: at least 93 % of it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers import Bar, Turn, counted, in_turns, pin, report
from benchmarks.tokenize import make_images
from pipelines import ray_train
from pipelines.config import Resources
from pipelines.presets import DOOM84
from pipelines.train_vqvae import sharing_its_core
from vqvae_core.augment import AugmentConfig
from vqvae_core.checkpoint import TrainingState
from vqvae_core.image_shards import ImageShards
from vqvae_core.loader import ImageLoader
from vqvae_core.storage import Folder
from vqvae_core.train import StoppedError, Worker, train
from vqvae_core.train_config import TrainConfig, best_precision
from vqvae_core.vqvae import VQVAE
from vqvae_core.vqvae_training import VQVAETraining

RANKS, RANK_BATCH, WARM = 2, 64, 10
TURN_SECONDS, TURNS, STARTS = 4.0, 16, 3
ENDLESS = 1_000_000  # steps


class _Counted:
    """Batches that are counted."""

    def __init__(self, loader: ImageLoader, path: str) -> None:
        self._loader, self._path = loader, path

    def batches(self, start: int, stop: int) -> Iterator[Any]:
        return counted(self._loader.batches(start, stop), self._path)


def loop(settings: dict[str, Any], worker: Worker, resume: TrainingState | None) -> dict[str, Any]:
    """A training on one core, until it is ended."""
    os.sched_setaffinity(0, {settings["cores"][worker.rank]})
    images = ImageShards.open(Folder(settings["images"]))
    config = TrainConfig(**settings["train"])
    loader = ImageLoader(images, config, AugmentConfig(), rank=worker.rank, world_size=worker.world_size)
    worker = sharing_its_core(worker, loader)
    torch.manual_seed(0)
    task = VQVAETraining(
        VQVAE(DOOM84.vqvae), steps=config.steps, steps_per_epoch=loader.order.steps_per_epoch, seed=0,
        precision=config.precision, worker=worker, validation=torch.zeros(1, 84, 84, 3, dtype=torch.uint8),
    )  # fmt: skip
    batches = _Counted(loader, settings["counts"][worker.rank])
    train(task, batches, config, worker, "run")
    return {}


def settings_of(images: str, cores: list[int], counts: list[str]) -> dict[str, Any]:
    ranks = len(cores)
    config = TrainConfig(
        steps=ENDLESS, batch_size=RANK_BATCH * ranks, num_lanes=4 * ranks, precision=best_precision("cpu"),
        log_every=10, validate_every=ENDLESS, learning_rate=1e-3,
    )  # fmt: skip
    return {"images": images, "train": dataclasses.asdict(config), "cores": cores, "counts": counts, "steps": ENDLESS}


def two_cores() -> list[int]:
    return sorted(os.sched_getaffinity(0))[:RANKS]


class _Silent:
    """A run that is tracked nowhere."""

    def log(self, points: Any) -> None: ...

    def show(self, step: int, pictures: Any) -> None: ...


def _together(images: str, place: str, counts: list[str]) -> None:
    """Two ranks under Ray Train, until SIGTERM."""
    from benchmarks import scaling  # by this name Ray's workers find the loop too
    from cluster.session import Session
    from pipelines.stage import Pipeline

    session, root = Session(RANKS), Folder.of(place)
    resources = Resources(num_workers=RANKS, cpus_per_worker=1, checkpoint_every=ENDLESS)
    pipeline = Pipeline(root, resources, session, tracker=None)  # type: ignore[arg-type]
    try:
        with contextlib.suppress(StoppedError):
            ray_train.fit(
                pipeline, scaling.loop, settings_of(images, two_cores(), counts), name="scaling", work="w", folder=root,
                run=_Silent(),  # type: ignore[arg-type]
            )  # fmt: skip
    finally:
        session.close()


def _apart(images: str, core: int, counts: list[str]) -> None:
    torch.set_num_threads(1)
    logging.disable()
    loop(settings_of(images, [core], counts), Worker(), None)


def measure(images: str, place: Path, turns: int) -> dict[str, list[Turn]]:
    """The turns of both after one start, in batches of a rank."""
    place.mkdir()
    counts = {name: [str(place / f"{name}-{rank}") for rank in range(RANKS)] for name in ("together", "apart")}
    alone = zip(two_cores(), counts["apart"], strict=True)
    jobs: dict[str, list[tuple[Callable[..., None], tuple[Any, ...]]]] = {
        "apart": [(_apart, (images, core, [path])) for core, path in alone],
        "together": [(_together, (images, str(place / "root"), counts["together"]))],
    }
    return in_turns({name: (jobs[name], counts[name], WARM) for name in jobs}, turns, TURN_SECONDS)


def rate(turns: list[Turn]) -> float:
    return RANK_BATCH * sum(turn.count for turn in turns) / sum(turn.seconds for turn in turns)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    pin(RANKS)
    turns, starts = (4, 1) if options.quick else (TURNS, STARTS)
    found: dict[str, list[list[Turn]]] = {"apart": [], "together": []}
    with tempfile.TemporaryDirectory() as place:
        images = Folder.of(Path(place) / "images")
        make_images(images, 16 * 1024)
        for start in range(starts):
            print(f"start {start + 1} of {starts}", flush=True)
            for name, turned in measure(images.uri, Path(place) / f"start-{start}", turns).items():
                found[name].append(turned)
    together, apart = (rate([turn for turned in found[name] for turn in turned]) for name in ("together", "apart"))
    settings = {
        "ranks": RANKS,
        "images_a_rank_and_step": RANK_BATCH,
        "starts": starts,
        "turns": turns,
        "seconds_of_a_turn": TURN_SECONDS,
        "precision": best_precision("cpu"),
        "model": "doom84",
    }
    rates = {name: [round(rate(turned), 1) for turned in found[name]] for name in found}
    return report(
        "scaling", settings, [Bar("share_of_two_apart", together / apart, 0.93)], {"images_per_second": rates}
    )


if __name__ == "__main__":
    sys.exit(main())
