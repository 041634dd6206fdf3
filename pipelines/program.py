"""What the programs have in common that run stages: options, tracking, Ray's session, the way out, the last lines."""

import dataclasses
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cluster.driver_memory import keep_little
from cluster.session import Session
from pipelines import cli
from pipelines.cluster_check import check_cluster
from pipelines.config import PipelineConfig, config_to_manifest
from pipelines.preflight import check_place
from pipelines.stage import Pipeline
from pipelines.tracking import Tracker
from pipelines.train_vqvae import resolve_precision
from vqvae_core.artifacts import hash_json
from vqvae_core.errors import InputError
from vqvae_core.storage import Folder
from vqvae_core.train import StoppedError
from vqvae_core.vqvae import STRIDE

REPORT = "report.html"
_SCHEDULES = ("train", "train_prior")
# (pipeline, config) -> a page for the report, or None
Stages = Callable[[Pipeline, PipelineConfig], Callable[[float], bytes] | None]


def conduct(
    options: cli.Options,
    stages: Stages,
    *,
    program: str = "full",
    report: str = REPORT,
    schedules: Sequence[str] = _SCHEDULES,
    ends_run: bool = True,
) -> tuple[Pipeline, str]:
    """Run stages with a session and a tracked run, and write the page that they return.

    program: part of the tracked run's identity, and of its name where it is not the whole pipeline. report: the page's
    name in the root. schedules: the fields of the config that it trains by. ends_run: False where another
    process ends the tracked run. Returns the pipeline and the last lines to print.
    """
    keep_little()
    begin = time.monotonic()
    config, root = resolve(options.config, schedules), Folder.of(options.root)
    check_place(root)
    config.data.check()
    resolved = config_to_manifest(config)
    identity: dict[str, Any] = {**resolved, "resources": None, "preset": options.preset}
    name = options.title
    if program != "full":
        identity["program"], name = program, f"{options.title}: {program}"
    tracker = Tracker(root, name, resolved, hash_json(identity), enabled=options.track)
    session = Session()
    session.once_connected = lambda: check_cluster(session, root, tracker)
    pipeline = Pipeline(root, config.resources, session, tracker, resolved)
    status, written = "FAILED", None
    try:
        tracker.start()
        make_page = stages(pipeline, config)
        if make_page is not None:
            root.write(report, make_page(time.monotonic() - begin))
            written = report
        status = "FINISHED"
    except (KeyboardInterrupt, StoppedError, SystemExit):  # the last of them by SIGTERM
        status = "KILLED"
        raise
    finally:
        try:
            session.close()
        finally:
            if ends_run:
                tracker.finish(status, written)
            else:
                tracker.close()
    return pipeline, _summary(pipeline, time.monotonic() - begin, written)


def resolve(config: PipelineConfig, names: Sequence[str] = _SCHEDULES) -> PipelineConfig:
    """The config with nothing left to be found out on a machine, for a run that trains by these schedules of it. Raises
    `InputError` where its parts do not fit."""
    schedules = {name: getattr(config, name) for name in names}
    for name, schedule in schedules.items():
        if schedule.num_lanes % config.resources.num_workers:
            option = f"--{name.replace('_', '-')}.num-lanes"
            raise InputError(
                f"expected a number of workers that divides {option} {schedule.num_lanes}, found "
                f"{config.resources.num_workers}; change either of them (lanes belong to the recipe)"
            )
    if config.augment.crop_size is not None and config.augment.crop_size % STRIDE:
        raise InputError(f"expected --augment.crop-size to be a multiple of {STRIDE}, found {config.augment.crop_size}")
    use_gpu = config.resources.use_gpu
    resolved = {name: resolve_precision(schedule, use_gpu=use_gpu) for name, schedule in schedules.items()}
    return dataclasses.replace(config, **resolved)


def _mlflow() -> str:
    """MLflow's program as a shell finds it: by its name, or beside this Python."""
    return "mlflow" if shutil.which("mlflow") else str(Path(sys.executable).with_name("mlflow"))


def _summary(pipeline: Pipeline, seconds: float, report: str | None) -> str:
    work = sum(stage.work_seconds for stage in pipeline.reports)
    share = f", {100 * work / seconds:.0f} % of it inside stage work" if work else ""
    lines = [f"done in {seconds:.1f} s{share}"]
    tracker = pipeline.tracker
    if tracker.is_file:
        lines.append(f"runs:   {shlex.quote(_mlflow())} ui --backend-store-uri {shlex.quote(tracker.place)}")
        if tracker.page:
            lines.append(f"        at http://127.0.0.1:5000{tracker.page}")
    elif tracker.uri:
        lines.append(f"runs:   {tracker.place.rstrip('/')}{tracker.page}")
    if report is not None:
        lines.append(f"report: {pipeline.root.path(report)}")
    return "\n".join(lines)
