"""The second stage: a VQ-VAE with a few latents an image over the tokens of the first, beside two that differ only in
what the same decoder is told.

    python pipelines/train_second_stage.py --preset dmlab84-small --source FOLDER --root runs/dmlab84-small

Image shards, VQ-VAE and tokens are made, or reused, as pipelines/full.py makes them; then each kind of latents is
trained by each seed, and a table and pictures are made of all. The same command again goes on where it stopped.
"""

import dataclasses
import json
import os
from collections.abc import Callable
from typing import Any

import torch

from pipelines import cli, ray_train
from pipelines.config import PipelineConfig, check_equal_steps, config_to_manifest, recipe_of
from pipelines.program import conduct
from pipelines.second_stage_report import REPORT, make_second_stage_report
from pipelines.shard import shard
from pipelines.show_second_stage import show_second_stage, tell
from pipelines.stage import Made, Pipeline, Workspace
from pipelines.tokenize_images import tokenize_images
from pipelines.tracking import StageRun
from pipelines.train_prior import read_tokens
from pipelines.train_vqvae import load_best, train_vqvae, write_files
from vqvae_core.artifacts import Artifact, FileEntry
from vqvae_core.checkpoint import TrainingState, config_from_json
from vqvae_core.errors import InputError
from vqvae_core.order import mix
from vqvae_core.second_stage import KIND, KINDS, LatentKind, SecondStage, SecondStageConfig, SecondStageNetwork
from vqvae_core.second_stage_training import SecondStageTraining, evaluate
from vqvae_core.storage import Folder
from vqvae_core.token_loader import TokenLoader
from vqvae_core.token_shards import TokenShards
from vqvae_core.train import Worker, train
from vqvae_core.train_config import TrainConfig

VERSION = 2
_SCHEDULES = ("train", "train_second_stage")
_POOL_IMAGES = 8192


def train_second_stage(
    pipeline: Pipeline, config: PipelineConfig, tokens: TokenShards, latents: LatentKind, number: int
) -> Artifact:
    """The second stage with one kind of latents, run `number` of its seeds, over token shards. Facts: its figures on
    the validation split."""
    model = config.second_stage.with_latents(latents)
    first = config.train_second_stage
    schedule = dataclasses.replace(first, seed=first.seed + number)
    settings = {
        "tokens": tokens.artifact.folder.uri,
        "model": dataclasses.asdict(model),
        "train": dataclasses.asdict(schedule),
        "steps": schedule.steps,
    }
    stage = f"train_second_stage_{latents}"
    return pipeline.make(
        stage,
        version=VERSION,
        kind=KIND,
        recipe={"model": recipe_of(model), "train": recipe_of(schedule)},
        inputs={"tokens": tokens.artifact},
        build=lambda space, run: _build(pipeline, settings, space, run, f"{stage}, seed {schedule.seed}"),
    )


def _build(pipeline: Pipeline, settings: dict[str, Any], space: Workspace, run: StageRun, name: str) -> Made:
    settings = {**settings, "out": space.folder.uri, "identity": space.work}
    value = ray_train.fit(pipeline, _loop, settings, name=name, work=space.work, folder=space.folder, run=run)
    facts = {**value["facts"], "device": ray_train.describe(pipeline.resources)}
    return Made([FileEntry(**entry) for entry in value["files"]], facts, value["work_seconds"])


def _loop(settings: dict[str, Any], worker: Worker, resume: TrainingState | None) -> dict[str, Any]:
    """Runs on each rank, with or without Ray."""
    shards = TokenShards.open(Folder(settings["tokens"]))
    schedule = TrainConfig(**settings["train"])
    loader = TokenLoader(shards, schedule, rank=worker.rank, world_size=worker.world_size)
    torch.manual_seed(mix(schedule.seed, 0) & (2**63 - 1))
    model = SecondStageNetwork(config_from_json(SecondStageConfig, settings["model"]), shards.shape)
    task = SecondStageTraining(
        model,
        steps=schedule.steps,
        steps_per_epoch=loader.order.steps_per_epoch,
        seed=schedule.seed,
        precision=schedule.precision,
        worker=worker,
        pool=read_tokens(shards, _POOL_IMAGES, "train")[0],
        validation=read_tokens(shards, schedule.validation_images)[0],
    )
    history = train(task, loader, schedule, worker, settings["identity"], resume)
    if worker.rank != 0:
        return {}
    best = load_best(task, history, worker)
    facts = {**_figures(model.eval(), shards, schedule, worker), "best_step": best}
    out = SecondStage(model, shards.artifact.facts["model"]).files(settings["model"])
    out["history.json"] = json.dumps(history).encode()
    return {"files": write_files(Folder(settings["out"]), out), "facts": facts}


def _figures(model: SecondStageNetwork, shards: TokenShards, schedule: TrainConfig, worker: Worker) -> dict[str, Any]:
    tokens, _ = read_tokens(shards)
    return {
        "latents": model.config.latents,
        "seed": schedule.seed,
        "steps": schedule.steps,
        "validation_images": len(tokens),
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "num_decoder_parameters": sum(parameter.numel() for parameter in model.decoder.parameters()),
        "precision": schedule.precision,
        **evaluate(model, tokens, schedule.precision, worker.device, seed=schedule.seed),
    }


def main(arguments: list[str]) -> None:
    options = cli.parse(arguments, "dmlab84-small", program="train_second_stage.py")
    check_equal_steps(options.config, "train_second_stage")

    def stages(pipeline: Pipeline, config: PipelineConfig) -> Callable[[float], bytes]:
        _stages(pipeline, config)
        return lambda seconds: make_second_stage_report(options.title, pipeline.reports, pipeline.config, seconds)

    pipeline, summary = conduct(options, stages, program="second stage", report=REPORT, schedules=_SCHEDULES)
    tell(pipeline)
    print(summary)


def _stages(pipeline: Pipeline, config: PipelineConfig) -> None:
    images = shard(pipeline, config.data, config.shard)
    if images.num_images("validation") < 2:
        raise InputError(
            "expected at least 2 validation images, of which each is also given the other's z, found "
            f"{images.num_images('validation')}; give a source that holds out more, or raise "
            "--shard.max-validation-images where it is set"
        )
    vqvae = train_vqvae(pipeline, config, images)
    tokens = tokenize_images(pipeline, images, vqvae)
    models = [
        {kind: train_second_stage(_seeded(pipeline, config, number), config, tokens, kind, number) for kind in KINDS}
        for number in range(config.second_stage_runs.seeds)
    ]
    show_second_stage(pipeline, config.second_stage_runs, images, vqvae, tokens, models)


def _seeded(pipeline: Pipeline, config: PipelineConfig, number: int) -> Pipeline:
    """The same, whose manifests record the config of a run: what they can be replayed by."""
    schedule = config.train_second_stage
    config = dataclasses.replace(config, train_second_stage=dataclasses.replace(schedule, seed=schedule.seed + number))
    return dataclasses.replace(pipeline, config=config_to_manifest(config))


if __name__ == "__main__":
    from pipelines import train_second_stage as this  # by its name, under which workers find it

    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    cli.run(this.main)
