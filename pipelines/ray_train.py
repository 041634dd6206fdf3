"""Ray Train around a loop that knows no Ray: workers, checkpoints, restarts, and the way of metrics to the driver."""

import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipelines.config import Resources
from pipelines.progress import Progress
from pipelines.stage import Pipeline
from pipelines.tracking import StageRun
from vqvae_core.checkpoint import CheckpointError, TrainingState, load_state
from vqvae_core.errors import InputError
from vqvae_core.storage import Folder
from vqvae_core.train import NonFiniteLossError, Worker

# (settings, worker, state to go on from) -> JSON value of rank 0
Loop = Callable[[dict[str, Any], Worker, TrainingState | None], dict[str, Any]]
_ERRORS = {"InputError": InputError, "NonFiniteLossError": NonFiniteLossError}
_SECONDS_BETWEEN_POLLS = 0.5
_SNAPSHOT = "checkpoint_manager_snapshot.json"  # Ray Train's own


class TrainingFailedError(RuntimeError):
    """Training workers died more often than allowed."""


class _Board:
    """An actor that rank 0 posts its metrics to and the driver reads them from: workers need no tracking client."""

    def __init__(self) -> None:
        self._points: list[tuple[int, dict[str, float]]] = []
        self._failure: tuple[str, str] | None = None

    def post(self, step: int, metrics: dict[str, float]) -> None:
        self._points.append((step, metrics))

    def fail(self, kind: str, message: str) -> None:
        self._failure = self._failure or (kind, message)

    def failure(self) -> tuple[str, str] | None:
        """What ended training for good: kind and message of an error that starting again would not mend."""
        return self._failure

    def read(self, start: int) -> list[tuple[int, dict[str, float]]]:
        return self._points[start:]


def fit(
    pipeline: Pipeline, loop: Loop, settings: dict[str, Any], *, name: str, work: str, folder: Folder, run: StageRun
) -> dict[str, Any]:
    """Run the loop on Ray Train's workers and return what rank 0 returned.

    The run's name carries the work's key, so that a changed config never goes on with old weights. settings["steps"]:
    the total, for the progress bar. Raises what the loop raised, or `TrainingFailedError`.
    """
    resources = pipeline.resources
    cpus = pipeline.session.check(
        num_workers=resources.num_workers, cpus_per_worker=resources.cpus_per_worker, use_gpu=resources.use_gpu
    )
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # a checkpoint is committed at the next poll
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "60")
    import ray
    from ray.train import CheckpointConfig, ControllerError, FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
    from ray.train.torch import TorchTrainer

    board = ray.remote(num_cpus=0)(_Board).remote()
    trainer = TorchTrainer(
        _worker_main,
        train_loop_config={
            "loop": loop,
            "settings": settings,
            "board": board,
            "identity": work,
            "left": _state_left(folder / f"training-{work}", work),
            "threads": cpus,
            "checkpoint_every": resources.checkpoint_every,
        },
        scaling_config=ScalingConfig(
            num_workers=resources.num_workers, use_gpu=resources.use_gpu, resources_per_worker={"CPU": cpus}
        ),
        run_config=RunConfig(
            name=f"training-{work}",
            storage_path=folder.uri,
            failure_config=FailureConfig(max_failures=resources.max_failures, controller_failure_limit=3),
            checkpoint_config=CheckpointConfig(num_to_keep=resources.keep_checkpoints),
        ),
    )
    value: dict[str, Any] = {}
    handler = signal.getsignal(signal.SIGINT)
    with _Follower(board, name, settings["steps"], run):
        try:
            value = trainer.fit().return_value or {}
        except (WorkerGroupError, ControllerError) as error:
            _raise_failure(board)
            reason = str(error).strip().splitlines()[-1]
            raise TrainingFailedError(
                f"{name}: training stopped after {resources.max_failures} restarts, the last error was: {reason}; "
                "the last checkpoint is kept, the same command goes on from it"
            ) from error
        except SystemExit:  # what Ray Train makes of Ctrl-C
            raise KeyboardInterrupt from None
        finally:
            signal.signal(signal.SIGINT, handler)
    _raise_failure(board)
    if value["resumed_from"]:
        print(f"{name}: went on from step {value['resumed_from']}", flush=True)
    return value


def _raise_failure(board: Any) -> None:
    import ray

    failure = ray.get(board.failure.remote())
    if failure is not None:
        raise _ERRORS[failure[0]](failure[1])


def _state_left(folder: Folder, identity: str) -> str | None:
    """Where training goes on if Ray Train has no list of its checkpoints: its newest whole state.

    Ray rewrites that list in place, so a kill in that moment leaves one that it cannot read again.
    """
    try:
        data = folder.read(_SNAPSHOT)
        json.loads(data)
        return None
    except (FileNotFoundError, NotADirectoryError):
        pass
    except ValueError:
        folder.write(f"{_SNAPSHOT}.torn", data)
        folder.delete(_SNAPSHOT)
        print(f"{folder.uri}: the list of checkpoints was torn by a kill; going on from the newest whole one")
    for name in sorted((name for name in folder.folders() if name.startswith("step-")), reverse=True):
        place = f"{folder.uri}/{name}"
        try:
            _last_state(_checkpoint_at(place), identity)
            return place
        except InputError as error:
            print(f"passed over: {error}")
    return None


def _checkpoint_at(place: str | None) -> Any:
    from ray.train import Checkpoint

    return None if place is None else Checkpoint(place)


class _Follower:
    """A thread that moves points from the board to the progress bar and to tracking while `fit` blocks."""

    def __init__(self, board: Any, name: str, steps: int, run: StageRun) -> None:
        self._board, self._run = board, run
        self._progress = Progress(name, steps, "steps")
        self._seen = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="follower", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._drain()
        self._progress.__exit__()

    def _follow(self) -> None:
        while not self._stop.wait(_SECONDS_BETWEEN_POLLS):
            self._drain()

    def _drain(self) -> None:
        import ray
        from ray.exceptions import RayError

        try:
            points = ray.get(self._board.read.remote(self._seen), timeout=10)
        except RayError:  # the curves are also in the checkpoint and the artifact
            return
        if points:
            self._seen += len(points)
            step, metrics = points[-1]
            note = " ".join(f"{name}={value:.4g}" for name, value in list(metrics.items())[:2])
            self._progress.advance_to(step, note)
            self._run.log(points)


def _worker_main(config: dict[str, Any]) -> dict[str, Any]:
    """What each Ray Train worker runs."""
    import ray
    import ray.train
    import ray.train.torch
    import torch

    context = ray.train.get_context()
    torch.set_num_threads(config["threads"])
    rank, world_size = context.get_world_rank(), context.get_world_size()

    def all_reduce(tensor: torch.Tensor) -> None:
        if world_size > 1:
            torch.distributed.all_reduce(tensor)

    def log(step: int, metrics: dict[str, float]) -> None:
        if rank == 0:
            config["board"].post.remote(step, metrics)

    def save(step: int, metrics: dict[str, float], write: Callable[[Path], None] | None) -> None:
        checkpoint = None
        if write is not None:
            place = Path(tempfile.mkdtemp(prefix="checkpoint-"))
            write(place)
            checkpoint = ray.train.Checkpoint.from_directory(str(place))
        ray.train.report(
            {"step": step},
            checkpoint=checkpoint,
            checkpoint_dir_name=f"step-{step:09d}",
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
        )

    worker = Worker(
        rank=rank,
        world_size=world_size,
        device=str(ray.train.torch.get_device()),
        checkpoint_every=config["checkpoint_every"],
        all_reduce=all_reduce,
        log=log,
        save=save,
    )
    begin = time.time()
    board = config["board"]
    if ray.get(board.failure.remote()) is not None:
        return {}  # another rank has told why: starting again would not mend it
    try:
        state = _last_state(ray.train.get_checkpoint() or _checkpoint_at(config["left"]), config["identity"])
        value = config["loop"](config["settings"], worker, state)
    except (InputError, NonFiniteLossError) as error:
        kind = "InputError" if isinstance(error, InputError) else "NonFiniteLossError"
        ray.get(board.fail.remote(kind, str(error)))
        if world_size > 1:
            raise  # ends the whole group: other ranks may wait for this one
        return {}
    return {**value, "resumed_from": state.step if state else 0, "work_seconds": time.time() - begin}


def _last_state(checkpoint: Any, identity: str) -> TrainingState | None:
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as place:
        try:
            return load_state(Path(place), identity)
        except CheckpointError as error:
            raise InputError(f"{error}; move that checkpoint away to start from an earlier one") from error


def describe(resources: Resources) -> str:
    """One word for the device kind: provenance."""
    return "gpu" if resources.use_gpu else "cpu"
