"""The whole pipeline: source to image shards, VQ-VAE, tokens, prior, samples and a report.

    python pipelines/full.py --preset doom84 --root runs/doom84

The same command again goes on where it stopped, and does nothing where all is done. --help explains every field.
"""

import dataclasses
import os
import time

from cluster.session import Session
from pipelines import cli
from pipelines.config import PipelineConfig, config_to_manifest
from pipelines.report import make_report
from pipelines.sample import sample
from pipelines.shard import shard
from pipelines.stage import Pipeline
from pipelines.tokenize_images import tokenize_images
from pipelines.tracking import Tracker
from pipelines.train_prior import train_prior
from pipelines.train_vqvae import resolve_precision, train_vqvae
from vqvae_core.artifacts import hash_json
from vqvae_core.errors import InputError
from vqvae_core.storage import Folder
from vqvae_core.train import StoppedError
from vqvae_core.vqvae import STRIDE

REPORT = "report.html"


def main(arguments: list[str], until: str = "sample") -> None:
    """Run the stages in order, up to and with `until`; each stage's own file runs up to itself."""
    begin = time.monotonic()
    options = cli.parse(arguments)
    config, root = resolve(options.config), Folder.of(options.root)
    root.check_writable()
    config.data.check()
    resolved = config_to_manifest(config)
    fingerprint = hash_json({**resolved, "resources": None, "preset": options.preset})
    tracker = Tracker(root, options.preset, resolved, fingerprint, enabled=options.track)
    session = Session()
    pipeline = Pipeline(root, config.resources, session, tracker, resolved)
    status = "FAILED"
    report: bytes | None = None
    tracker.start()
    try:
        _stages(pipeline, config, until)
        if until == "sample":
            report = make_report(options.preset, pipeline.reports, resolved, time.monotonic() - begin)
            root.write(REPORT, report)
        status = "FINISHED"
    except (KeyboardInterrupt, StoppedError):
        status = "KILLED"
        raise
    finally:
        try:
            session.close()
        finally:
            tracker.finish(status, report)
    if until == "sample":
        _figures(pipeline)
    _summary(pipeline, tracker, time.monotonic() - begin, report is not None)


def resolve(config: PipelineConfig) -> PipelineConfig:
    """The config with nothing left to be found out on a machine. Raises `InputError` where its parts do not fit."""
    schedules = {"train": config.train, "train-prior": config.train_prior}
    for name, schedule in schedules.items():
        if schedule.num_lanes % config.resources.num_workers:
            raise InputError(
                f"expected a number of workers that divides --{name}.num-lanes {schedule.num_lanes}, found "
                f"{config.resources.num_workers}; change either of them (lanes belong to the recipe)"
            )
    if config.augment.crop_size is not None and config.augment.crop_size % STRIDE:
        raise InputError(f"expected --augment.crop-size to be a multiple of {STRIDE}, found {config.augment.crop_size}")
    train, train_prior = (
        resolve_precision(schedule, use_gpu=config.resources.use_gpu) for schedule in schedules.values()
    )
    return dataclasses.replace(config, train=train, train_prior=train_prior)


def _stages(pipeline: Pipeline, config: PipelineConfig, until: str) -> None:
    images = shard(pipeline, config.data, config.shard)
    if until == "shard":
        return
    vqvae = train_vqvae(pipeline, config, images)
    if until == "train_vqvae":
        return
    tokens = tokenize_images(pipeline, images, vqvae)
    if until == "tokenize":
        return
    prior = train_prior(pipeline, config, tokens)
    if until == "train_prior":
        return
    sample(pipeline, config.sample, prior, vqvae)


def _figures(pipeline: Pipeline) -> None:
    facts = {report.name: report.artifact.facts for report in pipeline.reports}
    model, prior = facts["train_vqvae"], facts["train_prior"]
    gain = prior["gain_bits_per_token"]
    side = "below" if gain >= 0 else "above"
    print(
        f"PSNR {model['psnr_db']:.2f} dB on validation images, {model['psnr_db'] - model['shrunken_psnr_db']:+.2f} dB "
        f"over {model['shrunken_side']}x{model['shrunken_side']} bicubic, "
        f"{model['psnr_db'] - model['same_bits_psnr_db']:+.2f} dB over "
        f"{model['same_bits_side']}x{model['same_bits_side']} (equal bits)"
    )
    print(f"codes: perplexity {model['perplexity']:.0f} of {model['K']}, {100 * model['usage']:.1f} % in use")
    print(f"prior: {prior['bits_per_token']:.3f} bits/token, {abs(gain):.2f} {side} the tokens' unigram entropy")


def _summary(pipeline: Pipeline, tracker: Tracker, seconds: float, reported: bool) -> None:
    work = sum(report.work_seconds for report in pipeline.reports)
    share = f", {100 * work / seconds:.0f} % of it inside stage work" if work else ""
    print(f"done in {seconds:.1f} s{share}")
    if tracker.uri:
        command = "mlflow ui --backend-store-uri " if tracker.uri.startswith("sqlite") else ""
        print(f"runs:   {command}{tracker.place}")
    if reported:
        print(f"report: {pipeline.root.path(REPORT)}")


if __name__ == "__main__":
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    cli.run(main)
