"""The train_prior stage: token shards to a gated PixelCNN, by Ray Train."""

import dataclasses
import json
import math
from typing import Any

import numpy as np
import torch

from pipelines import ray_train
from pipelines.config import PipelineConfig, recipe_of
from pipelines.lineage import NO_LINEAGE, Lineage
from pipelines.stage import Made, Pipeline, Workspace
from pipelines.tracking import StageRun
from pipelines.train_vqvae import load_best, write_files
from vqvae_core.artifacts import Artifact, FileEntry
from vqvae_core.checkpoint import TrainingState, config_from_json
from vqvae_core.errors import InputError
from vqvae_core.order import mix
from vqvae_core.pixelcnn import PixelCNN, PixelCNNConfig
from vqvae_core.prior import KIND, Prior
from vqvae_core.prior_training import PriorTraining, bits_per_token, latent_bits_per_dim, unigram_bits_per_token
from vqvae_core.storage import Folder
from vqvae_core.token_loader import TokenLoader
from vqvae_core.token_shards import TokenShards
from vqvae_core.train import Worker, train
from vqvae_core.train_config import TrainConfig

VERSION = 4


def train_prior(
    pipeline: Pipeline, config: PipelineConfig, tokens: TokenShards, before: Lineage = NO_LINEAGE
) -> Artifact:
    """The prior of token shards, conditional where they have labels and the config uses them. before: what its training
    goes on from. Facts: its bits on the validation split."""
    recipe, settings = plan(pipeline, config, tokens)
    return pipeline.make(
        "train_prior",
        version=VERSION,
        kind=KIND,
        recipe=before.added_to(recipe),
        inputs={"tokens": tokens.artifact},
        build=lambda space, run: _build(pipeline, settings, before, space, run),
    )


def plan(pipeline: Pipeline, config: PipelineConfig, tokens: TokenShards) -> tuple[dict[str, Any], dict[str, Any]]:
    """A training's recipe, and the settings of its loop."""
    schedule = config.train_prior
    recipe = {"model": recipe_of(config.prior), "train": recipe_of(schedule)}
    settings = {
        "tokens": tokens.artifact.folder.uri,
        "model": dataclasses.asdict(config.prior),
        "train": dataclasses.asdict(schedule),
        "steps": schedule.steps,
    }
    return recipe, settings


def _build(pipeline: Pipeline, settings: dict[str, Any], before: Lineage, space: Workspace, run: StageRun) -> Made:
    settings = {**settings, "out": space.folder.uri, "identity": space.work}
    value = ray_train.fit(
        pipeline, loop, settings, name="train_prior", work=space.work, folder=space.folder, run=run, begin=before.state
    )
    facts = {**value["facts"], "device": ray_train.describe(pipeline.resources)}
    return Made([FileEntry(**entry) for entry in value["files"]], facts, value["work_seconds"])


def loop(settings: dict[str, Any], worker: Worker, resume: TrainingState | None) -> dict[str, Any]:
    """Runs on each rank, with or without Ray."""
    shards = TokenShards.open(Folder(settings["tokens"]))
    schedule = TrainConfig(**settings["train"])
    loader = TokenLoader(shards, schedule, rank=worker.rank, world_size=worker.world_size)
    config = config_from_json(PixelCNNConfig, settings["model"])
    label_map = (shards.label_map or None) if config.use_labels else None
    torch.manual_seed(mix(schedule.seed, 0) & (2**63 - 1))
    model = PixelCNN(config, shards.shape, len(label_map or {}))
    task = PriorTraining(
        model,
        seed=schedule.seed,
        precision=schedule.precision,
        worker=worker,
        validation=read_tokens(shards, schedule.validation_images),
    )
    history = train(task, loader, schedule, worker, settings["identity"], resume)
    if worker.rank != 0:
        return {}
    if worker.until is not None:
        return {"history": history}
    best = load_best(task, history, worker)
    facts = {**_figures(model.eval(), shards, schedule, worker), "best_step": best}
    prior = Prior(model, label_map, shards.artifact.facts["model"])
    out = {**prior.files(settings["model"]), "history.json": json.dumps(history).encode()}
    return {"files": write_files(Folder(settings["out"]), out), "facts": facts}


def read_tokens(
    shards: TokenShards, limit: int | None = None, split: str = "validation"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, int64 (N, H, W, G), and labels (N,) of the first images of a split."""
    tokens, labels = [], []
    for path in shards.shards(split):
        if limit is not None and sum(map(len, tokens)) >= limit:
            break
        table = shards.read(path)
        tokens.append(table.tokens.astype(np.int64))
        labels.append(table.labels.astype(np.int64))
    if not tokens or not sum(map(len, tokens)):
        raise InputError(f"expected a {split} split in {shards.artifact.folder.uri}, found no row")
    return torch.from_numpy(np.concatenate(tokens)[:limit]), torch.from_numpy(np.concatenate(labels)[:limit])


def _figures(model: PixelCNN, shards: TokenShards, schedule: TrainConfig, worker: Worker) -> dict[str, Any]:
    tokens, labels = read_tokens(shards)
    shape = shards.shape
    bits = bits_per_token(model, tokens, labels, schedule.precision, worker.device)
    unigram = unigram_bits_per_token(tokens, shape.num_codes)
    return {
        "validation_images": len(tokens),
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "precision": schedule.precision,
        "bits_per_token": bits,
        "unigram_bits_per_token": unigram,
        "gain_bits_per_token": unigram - bits,
        "latent_bits_per_dim": latent_bits_per_dim(bits, shape),
        "latent_bits_per_dim_uniform": latent_bits_per_dim(math.log2(shape.num_codes), shape),
    }


if __name__ == "__main__":
    from pipelines import cli, full

    cli.run(lambda arguments: full.main(arguments, until="train_prior"))
