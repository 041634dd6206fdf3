"""Ray Train around a loop that knows no Ray: workers, restarts, stops, and the way of metrics to the driver.

States are the project's own (vqvae_core/checkpoint.py): Ray's list of checkpoints is rewritten in place, so that a kill
can tear it, and knows nothing of hashes. Ray Train starts workers, again where they die, more or fewer where it may.
"""

import contextlib
import dataclasses
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from pipelines.board import Board
from pipelines.config import Resources
from pipelines.lineage import SavedState
from pipelines.progress import Progress
from pipelines.stage import Pipeline
from pipelines.tracking import StageRun
from vqvae_core.checkpoint import CheckpointError, StateFolder, TornStateError, TrainingState
from vqvae_core.errors import InputError
from vqvae_core.kept_memory import ONE_ARENA
from vqvae_core.storage import Folder, is_outage
from vqvae_core.train import NonFiniteLossError, StoppedError, Worker

# (settings, worker, state to go on from) -> JSON value of rank 0
Loop = Callable[[dict[str, Any], Worker, TrainingState | None], dict[str, Any]]
_FINAL = {kind.__name__: kind for kind in (InputError, NonFiniteLossError, StoppedError)}  # a restart mends none
_SECONDS_BETWEEN_POLLS = 1.0
_SECONDS_OF_PATIENCE = 10.0
_SECONDS_BETWEEN_SAVES = 5.0  # while a node is about to be taken away
_CHOICES, _SECONDS_BETWEEN_CHOICES = 5, 2.0
_START_SECONDS, _STARTS = "60", 4  # of each attempt to start a group, and attempts in a row
# A group of a size that is no longer there is given up soon: Ray counts on a vanished node for up to a minute.
_ELASTIC_START_SECONDS, _ELASTIC_STARTS = "20", 12
_TIMES_STARTS_OF_NODES = 6  # as many attempts, where nodes have to be started first
_SECONDS_TO_BE_ENDED = 30.0  # after which a rank whose group should be ended fails by itself


def _fitted(trainer: Any, place: Folder) -> Any:
    """What the trainer returns. Ray Train first looks at its storage, by requests that give up after seconds: a store
    that is away just then is waited for."""
    from ray.exceptions import RayActorError

    for _ in range(_STARTS):
        try:
            return trainer.fit()
        except RayActorError as error:  # of Ray Train's controller
            if not is_outage(error):
                raise
            try:
                place.folders()
            except OSError as away:
                raise TrainingFailedError(
                    f"expected the store of {place.uri} to answer, it did not for minutes: {away}; the same command "
                    "goes on from here"
                ) from away
    return trainer.fit()


class TrainingFailedError(RuntimeError):
    """Training workers died more often than allowed."""


def fit(
    pipeline: Pipeline,
    loop: Loop,
    settings: dict[str, Any],
    *,
    name: str,
    work: str,
    folder: Folder,
    run: StageRun,
    begin: SavedState | None = None,
    until: int | None = None,
) -> dict[str, Any]:
    """Run the loop on Ray Train's workers and return what rank 0 returned.

    The states' folder carries the work's key, so that a changed config never goes on with old weights.
    settings["steps"]: the total, for the progress bar; settings["train"]["num_lanes"]: what workers share. begin: the
    state of another training that this one goes on from; until: the step that it ends at, where that is not the last.
    Raises what the loop raised, or `TrainingFailedError`.
    """
    resources = pipeline.resources
    cpus = pipeline.cpus_per_worker()
    elastic = resources.min_workers is not None
    seconds, starts = (_ELASTIC_START_SECONDS, _ELASTIC_STARTS) if elastic else (_START_SECONDS, _STARTS)
    if pipeline.session.grows:
        starts *= _TIMES_STARTS_OF_NODES
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", seconds)
    if pipeline.session.alone:  # no node is taken away, and nobody collects Ray's own metrics
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
    from ray.train import ControllerError, FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
    from ray.train.torch import TorchTrainer

    from pipelines.lean_train import (
        count_starts_in_a_row,
        end_leftovers,
        leave_out_helpers,
        let_main_threads_rest,
    )

    place = folder / f"training-{work}"
    others = [other for other in folder.folders() if other.startswith("training-") and other != place.name]
    if others and place.name not in folder.folders():
        print(
            f"{name}: starting from step 0, since the {len(others)} training in {folder.uri} was on other data; its "
            "states are kept",
            flush=True,
        )
    board = Board()
    needed = resources.min_workers or resources.num_workers
    workers = (needed, resources.num_workers) if elastic else resources.num_workers
    one_arena = {name: os.environ.get(name, value) for name, value in ONE_ARENA.items()}
    trainer = TorchTrainer(
        _worker_main,
        train_loop_config={
            "loop": loop,
            "settings": settings,
            "board": board.name,
            "states": place.uri,
            "identity": work,
            "keep": resources.keep_checkpoints,
            "threads": cpus,
            "checkpoint_every": resources.checkpoint_every,
            "micro_batch": resources.micro_batch,
            "compile": resources.compile,
            "begin": begin and dataclasses.asdict(begin),
            "until": until,
            "driver_ends": threading.current_thread() is threading.main_thread(),
        },
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu=resources.use_gpu, resources_per_worker={"CPU": cpus}
        ),
        run_config=RunConfig(
            name="ray",
            storage_path=place.uri,
            worker_runtime_env={"env_vars": {} if resources.use_gpu else one_arena},
            failure_config=FailureConfig(max_failures=resources.max_failures, controller_failure_limit=starts - 1),
        ),
    )
    leave_out_helpers(trainer, alone=pipeline.session.alone, elastic=elastic)
    count_starts_in_a_row(trainer)
    if pipeline.session.alone:
        let_main_threads_rest(trainer)
        end_leftovers()
    value: dict[str, Any] = {}
    with contextlib.closing(board):
        with _Follower(pipeline, board, name, settings["steps"], run) as follower, _signals(follower):
            try:
                value = _fitted(trainer, place).return_value or {}
            except (WorkerGroupError, ControllerError) as error:
                _raise_failure(board)
                started = isinstance(error, WorkerGroupError)
                raise TrainingFailedError(_over(name, resources, error, starts=None if started else starts)) from error
            except SystemExit:  # what Ray Train makes of SIGINT: the follower's, or else Ctrl-C
                _raise_failure(board)
                raise KeyboardInterrupt from None
        _raise_failure(board)
    if value["resumed_from"]:
        done = " (it was finished)" if value["resumed_from"] == settings["steps"] else ""
        print(f"{name}: went on from step {value['resumed_from']}{done}", flush=True)
    return value


def _over(name: str, resources: Resources, error: Exception, *, starts: int | None) -> str:
    """The message of a training that ended in Ray Train's hands. starts: attempts to start its workers; None: they
    did start."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
    if starts is None:
        return (
            f"{name}: training stopped after {resources.max_failures} restarts (--resources.max-failures), the last "
            f"error was: {reason}; the last checkpoint is kept, the same command goes on from it"
        )
    return (
        f"{name}: expected {resources.min_workers or resources.num_workers} workers to start, they did not in "
        f"{starts} attempts: {reason}; is the cluster busy with other work? What was trained is "
        "kept, the same command goes on from it"
    )


def _raise_failure(board: Board) -> None:
    failure = board.failure()
    if failure is not None:
        raise _FINAL[failure[0]](failure[1])


@contextlib.contextmanager
def _signals(follower: "_Follower") -> Iterator[None]:
    """SIGTERM asks training to stop after a checkpoint, a second one ends the program. Ray Train leaves a handler of
    SIGINT behind, which is taken away."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def stop(number: int, frame: FrameType | None) -> None:
        follower.ask_to_stop()
        signal.signal(signal.SIGTERM, before[signal.SIGTERM])

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Follower:
    """A thread that moves what is posted on the board to the progress bar and to tracking while `fit` blocks."""

    def __init__(self, pipeline: Pipeline, board: Board, name: str, steps: int, run: StageRun) -> None:
        self._session, self._usage_alarm = pipeline.session, pipeline.resources.usage_alarm
        self._asked = pipeline.stops
        self._board, self._run, self._name = board, run, name
        self._progress = Progress(name, steps, "steps")
        self._over, self._stops, self._wake, self._told, self._saved = False, False, threading.Event(), False, 0.0
        self._ended = False
        self._thread = threading.Thread(target=self._follow, name="follower", daemon=True)

    def __enter__(self) -> "_Follower":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True
        self._wake.set()
        self._thread.join()
        self._drain()
        self._progress.__exit__()

    def ask_to_stop(self) -> None:
        """Safe in a signal handler: the thread, which it wakes, tells the workers."""
        self._stops = True
        self._wake.set()

    def _follow(self) -> None:
        from ray.exceptions import RayError

        while not self._over:
            if self._wake.wait(_SECONDS_BETWEEN_POLLS):
                self._wake.clear()
            with contextlib.suppress(RayError):  # again in a moment
                if (self._stops or self._asked.is_set()) and not self._told:
                    self._board.ask("stop")
                    self._told = True
                    print(f"{self._name}: asked to stop; a checkpoint is written first", flush=True)
                self._watch_nodes()
            self._drain()

    def _watch_nodes(self) -> None:
        """Ask for a checkpoint every few seconds while a node that trains is about to be taken away."""
        leaving = self._session.leaving_nodes()
        is_due = time.monotonic() - self._saved > _SECONDS_BETWEEN_SAVES
        if leaving and is_due and leaving & self._board.nodes():
            if not self._saved:
                print(f"{self._name}: a node is about to be taken away, a checkpoint is written", flush=True)
            self._saved = time.monotonic()
            self._board.ask("save")

    def _drain(self) -> None:
        from ray.exceptions import RayError

        try:
            posts = self._board.take_posts()
        except RayError:  # the curves are also in the checkpoint and the artifact
            return
        points = [(step, self._with_alarm(step, value)) for kind, step, value in posts if kind == "metrics"]
        for kind, step, value in posts:
            if kind == "line":
                print(f"{self._name}: {value}", flush=True)
            if kind == "pictures":
                self._run.show(step, value)
            if kind == "end" and not (self._ended or self._over):
                self._ended = True  # once, since a second one would end Ray Train's own clearing up
                # SIGINT is Ray Train's only way to end a run without starting it again.
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        if points:
            step, metrics = points[-1]
            note = " ".join(f"{name}={value:.4g}" for name, value in list(metrics.items())[:2])
            self._progress.advance_to(step, note)
            self._run.log(points)

    def _with_alarm(self, step: int, metrics: dict[str, float]) -> dict[str, float]:
        usage = metrics.get("epoch_usage")
        if usage is None:
            return metrics
        if usage < self._usage_alarm:
            print(
                f"{self._name}: alarm at step {step}: {100 * usage:.1f} % of the codes were used in the last epoch, "
                f"expected at least {100 * self._usage_alarm:.0f} %; a table that collapses is helped by revive_every, "
                "moving averages, or a lower learning rate",
                flush=True,
            )
        return {**metrics, "usage_alarm": float(usage < self._usage_alarm)}


def _worker_main(config: dict[str, Any]) -> dict[str, Any]:
    """What each Ray Train worker runs."""
    import ray
    import ray.train
    import ray.train.torch
    import torch

    begin, board = time.time(), Board(config["board"])
    torch.set_num_threads(config["threads"])
    rank, ranks = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    world_size, group = _share_lanes(config["settings"]["train"]["num_lanes"], ranks)
    if rank >= world_size or board.failure() is not None:
        return {}  # one rank too many; or another has told why, and starting again would not mend it

    board.join(ray.get_runtime_context().get_node_id())

    def all_reduce(tensor: torch.Tensor) -> None:
        if world_size > 1:
            torch.distributed.all_reduce(tensor, group=group)

    link = _Link(board, asks=rank == 0)
    states = StateFolder(
        Folder(config["states"]), config["identity"], keep=config["keep"], warn=lambda line: link.post("line", 0, line)
    )
    device = ray.train.torch.get_device()
    with link:
        worker = Worker(
            rank=rank,
            world_size=world_size,
            device=str(device),
            checkpoint_every=config["checkpoint_every"],
            micro_batch=config["micro_batch"],
            compile=config["compile"] and device.type == "cuda",
            until=config["until"],
            begin=0 if config["begin"] is None else config["begin"]["step"],
            all_reduce=all_reduce,
            log=lambda step, metrics: link.post("metrics", step, metrics),
            show=lambda step, pictures: link.post("pictures", step, pictures),
            warn=lambda line: link.post("line", 0, line),
            save=states.save,
            flush=states.wait,
            load=states.load,
            asked=link.take_asked,
        )
        try:
            state = _agreed_state(states, rank, device, all_reduce)
            if state is None and config["begin"] is not None:
                state = SavedState(**config["begin"]).load()
            value = config["loop"](config["settings"], worker, state)
        except (InputError, NonFiniteLossError, StoppedError) as error:
            kind = next(name for name, final in _FINAL.items() if isinstance(error, final))
            board.fail(kind, str(error))
            if world_size == 1:
                return {}
            if config["driver_ends"]:  # other ranks may wait for this one, and a failed group would be started again,
                link.post("end", 0, None)  # which on a cluster that shrinks takes minutes
                time.sleep(_SECONDS_TO_BE_ENDED)
            raise
    return {**value, "resumed_from": state.step if state else 0, "work_seconds": time.time() - begin}


def _share_lanes(num_lanes: int, ranks: int) -> tuple[int, Any]:
    """How many of the ranks train, since they have to share the lanes evenly, and their process group."""
    import torch

    count = next(number for number in range(ranks, 0, -1) if num_lanes % number == 0)
    return count, torch.distributed.new_group(list(range(count))) if 1 < count < ranks else None


def _agreed_state(
    states: StateFolder, rank: int, device: Any, all_reduce: Callable[[Any], None]
) -> TrainingState | None:
    """The newest whole state, chosen by rank 0 for all.

    Where the driver was killed, workers of before may still live for a moment, and write and delete: what one rank
    has found another may not find any more, and then all choose again.
    """
    import torch

    for _ in range(_CHOICES):
        state = states.newest() if rank == 0 else None
        step = torch.tensor([state.step if state is not None else 0.0], dtype=torch.float64, device=device)
        all_reduce(step)
        missing = torch.zeros_like(step)
        if rank != 0 and int(step):
            try:
                state = states.load(int(step))
            except TornStateError:
                missing += 1
        all_reduce(missing)
        if not int(missing):
            return state
        time.sleep(_SECONDS_BETWEEN_CHOICES)
    raise CheckpointError(
        f"expected a training state in {states.folder.uri} that all workers can read, found none in {_CHOICES} "
        "attempts; is it a folder that all nodes share?"
    )


class _Link:
    """A rank's way to the board and back: a thread, so that no step waits for Ray's head. asks: whether it looks for
    what the driver asks of training, which the loop of one rank takes after each step."""

    def __init__(self, board: Board, *, asks: bool) -> None:
        self._board, self._asks, self._asked = board, asks, ""
        self._posts: queue.Queue[tuple[str, int, Any] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="link", daemon=True)

    def __enter__(self) -> "_Link":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._posts.put(None)
        self._thread.join(_SECONDS_OF_PATIENCE)

    def post(self, kind: str, step: int, value: Any) -> None:
        self._posts.put((kind, step, value))

    def take_asked(self) -> Any:
        """ "", save or stop; a save is given once."""
        asked = self._asked
        if asked == "save":
            self._asked = ""
        return asked

    def _work(self) -> None:
        from ray.exceptions import RayError

        looked = 0.0
        while True:
            post = None
            with contextlib.suppress(queue.Empty):
                post = self._posts.get(timeout=_SECONDS_BETWEEN_POLLS)
                if post is None:
                    return
            # Ray's head may be slow or gone: the curves are also in the state and the artifact.
            with contextlib.suppress(RayError):
                if post is not None:
                    self._board.post(*post)
                if self._asks and self._asked != "stop" and time.monotonic() - looked > _SECONDS_BETWEEN_POLLS:
                    looked = time.monotonic()
                    self._asked = self._board.take_asked() or self._asked


def describe(resources: Resources) -> str:
    """One word for the device kind: provenance."""
    return "gpu" if resources.use_gpu else "cpu"
