"""The paper's likelihood table: VAE, VQ-VAE and VIMCO with the same encoder, decoder, data and schedule, in bits/dim.

    python pipelines/compare.py --preset cifar10-small --source FOLDER --root runs/cifar10-small

Each model and seed is a Ray Train job, one after the other, or with --resources.side-by-side N so many at one time. The
same command again goes on where it stopped. --only vae-0 trains and measures that one alone.
"""

import dataclasses
import os
from collections.abc import Callable

from cluster.session import ResourceError
from pipelines import cli
from pipelines.compare_report import REPORT, make_compare_report
from pipelines.config import PipelineConfig, check_equal_steps, config_to_manifest
from pipelines.likelihood_table import MARKDOWN, likelihood_table
from pipelines.measure_bits import measure_bits
from pipelines.program import conduct
from pipelines.shard import shard
from pipelines.side_by_side import run_side_by_side
from pipelines.stage import NotMadeError, Pipeline
from pipelines.tokenize_images import tokenize_images
from pipelines.train_baseline import train_baseline
from pipelines.train_prior import train_prior
from pipelines.train_vqvae import train_vqvae
from vqvae_core.artifacts import Artifact
from vqvae_core.contender import VQ_VAE, check_has_bits
from vqvae_core.errors import InputError
from vqvae_core.image_shards import ImageShards

_ONLY = "--only"
_SCHEDULES = ("train", "train_prior")


def main(arguments: list[str]) -> None:
    options = cli.parse(arguments, "cifar10-small", program="compare.py", more=(_ONLY,))
    only = options.more.get(_ONLY)
    wanted = names(options.config)
    if only is not None and only not in wanted:
        raise InputError(f"expected one of {', '.join(wanted)} after {_ONLY}, found {only!r}")
    check_has_bits(options.config.vqvae)
    check_equal_steps(options.config, "train")
    if options.config.prior.use_labels:
        raise InputError(
            "expected a prior of the images alone, whose bits are of -log2 p(x) as the others' are, found one that is "
            "told labels; give --prior.no-use-labels"
        )
    table: list[Artifact] = []

    def stages(pipeline: Pipeline, config: PipelineConfig) -> Callable[[float], bytes] | None:
        images = shard(pipeline, config.data, config.shard)
        if only is None and config.resources.side_by_side > 1:
            _side_by_side(pipeline, config, images, arguments)
        made = {name: _contender(pipeline, config, images, name) for name in ([only] if only else wanted)}
        if only is not None:
            return None
        measured = {name: bits for name, (_, bits) in made.items()}
        table.append(likelihood_table(pipeline, config, images, measured))
        models = {name: model for name, (model, _) in made.items()}
        return lambda seconds: make_compare_report(
            options.title, pipeline.reports, models, table[0], pipeline.config, seconds
        )

    _, summary = conduct(options, stages, program="compare", report=REPORT, schedules=_SCHEDULES, ends_run=only is None)
    for artifact in table:
        print(artifact.read(MARKDOWN).decode())
        print(f"table:  {artifact.folder.path(MARKDOWN)}, also as CSV and JSON")
    print(summary)


def names(config: PipelineConfig) -> list[str]:
    """model-seed of each training, seed by seed."""
    first = config.train.seed
    return [f"{model}-{seed}" for seed in range(first, first + config.compare.seeds) for model in config.compare.models]


def _contender(pipeline: Pipeline, config: PipelineConfig, images: ImageShards, name: str) -> tuple[Artifact, Artifact]:
    """A trained model and its bits."""
    kind, _, seed = name.rpartition("-")
    number = int(seed) - config.train.seed
    config = dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, seed=int(seed)),
        train_prior=dataclasses.replace(config.train_prior, seed=config.train_prior.seed + number),
    )
    pipeline = dataclasses.replace(pipeline, config=config_to_manifest(config))  # what a manifest can be replayed by
    samples = config.compare.report_samples
    if kind != VQ_VAE:
        model = train_baseline(pipeline, config, images, kind)
        return model, measure_bits(pipeline, images, kind, model, samples)
    model = train_vqvae(pipeline, config, images)
    tokens = tokenize_images(pipeline, images, model)
    prior = train_prior(pipeline, config, tokens)
    return model, measure_bits(pipeline, images, kind, model, samples, tokens, prior)


def _side_by_side(pipeline: Pipeline, config: PipelineConfig, images: ImageShards, arguments: list[str]) -> None:
    """What is missing of all trainings as processes that share this one's Ray; the caller then finds it by name."""
    missing = [name for name in names(config) if not _is_made(pipeline, config, images, name)]
    resources, session = config.resources, pipeline.session
    count = min(resources.side_by_side, len(missing))
    if count < 2:
        return
    try:
        each = session.check(
            num_workers=count * (resources.min_workers or resources.num_workers),
            cpus_per_worker=resources.cpus_per_worker,
            use_gpu=resources.use_gpu,
        )
    except ResourceError as error:
        raise ResourceError(
            f"expected room for {count} trainings at one time, found too little: lower --resources.side-by-side "
            f"{resources.side_by_side} ({error})"
        ) from error
    shared = [*arguments, "--resources.side-by-side", "1", "--resources.cpus-per-worker", str(each)]
    runs = {name: [*shared, _ONLY, name] for name in missing}
    run_side_by_side(__file__, runs, count, session.address())


def _is_made(pipeline: Pipeline, config: PipelineConfig, images: ImageShards, name: str) -> bool:
    try:
        _contender(dataclasses.replace(pipeline, makes=False), config, images, name)
    except NotMadeError:
        return False
    return True


if __name__ == "__main__":
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    cli.run(main)
