"""What training on two ranks costs: together under Ray Train, and as two processes that know nothing of each other.

    python -m benchmarks.scaling            # 5 rounds
    python -m benchmarks.scaling --quick

The demo's model on 84x84 images that are read from shards, 64 images a rank and step (the paper's batch of 128), a core
and a thread a rank (its loader runs on the same core), in the precision that the machine is best at. Rates are of the
stretch after the first 20 steps. The two independent processes run side by side: whatever cores share, they share too,
so their summed rate is the limit. Bar: at least 93 % of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers import Bar, interleaved, median_ratio, pin, report
from benchmarks.tokenize import make_images
from pipelines import ray_train
from pipelines.config import Resources
from pipelines.presets import DOOM84
from vqvae_core.augment import AugmentConfig
from vqvae_core.checkpoint import TrainingState
from vqvae_core.image_shards import ImageShards
from vqvae_core.loader import ImageLoader
from vqvae_core.storage import Folder
from vqvae_core.train import Worker, train
from vqvae_core.train_config import TrainConfig, best_precision
from vqvae_core.vqvae import VQVAE
from vqvae_core.vqvae_training import VQVAETraining

RANKS, RANK_BATCH, WARM, STEPS, LOG = 2, 64, 20, 90, 10


def loop(settings: dict[str, Any], worker: Worker, resume: TrainingState | None) -> dict[str, Any]:
    """A training on one core that returns images/s of this rank, without its first steps and its last validation."""
    os.sched_setaffinity(0, {settings["cores"][worker.rank]})
    images = ImageShards.open(Folder(settings["images"]))
    config = TrainConfig(**settings["train"])
    loader = ImageLoader(images, config, AugmentConfig(), rank=worker.rank, world_size=worker.world_size)
    torch.manual_seed(0)
    marks: dict[int, float] = {}

    def mark(step: int, metrics: dict[str, float]) -> None:
        marks[step] = time.perf_counter()
        worker.log(step, metrics)

    task = VQVAETraining(
        VQVAE(DOOM84.vqvae), steps=config.steps, steps_per_epoch=loader.order.steps_per_epoch, seed=0,
        precision=config.precision, worker=worker, validation=torch.zeros(1, 84, 84, 3, dtype=torch.uint8),
    )  # fmt: skip
    train(task, loader, config, dataclasses.replace(worker, log=mark), "run")
    if worker.rank > 0:  # only the first rank logs
        return {}
    first, last = sorted(marks)[WARM // LOG - 1], sorted(marks)[-2]
    return {"images_per_second": (last - first) * RANK_BATCH / (marks[last] - marks[first])}


def settings_of(images: str, cores: list[int], steps: int) -> dict[str, Any]:
    ranks = len(cores)
    config = TrainConfig(
        steps=steps, batch_size=RANK_BATCH * ranks, num_lanes=4 * ranks, precision=best_precision("cpu"),
        log_every=LOG, validate_every=steps, learning_rate=1e-3,
    )  # fmt: skip
    return {"images": images, "train": dataclasses.asdict(config), "cores": cores, "steps": steps}


def two_cores() -> list[int]:
    return sorted(os.sched_getaffinity(0))[:RANKS]


class _Silent:
    """A run that is tracked nowhere."""

    def log(self, points: Any) -> None: ...

    def show(self, step: int, pictures: Any) -> None: ...


def together(images: str, steps: int) -> float:
    """Images/s of two ranks under Ray Train."""
    from cluster.session import Session
    from pipelines.stage import Pipeline

    session = Session(RANKS)
    with tempfile.TemporaryDirectory() as place:
        root = Folder.of(place)
        resources = Resources(num_workers=RANKS, cpus_per_worker=1, checkpoint_every=100_000)
        pipeline = Pipeline(root, resources, session, tracker=None)  # type: ignore[arg-type]
        try:
            value = ray_train.fit(
                pipeline, loop, settings_of(images, two_cores(), steps), name="scaling", work="w", folder=root,
                run=_Silent(),  # type: ignore[arg-type]
            )  # fmt: skip
        finally:
            session.close()
    return RANKS * value["images_per_second"]


def apart(images: str, steps: int) -> float:
    """The summed images/s of two processes, which begin to train at the same time."""
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(RANKS), context.Queue()
    processes = [context.Process(target=_alone, args=(images, core, steps, barrier, queue)) for core in two_cores()]
    for process in processes:
        process.start()
    rates = [queue.get(timeout=600) for _ in processes]
    for process in processes:
        process.join()
    return sum(rates)


def _alone(images: str, core: int, steps: int, barrier: Any, queue: Any) -> None:
    torch.set_num_threads(1)
    logging.disable()
    barrier.wait()
    queue.put(loop(settings_of(images, [core], steps), Worker(), None)["images_per_second"])


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    pin(RANKS)
    steps, rounds = (50, 1) if options.quick else (STEPS, 5)
    with tempfile.TemporaryDirectory() as place:
        images = Folder.of(Path(place) / "images")
        make_images(images, 16 * 1024)
        rates = interleaved(
            {"together": lambda: together(images.uri, steps), "apart": lambda: apart(images.uri, steps)}, rounds
        )
    bars = [Bar("share_of_two_apart", median_ratio(rates["together"], rates["apart"]), 0.93)]
    settings = {
        "ranks": RANKS,
        "images_a_rank_and_step": RANK_BATCH,
        "steps": steps,
        "precision": best_precision("cpu"),
        "model": "doom84",
    }
    rounded = {name: [round(rate, 1) for rate in values] for name, values in rates.items()}
    return report("scaling", settings, bars, {"images_per_second": rounded})


if __name__ == "__main__":
    sys.exit(main())
