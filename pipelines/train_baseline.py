"""The train_vae, train_vimco and train_vimco_gaussian stages: image shards to a model that the VQ-VAE is compared with,
by Ray Train. Encoder, decoder, likelihood and schedule are the VQ-VAE's."""

import dataclasses
import json
from typing import Any

from pipelines import ray_train
from pipelines.config import PipelineConfig, recipe_of
from pipelines.stage import Made, Pipeline, Workspace
from pipelines.tracking import StageRun
from pipelines.train_vqvae import RECONSTRUCTIONS, begin, load_best, read_pixels, write_files
from vqvae_core.artifacts import Artifact, FileEntry
from vqvae_core.augment import centre_crop
from vqvae_core.bound_training import comparison
from vqvae_core.checkpoint import TrainingState, config_from_json, save_model
from vqvae_core.contender import KIND, baseline_config, figures, make_model, make_task, samples_of
from vqvae_core.image_shards import ImageShards
from vqvae_core.storage import Folder
from vqvae_core.train import Worker, train
from vqvae_core.vqvae import VQVAEConfig

VERSION = 3


def train_baseline(pipeline: Pipeline, config: PipelineConfig, images: ImageShards, name: str) -> Artifact:
    """The VAE or VIMCO of image shards. name: out of NAMES, but not vqvae. Facts: its bits on the validation split."""
    schedule, samples = config.train, samples_of(name, config.compare.train_samples)
    recipe = {
        "name": name,
        "model": recipe_of(config.vqvae),
        "train": recipe_of(schedule),
        "augment": recipe_of(config.augment),
        "num_samples": samples,
    }
    settings = {
        "name": name,
        "images": images.artifact.folder.uri,
        "model": dataclasses.asdict(config.vqvae),
        "train": dataclasses.asdict(schedule),
        "augment": dataclasses.asdict(config.augment),
        "num_samples": samples,
        "decode_mebibytes": pipeline.resources.decode_mebibytes,
        "loader_workers": pipeline.resources.loader_workers,
        "steps": schedule.steps,
    }
    return pipeline.make(
        f"train_{name}",
        version=VERSION,
        kind=KIND,
        recipe=recipe,
        inputs={"images": images.artifact},
        build=lambda space, run: _build(pipeline, settings, space, run),
    )


def _build(pipeline: Pipeline, settings: dict[str, Any], space: Workspace, run: StageRun) -> Made:
    settings = {**settings, "out": space.folder.uri, "identity": space.work}
    name = f"train_{settings['name']}"
    value = ray_train.fit(pipeline, _loop, settings, name=name, work=space.work, folder=space.folder, run=run)
    facts = {**value["facts"], "device": ray_train.describe(pipeline.resources)}
    return Made([FileEntry(**entry) for entry in value["files"]], facts, value["work_seconds"])


def _loop(settings: dict[str, Any], worker: Worker, resume: TrainingState | None) -> dict[str, Any]:
    """Runs on each rank, with or without Ray. Rank 0 writes the model's files and returns them with their facts."""
    name = settings["name"]
    images, schedule, loader, worker = begin(settings, worker)
    model = make_model(name, config_from_json(VQVAEConfig, settings["model"]))
    task = make_task(
        name,
        model,
        steps=schedule.steps,
        steps_per_epoch=loader.order.steps_per_epoch,
        num_samples=settings["num_samples"],
        seed=schedule.seed,
        precision=schedule.precision,
        worker=worker,
        validation=centre_crop(read_pixels(images, "validation", schedule.validation_images), loader.size),
        mebibytes=settings["decode_mebibytes"],
    )
    history = train(task, loader, schedule, worker, settings["identity"], resume)
    if worker.rank != 0:
        return {}
    best = load_best(task, history, worker)
    model.eval()
    pixels = centre_crop(read_pixels(images, "validation"), loader.size)
    samples = (settings["num_samples"],)
    found = figures(name, model, pixels, samples, schedule.precision, worker.device, settings["decode_mebibytes"])
    facts = {
        "name": name,
        "num_samples": settings["num_samples"],
        "image_size": loader.size,
        "precision": schedule.precision,
        "best_step": best,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "validation_images": len(pixels),
        **found,
    }
    files = {
        "model.safetensors": save_model(model),
        "config.json": baseline_config(name, settings["model"], settings["num_samples"]),
        "history.json": json.dumps(history).encode(),
        RECONSTRUCTIONS: comparison(model, pixels, schedule.precision, worker.device),  # type: ignore[arg-type]
    }
    return {"files": write_files(Folder(settings["out"]), files), "facts": facts}
