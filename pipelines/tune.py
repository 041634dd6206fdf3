"""Sweeps by Ray Tune: which values of some fields give the best model, all with the same budget.

    python pipelines/tune.py --preset doom84 --objective psnr --trials 12 --search \\
        "train.learning-rate=log:5e-4..5e-3
        vqvae.quantizer.num-codes=choice:256,512,1024 vqvae.commitment-cost=log:1..50"

--search     fields, each FIELD=log:LOW..HIGH, FIELD=uniform:LOW..HIGH or FIELD=choice:A,B, in one argument
--objective  psnr, bits_per_dim or prior_bits (psnr)
--trials     how many (12)
--scheduler  asha: trials that do badly stop early; pbt: they go on from a better one; none (asha)
--generations  of pbt: how often trials are compared, the end included (4)
--searcher   random, or optuna, where it is installed (random)
--seed       of the values that are drawn (0)
--concurrent  trials at one time (as many as there is room for)

All other options are those of full.py. The preset as it is is trained first, for comparison. Each trial is a Ray Train
run. The same command again goes on where it stopped.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from cluster.session import ResourceError
from pipelines import cli
from pipelines.config import PipelineConfig, config_to_manifest
from pipelines.objective import OBJECTIVES, Objective, history_of, train_for
from pipelines.population import Member, Reached, ends, next_generation
from pipelines.program import conduct
from pipelines.report import page, picture, stage_table
from pipelines.search_space import Value
from pipelines.shard import shard
from pipelines.stage import Made, NotMadeError, Pipeline, Workspace
from pipelines.sweep_options import OPTIONS, Sweep, read_options
from pipelines.sweep_record import FAILED, Record, Shared, short
from pipelines.sweep_table import CSV, JSON, MARKDOWN, PICTURE, PRESET, Row, csv_of, markdown, parallel_coordinates
from pipelines.tokenize_images import tokenize_images
from pipelines.tracking import StageRun
from pipelines.train_vqvae import train_vqvae, write_files
from vqvae_core.artifacts import Artifact, FileEntry
from vqvae_core.errors import InputError
from vqvae_core.image_shards import ImageShards
from vqvae_core.storage import Folder

VERSION = 1
KIND = "Sweep"
REPORT = "sweep.html"
_REDUCTION = 3  # of ASHA: a third of the trials goes on at each rung
_TRIAL_BYTES = 512 * 2**20  # of an actor that waits for its training; CPUs belong to the training's workers
_BEST, _RAY = "best", "ray"


def main(arguments: list[str]) -> None:
    if "-h" in arguments or "--help" in arguments:
        print(__doc__)
    options = cli.parse(arguments, "doom84", program="tune.py", more=OPTIONS)
    sweep = read_options(options.more, options.config)
    found: list[Artifact] = []

    def stages(pipeline: Pipeline, config: PipelineConfig) -> Callable[[float], bytes]:
        found.append(_stages(pipeline, config, sweep))
        return lambda seconds: _page(options.title, pipeline, found[0], seconds)

    names = " ".join(one.field for one in sweep.dimensions)
    program = f"sweep of {sweep.objective} over {names}"
    _, summary = conduct(options, stages, program=program, report=REPORT, schedules=("train", "train_prior"))
    print(found[0].read(MARKDOWN).decode())
    facts = found[0].facts
    for part in facts.get("best_before", []):
        print(f"to step {part['until']}: {_as_options(part['values'])}")
    values = _as_options(facts["best_values"])
    if facts["best_trial"] == PRESET:
        print(f"best:   the preset as it is, {facts['default']:.4f}")
    else:
        print(f"best:   {facts['best']:.4f}, the preset as it is {facts['default']:.4f}: {values}")
    print(f"        {facts['best_model']}")
    print(summary)


def _as_options(values: Mapping[str, Value]) -> str:
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in values.items())


def _stages(pipeline: Pipeline, config: PipelineConfig, sweep: Sweep) -> Artifact:
    """Data, the preset's own model, and the sweep."""
    images = shard(pipeline, config.data, config.shard)
    try:
        _sweep_of(dataclasses.replace(pipeline, makes=False), config, images, sweep, (1, 1))
        room = (1, 1)  # all is made
    except NotMadeError:
        room = _room(pipeline, config, sweep)
    return _sweep_of(pipeline, config, images, sweep, room)


def _room(pipeline: Pipeline, config: PipelineConfig, sweep: Sweep) -> tuple[int, int]:
    """How many trials run at one time, and the CPUs of each of their workers. Raises `ResourceError`."""
    resources, session = config.resources, pipeline.session
    asked: dict[str, Any] = {"cpus_per_worker": resources.cpus_per_worker, "use_gpu": resources.use_gpu}
    count = min(sweep.concurrent or session.room(num_workers=resources.num_workers, **asked), sweep.trials)
    try:
        return count, session.check(num_workers=count * resources.num_workers, **asked)
    except ResourceError as error:
        raise ResourceError(
            f"expected room for {count} trials at one time, found too little: lower --concurrent ({error})"
        ) from error


def _sweep_of(
    pipeline: Pipeline, config: PipelineConfig, images: ImageShards, sweep: Sweep, room: tuple[int, int]
) -> Artifact:
    objective, data = OBJECTIVES[sweep.objective], images.artifact
    if objective.schedule == "train_prior":
        data = tokenize_images(pipeline, images, train_vqvae(pipeline, config, images)).artifact
    default = train_for(objective, pipeline, config, data)
    recipe = {
        "objective": sweep.objective,
        "space": [dataclasses.asdict(one) for one in sweep.dimensions],
        "trials": sweep.trials,
        "scheduler": sweep.scheduler,
        "searcher": sweep.searcher,
        "seed": sweep.seed,
        **({"generations": sweep.generations} if sweep.scheduler == "pbt" else {}),
    }
    return pipeline.make(
        "tune",
        version=VERSION,
        kind=KIND,
        recipe=recipe,
        inputs={"data": data, "default": default},
        build=lambda space, run: _build(pipeline, config, sweep, data, default, room, space, run),
    )


def _build(
    pipeline: Pipeline,
    config: PipelineConfig,
    sweep: Sweep,
    data: Artifact,
    default: Artifact,
    room: tuple[int, int],
    space: Workspace,
    run: StageRun,
) -> Made:
    from pipelines.trial import Notes

    count, each = room
    pipeline.session.connect()
    objective, begin = OBJECTIVES[sweep.objective], time.monotonic()
    own = dataclasses.replace(config.resources, cpus_per_worker=each, min_workers=None)
    name = f"training-{space.work}"
    records = space.folder / name
    shared = Shared(
        root=pipeline.root.uri,
        config=config_to_manifest(dataclasses.replace(config, resources=own)),
        objective=sweep.objective,
        data=data.folder.uri,
        records=records.uri,
    )
    runs: dict[int, StageRun] = {}

    def open_run(record: Record) -> StageRun:
        runs[record.number] = pipeline.tracker.stage(
            f"trial {record.number}", f"{space.work}-{record.number}", record.values, {"data": data}, below=run
        )
        return runs[record.number]

    print(f"tune: {sweep.trials} trials, {count} at a time, {each} CPUs a worker", flush=True)
    moves: list[str] = []
    if sweep.scheduler == "pbt":
        try:
            over = _generations(sweep, objective, config, shared, records, count, open_run, moves)
        except BaseException:
            for one in runs.values():
                one.fail("KILLED")
            raise
    else:
        trials = list(enumerate(sweep.draws(config), 1)) if sweep.searcher == "random" else None
        notes = Notes(records, sweep.trials, objective.metric, open_run)
        _tune(sweep, objective, config, shared, notes, count, records, trials)
        over = _over(notes, sweep.trials)
    default_row = _default_row(config, sweep, objective, default)
    rows = [default_row, *sorted((_row(record) for record in over), key=lambda row: _rank(row, objective))]
    best = min((row for row in rows if row["model"] is not None), key=lambda row: _rank(row, objective))
    if best is not default_row:
        runs[best["trial"]].mark(_BEST)
    before = {} if best["model"] is None else Artifact.open(Folder(best["model"])).manifest.recipe.get("before")
    facts = {
        **({"best_before": before} if before else {}),
        "objective": sweep.objective,
        "trials": sweep.trials,
        "trials_done": sum(row["model"] is not None for row in rows[1:]),
        "best": best["objective"],
        "best_trial": best["trial"],
        "best_values": best["values"],
        "best_model": best["model"],
        "default": default_row["objective"],
    }
    files = {
        MARKDOWN: (markdown(rows, sweep.dimensions, objective) + "".join(f"\n- {move}" for move in moves)).encode(),
        CSV: csv_of(rows, sweep.dimensions).encode(),
        JSON: json.dumps(
            {"rows": rows, "objective": objective.title, "mode": objective.mode, **({"moves": moves} if moves else {})},
            indent=1,
        ).encode(),
        PICTURE: parallel_coordinates(rows, sweep.dimensions, objective),
    }
    entries = [FileEntry(**entry) for entry in write_files(space.folder, files)]
    return Made(entries, facts, time.monotonic() - begin)


def _over(notes: Any, count: int) -> list[Record]:
    """The records of all trials. Raises `InputError` where one failed, KeyboardInterrupt where the sweep was ended."""
    found = [notes.records.get(number) for number in range(1, count + 1)]
    failed = [record for record in found if record is not None and record.state == FAILED]
    if failed:
        raise InputError(
            f"expected {count} trials, {len(failed)} failed, the first of them trial {failed[0].number}: "
            f"{failed[0].reason}; the same command tries them again"
        )
    over = [record for record in found if record is not None and record.is_over]
    if len(over) < count:
        notes.end()
        raise KeyboardInterrupt  # which Ray Tune takes for itself
    return over


def _generations(
    sweep: Sweep,
    objective: Objective,
    config: PipelineConfig,
    shared: Shared,
    records: Folder,
    count: int,
    open_run: Callable[[Record], StageRun],
    moves: list[str],
) -> list[Record]:
    """Population based training, a run of Ray Tune for each generation. moves: gets a line for each member that goes on
    from another. Returns the records of the last generation, or of one in which nobody's numbers were finite."""
    from pipelines.trial import Notes

    def opened(record: Record, step: int) -> StageRun:
        """A member's run, with the values that it has from a step on."""
        run = open_run(record)
        numbers = {name: value for name, value in record.values.items() if isinstance(value, int | float)}
        run.log([(step, numbers)])
        return run

    steps = getattr(config, objective.schedule).steps
    members = [Member(number, values) for number, values in enumerate(sweep.draws(config), 1)]
    stops = [0, *ends(steps, sweep.generations)]
    for number, (begin, until) in enumerate(itertools.pairwise(stops), 1):
        place = records / f"generation-{number}"
        notes = Notes(place, sweep.trials, objective.metric, lambda record, begin=begin: opened(record, begin))
        told = dataclasses.replace(
            shared, records=place.uri, until=until if until < steps else None, parts=(records / "parts").uri,
            before={member.number: member.before for member in members},
        )  # fmt: skip
        over = {record.number for record in notes.records.values() if until < steps and _is_kept(record)}
        left = [(member.number, dict(member.values)) for member in members if member.number not in over]
        if left:
            _tune(sweep, objective, config, told, notes, count, place, left)
        found = _over(notes, sweep.trials)
        if until == steps:
            return found
        reached = {record.number: _reached(record) for record in found}
        if all(one.value is None for one in reached.values()):
            print(f"tune: no trial has finite numbers at step {until}, the sweep ends here", flush=True)
            return found
        members = next_generation(
            members, reached, until, mode=objective.mode, dimensions=sweep.dimensions,
            refusal=lambda values: sweep.refusal(config, values), seed=sweep.seed,
        )  # fmt: skip
        for member in members:
            if member.parent != member.number:
                values = ", ".join(f"{name}={short(value)}" for name, value in member.values.items())
                moves.append(f"trial {member.number} goes on from trial {member.parent} at step {until}: {values}")
                print(f"tune: {moves[-1]}", flush=True)
    raise AssertionError("unreachable")


def _is_kept(record: Record) -> bool:
    """It is over, and what others may go on from is there."""
    return record.is_over and (record.reached is None or record.reached.is_there())


def _reached(record: Record) -> Reached:
    value = record.objective
    is_finite = value is not None and math.isfinite(value) and record.reached is not None
    return Reached(value if is_finite else None, record.reached)


def _default_row(config: PipelineConfig, sweep: Sweep, objective: Objective, model: Artifact) -> Row:
    history = history_of(model)
    return {
        "trial": PRESET,
        "values": {one.field: _get(config, one.field) for one in sweep.dimensions},
        "steps": int(history[-1]["step"]),
        "objective": objective.at(model.facts["best_step"], history, config),
        "state": "done",
        "model": model.folder.uri,
    }


def _row(record: Record) -> Row:
    names = ("values", "steps", "objective", "state", "model")
    return {"trial": record.number, **{name: getattr(record, name) for name in names}}


def _rank(row: Row, objective: Objective) -> tuple[bool, float]:
    """Finished trials first, the best first."""
    value = row["objective"] if row["objective"] is not None else objective.worst
    return row["model"] is None, -value if objective.mode == "max" else value


def _get(config: Any, field: str) -> Value:
    for name in field.split("."):
        config = getattr(config, name)
    return config


def _tune(
    sweep: Sweep,
    objective: Objective,
    config: PipelineConfig,
    shared: Shared,
    notes: Any,
    count: int,
    records: Folder,
    trials: Sequence[tuple[int, dict[str, Value]]] | None,
) -> None:
    """Ray Tune over trials, numbers with values; None: as a searcher draws them. Those that earlier runs noted come
    with what they had reported; Ray Tune's own record, a pickle, is never read."""
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # it tells of a folder that nothing reads, whatever it is told
    from ray import tune

    from pipelines.trial import Trial

    records.delete_folder(_RAY)
    schedule, scheduler = getattr(config, objective.schedule), None
    if sweep.scheduler == "asha":
        from ray.tune.schedulers import ASHAScheduler

        scheduler = ASHAScheduler(
            time_attr="steps", max_t=schedule.steps, grace_period=min(schedule.validate_every, schedule.steps),
            reduction_factor=_REDUCTION,
        )  # fmt: skip
    searcher, space = None, {}
    if trials is not None:
        space = {"trial": tune.grid_search([{"number": number, "values": values} for number, values in trials])}
    else:
        from pipelines.optuna_search import OptunaSearch

        known = {number: record.values for number, record in notes.records.items()}
        searcher = OptunaSearch(sweep.dimensions, lambda values: sweep.refusal(config, values), sweep.seed, known)
        searcher.set_search_properties("objective", objective.mode, {})
    trainable = tune.with_resources(tune.with_parameters(Trial, shared=shared), {"memory": _TRIAL_BYTES})
    how = tune.TuneConfig(
        metric="objective", mode=objective.mode, scheduler=scheduler, search_alg=searcher, max_concurrent_trials=count,
        num_samples=1 if searcher is None else sweep.trials, trial_dirname_creator=lambda trial: trial.trial_id,
    )  # fmt: skip
    run = tune.RunConfig(name=_RAY, storage_path=records.uri, verbose=0, callbacks=[notes])
    with _sigterm_as_ctrl_c():
        tune.Tuner(trainable, param_space=space, tune_config=how, run_config=run).fit()
    if searcher is not None and searcher.is_exhausted:
        raise InputError(
            f"expected {sweep.trials} different trials in this search space, found {len(notes.records)}; lower "
            "--trials or widen --search"
        )


@contextlib.contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """Ray Tune ends its trials at Ctrl-C."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: os.kill(os.getpid(), signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _page(preset: str, pipeline: Pipeline, sweep: Artifact, seconds: float) -> bytes:
    facts = sweep.facts
    rows = json.loads(sweep.read(JSON))
    fields = list(rows["rows"][0]["values"])
    lines = [
        f"<tr><td>{row['trial']}</td>"
        f"{''.join(f'<td class=number>{short(value)}</td>' for value in row['values'].values())}"
        f"<td class=number>{row['steps']:,}</td>"
        f"<td class=number>{'-' if row['objective'] is None else format(row['objective'], '.4f')}</td>"
        f"<td>{row['state']}</td></tr>"
        for row in rows["rows"]
    ]
    names = "".join(f"<th>{one.rpartition('.')[2].replace('_', ' ')}</th>" for one in fields)
    head = f"<tr><th>Trial</th>{names}<th>Steps</th><th>{rows['objective']}</th><th></th></tr>"
    return page(
        f"{preset}: sweep",
        [
            f"<p class=lead>{facts['trials']} trials, {facts['trials_done']} to the end. The best has "
            f"{facts['best']:.4f}, the preset as it is {facts['default']:.4f}. This run took {seconds:.0f} s.</p>",
            picture(sweep, PICTURE, "A line a trial: its values from left to right, and what came of them. Trials that "
                    "were stopped early are dotted; the preset as it is is black."),
            f"<table>{head}{''.join(lines)}</table>",
            f"<ul>{''.join(f'<li>{move}</li>' for move in rows.get('moves', []))}</ul>",
            "<h2>Stages</h2>",
            stage_table(pipeline.reports),
        ],
    )  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
