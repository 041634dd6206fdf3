"""Sweeps by Ray Tune: which values of some fields give the best model, all with the same budget.

    python pipelines/tune.py --preset doom84 --objective psnr --trials 12 --search "train.learning-rate=log:5e-4..5e-3
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
import importlib.util
import itertools
import json
import math
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.session import ResourceError
from pipelines import cli
from pipelines.config import PipelineConfig, config_to_manifest
from pipelines.objective import OBJECTIVES, Objective, history_of, train_for
from pipelines.population import MAY_CHANGE, Member, Reached, ends, next_generation
from pipelines.program import conduct, resolve
from pipelines.report import page, picture, stage_table
from pipelines.search_space import Dimension, Value, parse_all, with_values
from pipelines.shard import shard
from pipelines.stage import Made, NotMadeError, Pipeline, Workspace
from pipelines.sweep_record import FAILED, Record, Shared, short
from pipelines.sweep_table import CSV, JSON, MARKDOWN, PICTURE, PRESET, Row, csv_of, markdown, parallel_coordinates
from pipelines.tokenize_images import tokenize_images
from pipelines.tracking import StageRun
from pipelines.train_vqvae import train_vqvae, write_files
from vqvae_core.artifacts import Artifact, FileEntry
from vqvae_core.errors import InputError
from vqvae_core.image_shards import ImageShards
from vqvae_core.storage import Folder
from vqvae_core.train_config import TrainConfig

VERSION = 1
KIND = "Sweep"
REPORT = "sweep.html"
_OPTIONS = (
    "--search", "--objective", "--trials", "--scheduler", "--generations", "--searcher", "--seed", "--concurrent",
)  # fmt: skip
_CHOICES = {"--scheduler": ("asha", "pbt", "none"), "--searcher": ("random", "optuna")}
_REDUCTION = 3  # of ASHA: a third of the trials goes on at each rung
_DRAWS = 100  # tries for each trial
_TRIAL_BYTES = 512 * 2**20  # of an actor that waits for its training; CPUs belong to the training's workers
_BEST, _RAY = "best", "ray"


@dataclass(frozen=True)
class Sweep:
    """What a sweep varies and how. generations: of population based training, else 1. concurrent: None for as many
    trials as there is room for; never part of its recipe."""

    dimensions: list[Dimension]
    objective: str
    trials: int
    scheduler: str
    generations: int
    searcher: str
    seed: int
    concurrent: int | None

    def draws(self, config: PipelineConfig) -> list[dict[str, Value]]:
        """The values of each trial, drawn at random: no two trials have the same, and the config takes all of them.
        Raises `InputError` where there are not so many."""
        generator, found = random.Random(self.seed), []  # noqa: S311
        reason = "each draw was there before"
        for _ in range(_DRAWS * self.trials):
            draw = {one.field: one.draw(generator) for one in self.dimensions}
            refusal = None if draw in found else self.refusal(config, draw)
            if draw not in found and refusal is None:
                found.append(draw)
            reason = refusal or reason
            if len(found) == self.trials:
                return found
        raise InputError(
            f"expected {self.trials} different trials in this search space, found {len(found)} ({reason}); lower "
            "--trials or widen --search"
        )

    def refusal(self, config: PipelineConfig, values: dict[str, Value]) -> str | None:
        """Why no trial can have these values."""
        try:
            found = resolve(with_values(config, values))
            found.augment.size(found.shard.image_size)
        except InputError as error:
            return str(error)
        if self.objective == "bits_per_dim" and found.vqvae.likelihood.kind == "density":
            return "a density has no bits"
        return None


def main(arguments: list[str]) -> None:
    if "-h" in arguments or "--help" in arguments:
        print(__doc__)
    options = cli.parse(arguments, "doom84", program="tune.py", more=_OPTIONS)
    sweep = _sweep(options.more, options.config)
    found: list[Artifact] = []

    def stages(pipeline: Pipeline, config: PipelineConfig) -> Callable[[float], bytes]:
        found.append(_stages(pipeline, config, sweep))
        return lambda seconds: _page(options.preset, pipeline, found[0], seconds)

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


def _sweep(given: Mapping[str, str], config: PipelineConfig) -> Sweep:
    """Raises `InputError` for anything that does not fit."""
    if "--search" not in given:
        raise InputError(
            'expected fields to search over, found none; give --search "train.learning-rate=log:1e-4..1e-2"'
        )
    name = given.get("--objective", "psnr")
    if name not in OBJECTIVES:
        raise InputError(f"expected --objective to be one of {', '.join(OBJECTIVES)}, found {name!r}")
    objective = OBJECTIVES[name]
    dimensions = parse_all(given["--search"].split(), config)
    for one in dimensions:
        if one.field.split(".")[0] not in objective.parts:
            parts = ", ".join(part.replace("_", "-") for part in objective.parts)
            raise InputError(
                f"expected fields of {parts}, which {name} depends on, found {one.field.replace('_', '-')}"
            )
        if one.field.partition(".")[2] in ("steps", "patience", "validate_every", "validation_images"):
            raise InputError(
                f"expected the same budget and the same measure for all trials, found {one.field.replace('_', '-')} "
                "to search over; give it once, as an option"
            )
    if name == "bits_per_dim" and config.vqvae.likelihood.kind == "density":  # of the preset, which is compared
        raise InputError(
            "expected a likelihood with bits for the objective bits_per_dim, found a density; give "
            "--vqvae.likelihood.kind logistic, gaussian or categorical, or --objective psnr"
        )
    for option, choices in _CHOICES.items():
        if given.get(option, choices[0]) not in choices:
            raise InputError(f"expected {option} to be one of {', '.join(choices)}, found {given[option]!r}")
    searcher = given.get("--searcher", "random")
    if searcher == "optuna" and importlib.util.find_spec("optuna") is None:
        raise InputError(
            "expected the package optuna for --searcher optuna, found none; pip install 'vqvae-pipeline[tune]', or "
            "leave it out"
        )
    scheduler, generations = given.get("--scheduler", "asha"), 1
    if scheduler == "pbt":
        generations = _whole(given, "--generations", 4, 2)
        _check_population(dimensions, searcher, generations, getattr(config, objective.schedule))
    elif "--generations" in given:
        raise InputError(f"expected --generations with --scheduler pbt only, found the scheduler {scheduler}")
    sweep = Sweep(
        dimensions=dimensions,
        objective=name,
        trials=_whole(given, "--trials", 12, 2 if scheduler == "pbt" else 1),
        scheduler=scheduler,
        generations=generations,
        searcher=searcher,
        seed=_whole(given, "--seed", 0, 0),
        concurrent=_whole(given, "--concurrent", 1, 1) if "--concurrent" in given else None,
    )
    sweep.draws(config)
    return sweep


def _check_population(dimensions: list[Dimension], searcher: str, generations: int, schedule: TrainConfig) -> None:
    if searcher != "random":
        raise InputError(f"expected --searcher random with --scheduler pbt, found {searcher}")
    for one in dimensions:
        if one.field not in MAY_CHANGE:
            fields = ", ".join(name.replace("_", "-") for name in MAY_CHANGE)
            raise InputError(
                f"expected fields that may change in the middle of a training ({fields}) for --scheduler pbt, found "
                f"{one.field.replace('_', '-')}; search over it with asha or none"
            )
    if generations > schedule.steps:
        raise InputError(f"expected at most {schedule.steps} generations, one a step, found {generations}")
    if schedule.patience is not None:
        raise InputError(
            f"expected no patience with --scheduler pbt, which has all train for as long, found {schedule.patience}; "
            "give --train.patience None (or --train-prior.patience None)"
        )


def _whole(given: Mapping[str, str], option: str, default: int, least: int) -> int:
    text = given.get(option, str(default))
    if not text.isdigit() or int(text) < least:
        raise InputError(f"expected {option} to be a whole number of at least {least}, found {text!r}")
    return int(text)


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

        known = [notes.records[number].values for number in sorted(notes.records)]
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
