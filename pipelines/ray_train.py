"""Ray Train around a loop that knows no Ray: workers, restarts, stops, and the way of metrics to the driver.

States are the project's own (vqvae_core/checkpoint.py): Ray's list of checkpoints is rewritten in place, so that a kill
can tear it, and knows nothing of hashes. Ray Train starts workers, again where they die, more or fewer where it may.
"""

import asyncio
import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from pipelines.config import Resources
from pipelines.progress import Progress
from pipelines.stage import Pipeline
from pipelines.tracking import StageRun
from vqvae_core.checkpoint import CheckpointError, StateFolder, TornStateError, TrainingState
from vqvae_core.errors import InputError
from vqvae_core.storage import Folder
from vqvae_core.train import NonFiniteLossError, StoppedError, Worker

# (settings, worker, state to go on from) -> JSON value of rank 0
Loop = Callable[[dict[str, Any], Worker, TrainingState | None], dict[str, Any]]
_FINAL = {kind.__name__: kind for kind in (InputError, NonFiniteLossError, StoppedError)}  # a restart mends none
_SECONDS_BETWEEN_POLLS = 1.0
_SECONDS_OF_PATIENCE = 10.0
_SECONDS_BETWEEN_SAVES = 5.0  # while a node is about to be taken away
_CHOICES, _SECONDS_BETWEEN_CHOICES = 5, 2.0
_START_SECONDS = "60"
_CONTROLLER_FAILURES = 3  # of starting a group
_SECONDS_TO_BE_ENDED = 30.0  # after which a rank whose group should be ended fails by itself
_ELASTIC_START_SECONDS = "20"  # a group of a size that is no longer there is given up after it


class TrainingFailedError(RuntimeError):
    """Training workers died more often than allowed."""


class _Board:
    """An actor between workers and the driver, so that workers need no tracking client and the driver can ask."""

    def __init__(self) -> None:
        self._posts: list[tuple[str, int, Any]] = []
        self._failure: tuple[str, str] | None = None
        self._saves, self._stops, self._news = False, False, asyncio.Event()
        self._nodes = set[str]()

    async def post(self, kind: str, step: int, value: Any) -> None:
        """kind: metrics, pictures, line, or end, which asks the driver to end the whole group."""
        self._posts.append((kind, step, value))

    async def read(self) -> list[tuple[str, int, Any]]:
        """What was posted since it was read last."""
        posts, self._posts = self._posts, []
        return posts

    async def fail(self, kind: str, message: str) -> None:
        self._failure = self._failure or (kind, message)

    async def failure(self) -> tuple[str, str] | None:
        """What ended training for good: kind and message of an error that starting again would not mend."""
        return self._failure

    async def ask(self, what: str) -> None:
        """what: save, or stop, which stays."""
        self._saves |= what == "save"
        self._stops |= what == "stop"
        self._news.set()

    async def take_asked(self, patience: float) -> str:
        """What is asked for, "" where nothing is within `patience` seconds. A save is asked for once."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._news.wait(), patience)
        saves, self._saves = self._saves, False
        if not self._stops:
            self._news.clear()
        return "stop" if self._stops else "save" if saves else ""

    async def join(self, node: str) -> None:
        self._nodes.add(node)

    async def nodes(self) -> set[str]:
        """Nodes that workers run on, or ran on."""
        return self._nodes


def fit(
    pipeline: Pipeline, loop: Loop, settings: dict[str, Any], *, name: str, work: str, folder: Folder, run: StageRun
) -> dict[str, Any]:
    """Run the loop on Ray Train's workers and return what rank 0 returned.

    The states' folder carries the work's key, so that a changed config never goes on with old weights.
    settings["steps"]: the total, for the progress bar; settings["train"]["num_lanes"]: what workers share.
    Raises what the loop raised, or `TrainingFailedError`.
    """
    resources = pipeline.resources
    cpus = pipeline.cpus_per_worker()
    elastic = resources.min_workers is not None
    os.environ.setdefault(
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", _ELASTIC_START_SECONDS if elastic else _START_SECONDS
    )
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")
    if pipeline.session.alone:  # no node is taken away, and nobody collects Ray's own metrics
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
    import ray
    from ray.train import ControllerError, FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
    from ray.train.torch import TorchTrainer
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    place = folder / f"training-{work}"
    others = [other for other in folder.folders() if other.startswith("training-") and other != place.name]
    if others and place.name not in folder.folders():
        print(
            f"{name}: starting from step 0, since the {len(others)} training in {folder.uri} was on other data; its "
            "states are kept",
            flush=True,
        )
    # Beside the driver: on another node it would be gone with that.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board = ray.remote(_Board).options(num_cpus=0, scheduling_strategy=here).remote()
    needed = resources.min_workers or resources.num_workers
    workers = (needed, resources.num_workers) if elastic else resources.num_workers
    trainer = TorchTrainer(
        _worker_main,
        train_loop_config={
            "loop": loop,
            "settings": settings,
            "board": board,
            "states": place.uri,
            "identity": work,
            "keep": resources.keep_checkpoints,
            "threads": cpus,
            "checkpoint_every": resources.checkpoint_every,
            "micro_batch": resources.micro_batch,
            "compile": resources.compile,
            "driver_ends": threading.current_thread() is threading.main_thread(),
        },
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu=resources.use_gpu, resources_per_worker={"CPU": cpus}
        ),
        run_config=RunConfig(
            name="ray",
            storage_path=place.uri,
            failure_config=FailureConfig(
                max_failures=resources.max_failures, controller_failure_limit=_CONTROLLER_FAILURES
            ),
        ),
    )
    value: dict[str, Any] = {}
    with _Follower(pipeline, board, name, settings["steps"], run) as follower, _signals(follower):
        try:
            value = trainer.fit().return_value or {}
        except WorkerGroupError as error:
            _raise_failure(board)
            raise TrainingFailedError(
                f"{name}: training stopped after {resources.max_failures} restarts (--resources.max-failures), the "
                f"last error was: {_last_line(error)}; the last checkpoint is kept, the same command goes on from it"
            ) from error
        except ControllerError as error:
            _raise_failure(board)
            raise TrainingFailedError(
                f"{name}: expected {needed} workers to start, they did not in {_CONTROLLER_FAILURES + 1} attempts: "
                f"{_last_line(error)}; is the cluster busy with other work? What was trained is kept, the same command "
                "goes on from it"
            ) from error
        except SystemExit:  # what Ray Train makes of SIGINT: the follower's, or else Ctrl-C
            _raise_failure(board)
            raise KeyboardInterrupt from None
    _raise_failure(board)
    if value["resumed_from"]:
        done = " (it was finished)" if value["resumed_from"] == settings["steps"] else ""
        print(f"{name}: went on from step {value['resumed_from']}{done}", flush=True)
    return value


def _last_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


def _raise_failure(board: Any) -> None:
    import ray

    failure = ray.get(board.failure.remote())
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

    def __init__(self, pipeline: Pipeline, board: Any, name: str, steps: int, run: StageRun) -> None:
        self._session, self._usage_alarm = pipeline.session, pipeline.resources.usage_alarm
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
            if self._stops and not self._told:
                self._told = True
                self._board.ask.remote("stop")
                print(f"{self._name}: asked to stop; a checkpoint is written first", flush=True)
            with contextlib.suppress(RayError):
                self._watch_nodes()
            self._drain()

    def _watch_nodes(self) -> None:
        """Ask for a checkpoint every few seconds while a node that trains is about to be taken away."""
        import ray

        leaving = self._session.leaving_nodes()
        if leaving and time.monotonic() - self._saved > _SECONDS_BETWEEN_SAVES:
            trains: set[str] = ray.get(self._board.nodes.remote(), timeout=10)
            if leaving & trains:
                if not self._saved:
                    print(f"{self._name}: a node is about to be taken away, a checkpoint is written", flush=True)
                self._saved = time.monotonic()
                self._board.ask.remote("save")

    def _drain(self) -> None:
        import ray
        from ray.exceptions import RayError

        try:
            posts = ray.get(self._board.read.remote(), timeout=10)
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

    begin, board = time.time(), config["board"]
    torch.set_num_threads(config["threads"])
    rank, ranks = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    world_size, group = _share_lanes(config["settings"]["train"]["num_lanes"], ranks)
    if rank >= world_size or ray.get(board.failure.remote()) is not None:
        return {}  # one rank too many; or another has told why, and starting again would not mend it

    board.join.remote(ray.get_runtime_context().get_node_id())

    def all_reduce(tensor: torch.Tensor) -> None:
        if world_size > 1:
            torch.distributed.all_reduce(tensor, group=group)

    def post(kind: str, step: int, value: Any) -> None:
        board.post.remote(kind, step, value)

    states = StateFolder(
        Folder(config["states"]), config["identity"], keep=config["keep"], warn=lambda line: post("line", 0, line)
    )
    device = ray.train.torch.get_device()
    with _Asked(board, rank) as asked:
        worker = Worker(
            rank=rank,
            world_size=world_size,
            device=str(device),
            checkpoint_every=config["checkpoint_every"],
            micro_batch=config["micro_batch"],
            compile=config["compile"] and device.type == "cuda",
            all_reduce=all_reduce,
            log=lambda step, metrics: post("metrics", step, metrics),
            show=lambda step, pictures: post("pictures", step, pictures),
            warn=lambda line: post("line", 0, line),
            save=states.save,
            flush=states.wait,
            load=states.load,
            asked=asked.take,
        )
        try:
            state = _agreed_state(states, rank, device, all_reduce)
            value = config["loop"](config["settings"], worker, state)
        except (InputError, NonFiniteLossError, StoppedError) as error:
            kind = next(name for name, final in _FINAL.items() if isinstance(error, final))
            ray.get(board.fail.remote(kind, str(error)))
            if world_size == 1:
                return {}
            if config["driver_ends"]:  # other ranks may wait for this one, and a failed group would be started again,
                post("end", 0, None)  # which on a cluster that shrinks takes minutes
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


class _Asked:
    """What the driver asks of training. A thread of rank 0 waits for it at the board: the loop asks after each step."""

    def __init__(self, board: Any, rank: int) -> None:
        self._board, self._waits, self._asked = board, rank == 0, ""
        self._over = False
        self._thread = threading.Thread(target=self._wait, name="asked", daemon=True)

    def __enter__(self) -> "_Asked":
        if self._waits:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True

    def take(self) -> Any:
        """ "", save or stop; a save is given once."""
        asked = self._asked
        if asked == "save":
            self._asked = ""
        return asked

    def _wait(self) -> None:
        import ray
        from ray.exceptions import RayError

        while not self._over and self._asked != "stop":
            try:
                answer = self._board.take_asked.remote(_SECONDS_OF_PATIENCE)
                self._asked = ray.get(answer, timeout=2 * _SECONDS_OF_PATIENCE) or self._asked
            except RayError:  # the driver is gone, or the board's node is slow
                time.sleep(_SECONDS_BETWEEN_POLLS)


def describe(resources: Resources) -> str:
    """One word for the device kind: provenance."""
    return "gpu" if resources.use_gpu else "cpu"
