"""The train_vqvae stage: image shards to a VQ-VAE, by Ray Train."""

import dataclasses
import io
import json
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipelines import ray_train
from pipelines.config import PipelineConfig, recipe_of
from pipelines.lineage import NO_LINEAGE, Lineage
from pipelines.stage import Made, Pipeline, Workspace
from pipelines.tracking import StageRun
from vqvae_core.artifacts import Artifact, FileEntry
from vqvae_core.augment import AugmentConfig, centre_crop
from vqvae_core.checkpoint import (
    CheckpointError,
    History,
    TornStateError,
    TrainingState,
    config_from_json,
    save_model,
)
from vqvae_core.errors import InputError
from vqvae_core.image_shards import ImageShards, Sample
from vqvae_core.loader import ImageLoader
from vqvae_core.order import mix
from vqvae_core.storage import Folder
from vqvae_core.train import Trainable, Worker, train, validations
from vqvae_core.train_config import TrainConfig, best_precision
from vqvae_core.vqvae import KIND, VQVAE, VQVAEConfig
from vqvae_core.vqvae_training import VQVAETraining, against_shrunken, comparison, evaluate
from vqvae_core.weight_average import load_weights

VERSION = 5
RECONSTRUCTIONS = "reconstructions.png"


def train_vqvae(
    pipeline: Pipeline, config: PipelineConfig, images: ImageShards, before: Lineage = NO_LINEAGE
) -> Artifact:
    """The VQ-VAE of image shards; the config is resolved: its precision is not auto. before: what its training goes on
    from.

    Facts: K, D, G, image_size, precision, and its figures on the validation split.
    """
    recipe, settings = plan(pipeline, config, images)
    return pipeline.make(
        "train_vqvae",
        version=VERSION,
        kind=KIND,
        recipe=before.added_to(recipe),
        inputs={"images": images.artifact},
        build=lambda space, run: _build(pipeline, settings, before, space, run),
    )


def plan(pipeline: Pipeline, config: PipelineConfig, images: ImageShards) -> tuple[dict[str, Any], dict[str, Any]]:
    """A training's recipe, and the settings of its loop."""
    config.augment.size(images.size)
    schedule = config.train
    recipe = {
        "model": recipe_of(config.vqvae),
        "train": recipe_of(schedule),
        "augment": recipe_of(config.augment),
    }
    settings = {
        "images": images.artifact.folder.uri,
        "model": dataclasses.asdict(config.vqvae),
        "train": dataclasses.asdict(schedule),
        "augment": dataclasses.asdict(config.augment),
        "loader_workers": pipeline.resources.loader_workers,
        "steps": schedule.steps,
    }
    return recipe, settings


def resolve_precision(config: TrainConfig, *, use_gpu: bool) -> TrainConfig:
    """`auto` as what it means on this machine: precision belongs to the recipe."""
    if config.precision != "auto":
        return config
    return dataclasses.replace(config, precision=best_precision("cuda" if use_gpu else "cpu"))


def _build(pipeline: Pipeline, settings: dict[str, Any], before: Lineage, space: Workspace, run: StageRun) -> Made:
    settings = {**settings, "out": space.folder.uri, "identity": space.work}
    value = ray_train.fit(
        pipeline, loop, settings, name="train_vqvae", work=space.work, folder=space.folder, run=run, begin=before.state
    )
    facts = {**value["facts"], "device": ray_train.describe(pipeline.resources)}
    return Made([FileEntry(**entry) for entry in value["files"]], facts, value["work_seconds"])


def loop(settings: dict[str, Any], worker: Worker, resume: TrainingState | None) -> dict[str, Any]:
    """Runs on each rank, with or without Ray. Rank 0 writes the model's files and returns them with their facts."""
    images, schedule, loader, worker = begin(settings, worker)
    model = VQVAE(config_from_json(VQVAEConfig, settings["model"]))
    task = VQVAETraining(
        model,
        steps=schedule.steps,
        steps_per_epoch=loader.order.steps_per_epoch,
        seed=schedule.seed,
        precision=schedule.precision,
        worker=worker,
        validation=centre_crop(read_pixels(images, "validation", schedule.validation_images), loader.size),
    )
    history = train(task, loader, schedule, worker, settings["identity"], resume)
    if worker.rank != 0:
        return {}
    if worker.until is not None:
        return {"history": history}
    best = load_best(task, history, worker)
    return _finish(settings, model, images, loader, schedule, history, worker, best)


def begin(settings: dict[str, Any], worker: Worker) -> tuple[ImageShards, TrainConfig, ImageLoader, Worker]:
    """What a training on image shards starts with, on each rank: shards, schedule, their batches, and the worker. The
    generator of initial weights is seeded, alike on all ranks."""
    images, schedule = ImageShards.open(Folder(settings["images"])), TrainConfig(**settings["train"])
    loader = ImageLoader(
        images,
        schedule,
        AugmentConfig(**settings["augment"]),
        rank=worker.rank,
        world_size=worker.world_size,
        num_workers=settings["loader_workers"],
        warn=worker.warn,
    )
    torch.manual_seed(mix(schedule.seed, 0) & (2**63 - 1))
    return images, schedule, loader, sharing_its_core(worker, loader)


def sharing_its_core(worker: Worker, loader: ImageLoader) -> Worker:
    """A worker whose loader decodes ahead while it waits for other ranks, where it computes on the same cores."""
    if worker.world_size == 1 or torch.device(worker.device).type != "cpu":
        return worker
    return dataclasses.replace(worker, all_reduce=loader.during(worker.all_reduce))


def load_best(task: Trainable, history: History, worker: Worker) -> int:
    """Give a model the weights that did best in this training's validations, out of their checkpoint, or else the best
    that are whole. Returns their step. Raises `CheckpointError` where none are."""
    torn: list[str] = []
    for point in sorted(validations(history, worker.begin), key=task.score):
        step = int(point["step"])
        try:
            state = worker.load(step)
        except TornStateError as error:  # those of most validations are not kept
            torn.append(str(error))
            continue
        if torn:
            worker.warn(f"{torn[0]}; the weights of step {step} are used, the best that are whole")
        if state is not None:
            load_weights(task.model, state.tensors)
        return step
    raise CheckpointError(
        f"expected a whole training state of a validated step, found none: {torn[0]}; move its folder away to train "
        "again"
    )


def read_pixels(images: ImageShards, split: str, limit: int | None = None) -> torch.Tensor:
    """Pixels, uint8 (N, H, W, 3), of the first images of a split. Raises `InputError` where the split is empty."""
    samples: list[Sample] = []
    for path in images.shards(split):
        samples += images.read(path)
        if limit is not None and len(samples) >= limit:
            break
    if not samples:
        raise InputError(
            f"expected a {split} split in {images.artifact.folder.uri}, found no image; give the source one by its "
            "folders or file names, or --data.validation-fraction, or hold some back with --shard.holdout-images"
        )
    return torch.from_numpy(np.stack([sample.pixels() for sample in samples[:limit]]))


def _finish(
    settings: dict[str, Any],
    model: VQVAE,
    images: ImageShards,
    loader: ImageLoader,
    schedule: TrainConfig,
    history: History,
    worker: Worker,
    best: int,
) -> dict[str, Any]:
    model.eval()
    pixels = centre_crop(read_pixels(images, "validation"), loader.size)
    figures = evaluate(model, pixels, schedule.precision, worker.device)
    facts = {
        "K": model.config.quantizer.num_codes,
        "D": model.config.quantizer.code_dim,
        "G": model.config.quantizer.num_groups,
        "image_size": loader.size,
        "precision": schedule.precision,
        "best_step": best,
        "left_out_of_an_epoch": loader.order.left_out,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "validation_images": len(pixels),
        **figures,
        **against_shrunken(model.config, pixels),
    }
    files = {
        "model.safetensors": save_model(model),
        "config.json": json.dumps(settings["model"], indent=1).encode(),
        "history.json": json.dumps(history).encode(),
        RECONSTRUCTIONS: comparison(model, pixels, schedule.precision, worker.device),
    }
    return {"files": write_files(Folder(settings["out"]), files), "facts": facts}


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def write_files(folder: Folder, files: dict[str, bytes]) -> list[dict[str, Any]]:
    """Write files and return their entries as JSON values."""
    for name, data in files.items():
        folder.write(name, data)
    return [dataclasses.asdict(FileEntry.of(name, data)) for name, data in files.items()]


if __name__ == "__main__":
    from pipelines import cli, full

    cli.run(lambda arguments: full.main(arguments, until="train_vqvae"))
