"""What a sweep may look for, and the training that it is a figure of."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pipelines import ray_train, train_prior, train_vqvae
from pipelines.config import PipelineConfig
from pipelines.lineage import NO_LINEAGE, Lineage, SavedState
from pipelines.stage import Pipeline
from pipelines.tracking import StageRun
from vqvae_core.artifacts import Artifact, hash_json
from vqvae_core.image_shards import ImageShards
from vqvae_core.storage import Folder
from vqvae_core.token_shards import TokenShards
from vqvae_core.vqvae_training import uniform_bits_per_dim

_WORST = 1e9  # of a trial whose numbers were not finite: Ray Tune compares it


@dataclass(frozen=True)
class Objective:
    """What a sweep looks for. schedule: the field of the config whose steps are a trial's budget; parts: the fields of
    the config that it depends on."""

    title: str
    metric: str
    mode: Literal["min", "max"]
    schedule: str
    parts: tuple[str, ...]

    def value(self, point: Mapping[str, float], config: PipelineConfig) -> float | None:
        """Of a point of the curves; None where there was no validation."""
        found = point.get(self.metric)
        if found is None or self.metric != "validation_reconstruction_bits_per_dim":
            return found
        size = config.augment.size(config.shard.image_size)
        return found + uniform_bits_per_dim(config.vqvae, size, size)

    def at(self, step: int, history: Sequence[Mapping[str, float]], config: PipelineConfig) -> float:
        """Of the validation at a step: that of the weights that were kept."""
        found = next(self.value(point, config) for point in history if point["step"] == step)
        assert found is not None, "weights are chosen by a validation"
        return found

    @property
    def worst(self) -> float:
        return -_WORST if self.mode == "max" else _WORST


_VQVAE = ("vqvae", "train", "augment")
OBJECTIVES = {
    "psnr": Objective("PSNR on validation images (dB)", "validation_psnr_db", "max", "train", _VQVAE),
    "bits_per_dim": Objective(
        "bits/dim of validation images, codes under the uniform prior",
        "validation_reconstruction_bits_per_dim", "min", "train", _VQVAE,
    ),
    "prior_bits": Objective(
        "bits/token of validation tokens", "validation_bits_per_token", "min", "train_prior", ("prior", "train_prior")
    ),
}  # fmt: skip


def train_for(
    objective: Objective, pipeline: Pipeline, config: PipelineConfig, data: Artifact, before: Lineage = NO_LINEAGE
) -> Artifact:
    """The model of a config. data: image shards, or token shards for a prior; before: what training goes on from."""
    if objective.schedule == "train":
        return train_vqvae.train_vqvae(pipeline, config, ImageShards(data), before)
    return train_prior.train_prior(pipeline, config, TokenShards(data), before)


def train_part(
    objective: Objective,
    pipeline: Pipeline,
    config: PipelineConfig,
    data: Artifact,
    before: Lineage,
    until: int,
    folder: Folder,
    run: StageRun,
) -> tuple[list[dict[str, float]], SavedState]:
    """A training up to a step that is not its last: its curves and where its state lies, below the folder."""
    if objective.schedule == "train":
        name, version, loop = "train_vqvae", train_vqvae.VERSION, train_vqvae.loop
        recipe, settings = train_vqvae.plan(pipeline, config, ImageShards(data))
    else:
        name, version, loop = "train_prior", train_prior.VERSION, train_prior.loop
        recipe, settings = train_prior.plan(pipeline, config, TokenShards(data))
    what = [name, version, before.added_to(recipe), data.manifest.fingerprint, until]
    work = hash_json(what)[:16]
    place = folder / work
    value = ray_train.fit(
        pipeline, loop, {**settings, "out": place.uri, "identity": work}, name=name, work=work, folder=place, run=run,
        begin=before.state, until=until,
    )  # fmt: skip
    return value["history"], SavedState((place / f"training-{work}").uri, work, until)


def history_of(model: Artifact) -> list[dict[str, float]]:
    return json.loads(model.read("history.json"))
