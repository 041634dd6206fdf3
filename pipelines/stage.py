"""How a stage becomes an artifact: reuse by fingerprint, fan-out over Ray Data, sidecars, and the commit."""

import contextlib
import fcntl
import importlib.metadata
import itertools
import json
import logging
import os
import platform
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from cluster.driver_memory import let_go
from cluster.session import Session
from pipelines.config import Resources
from pipelines.tracking import StageRun, Tracker
from vqvae_core.artifacts import MANIFEST, Artifact, FileEntry, commit, hash_json, reference
from vqvae_core.errors import InputError, StoppedError
from vqvae_core.storage import Folder, StorageError, concurrently

T = TypeVar("T")
_ENCODERS_PER_NODE = 8
_ENCODER_DEATHS = 3  # of a wave
_WAVE = 512  # tasks or shards, at least
_WAVE_A_CPU = 32  # the end of a wave, where CPUs wait, is short beside it
_WAVE_AN_ENCODER = 128  # shards: some seconds to start encoders beside minutes of work
_WORKER_DEATHS = 10  # of one task, lost nodes among them: an image that kills its worker must not do so for ever
_SIDECARS = 1024  # read together
_PACKAGES = ("torch", "ray", "numpy", "pyarrow", "pillow", "safetensors", "simplejpeg", "mlflow", "vizdoom")


@dataclass(frozen=True)
class Made:
    """What a stage's work leaves: its files, facts for the manifest, and the seconds in which work was done (without
    the start of Ray and its workers)."""

    files: Iterable[FileEntry]
    facts: dict[str, Any]
    work_seconds: float


@dataclass(frozen=True)
class Workspace:
    """The folder of an artifact while it is made. `work` names the job exactly: fingerprint and inputs' contents."""

    folder: Folder
    work: str

    def finished(self, name: str) -> dict[str, Any] | None:
        """The record of a part (a shard) that an earlier run of the same job finished, if its file is still there."""
        return read_sidecar(self.folder, self.work, name)

    def finished_parts(self, names: Iterable[str], below: str = "") -> np.ndarray:
        """bool (len(names),): which parts are finished. One listing, then one read for each sidecar that is there, many
        at a time. Names may come one by one: there may be millions."""
        there = set((self.folder / below if below else self.folder).list("sidecars"))
        done = []
        for chunk in _chunks(names):
            candidates = [number for number, name in enumerate(chunk) if f"{name}.json" in there]
            found = self._read([chunk[number] for number in candidates], below)
            mine = np.zeros(len(chunk), bool)
            mine[[number for number, record in zip(candidates, found, strict=True) if record is not None]] = True
            done.append(mine)
        return np.concatenate([*done, np.zeros(0, bool)])

    def records(self, names: Iterable[str], below: str = "") -> Iterator[dict[str, Any]]:
        """The records of finished parts, in order. Raises RuntimeError where one is missing."""
        for chunk in _chunks(names):
            for name, record in zip(chunk, self._read(chunk, below), strict=True):
                if record is None:
                    raise RuntimeError(f"{name} is missing after the fan-out")
                yield record

    def _read(self, names: Sequence[str], below: str) -> list[dict[str, Any] | None]:
        folder = self.folder / below if below else self.folder
        return concurrently(lambda name: read_sidecar(folder, self.work, name), names, folder)


def _chunks(names: Iterable[str]) -> Iterator[list[str]]:
    waiting = iter(names)
    while chunk := list(itertools.islice(waiting, _SIDECARS)):
        yield chunk


def sidecar_name(name: str) -> str:
    return f"sidecars/{name}.json"


def read_sidecar(folder: Folder, work: str, name: str) -> dict[str, Any] | None:
    try:
        record = json.loads(folder.read(sidecar_name(name)))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    if not isinstance(record, dict) or record.get("work") != work:
        return None
    files = [record["file"], *record.get("more_files", [])]  # one after the other: other sidecars are read meanwhile
    return record if all(folder.size(file["path"]) == file["bytes"] for file in files) else None


def write_sidecar(
    folder: Folder, work: str, name: str, file: FileEntry, more_files: Sequence[FileEntry] = (), **facts: Any
) -> dict[str, Any]:
    """Prove that a part is done. Written after its files. Returns the record."""
    record = {"work": work, "name": name, "file": asdict(file), **facts}
    if more_files:
        record["more_files"] = [asdict(one) for one in more_files]
    folder.write(sidecar_name(name), json.dumps(record).encode())
    return record


class NotMadeError(LookupError):
    """A stage's artifact is not there, and was not to be made."""


@dataclass
class StageReport:
    """What happened to one stage in this run."""

    name: str
    artifact: Artifact
    reused: bool
    seconds: float
    work_seconds: float


@dataclass
class Pipeline:
    """One run of the pipeline: its root, where it computes, and what it tells."""

    root: Folder
    resources: Resources
    session: Session
    tracker: Tracker
    config: Mapping[str, Any] = field(default_factory=dict)
    reports: list[StageReport] = field(default_factory=list)
    makes: bool = True
    """False: what is not there is not made, and `NotMadeError` says so."""
    stops: threading.Event = field(default_factory=threading.Event)
    """Once set, a training ends with `StoppedError`, after a checkpoint."""

    def make(
        self,
        stage: str,
        *,
        version: int,
        kind: str,
        recipe: Any,
        inputs: Mapping[str, Artifact],
        build: Callable[[Workspace, StageRun], Made],
    ) -> Artifact:
        """The artifact of a stage: as it is where it was made before from the same inputs, else made now."""
        begin = time.monotonic()
        parents = {name: artifact.manifest.fingerprint for name, artifact in inputs.items()}
        fingerprint = hash_json({"stage": stage, "version": version, "recipe": recipe, "inputs": parents})
        folder = self.root / f"{stage}-{fingerprint[:12]}"
        artifact = self._reusable(folder, kind, inputs)
        reused = artifact is not None
        if artifact is None and not self.makes:
            raise NotMadeError(stage)
        work = hash_json({"fingerprint": fingerprint, "inputs": {k: reference(v) for k, v in inputs.items()}})[:16]
        if artifact is not None and self.makes:
            self.tracker.catch_up(work, artifact)
        if artifact is None:
            # Before any work: impossible resources fail within seconds.
            self.cpus_per_worker()
            with only_writer(folder):
                artifact = self._reusable(folder, kind, inputs)  # another program may have made it just now
                reused = artifact is not None
                if artifact is None:
                    run = self.tracker.stage(stage, work, recipe, inputs)
                    folder.sweep()
                    made = _built(build, Workspace(folder, work), run)
                    artifact = commit(
                        folder,
                        kind=kind,
                        stage=stage,
                        stage_version=version,
                        fingerprint=fingerprint,
                        recipe=recipe,
                        inputs=inputs,
                        files=made.files,
                        facts=made.facts,
                        provenance={
                            **provenance(),
                            "config": self.config,
                            "mlflow_run": run.run_id,
                            "seconds": round(time.monotonic() - begin, 3),
                            "work_seconds": round(made.work_seconds, 3),
                        },
                    )
                    run.finish(artifact)
                    del made  # of all files it may hold an entry
            let_go()
        seconds = time.monotonic() - begin
        work_seconds = 0.0 if reused else artifact.manifest.provenance["work_seconds"]
        if not self.makes:
            return artifact
        self.reports.append(StageReport(stage, artifact, reused, seconds, work_seconds))
        print(f"{stage}: {'reused' if reused else f'made in {seconds:.1f} s'}  {folder.uri}", flush=True)
        return artifact

    def cpus_per_worker(self) -> int:
        """CPUs of each training worker. Raises `ResourceError` where the cluster has less than is asked for."""
        resources = self.resources
        return self.session.check(
            num_workers=resources.num_workers,
            cpus_per_worker=resources.cpus_per_worker,
            use_gpu=resources.use_gpu,
            min_workers=resources.min_workers,
        )

    def _reusable(self, folder: Folder, kind: str, inputs: Mapping[str, Artifact]) -> Artifact | None:
        if not folder.exists(MANIFEST):
            return None
        artifact = Artifact.open(folder, kind)
        for name, parent in inputs.items():
            if artifact.manifest.inputs.get(name, {}).get("content") != parent.manifest.content:
                print(f"{folder.name}: made again, since its input {name} now has other contents", flush=True)
                folder.delete(MANIFEST)
                return None
        artifact.check_files()
        return artifact


def _built(build: Callable[[Workspace, StageRun], Made], space: Workspace, run: StageRun) -> Made:
    """What a stage's work leaves; where it leaves nothing, its run says why."""
    try:
        return build(space, run)
    except (KeyboardInterrupt, StoppedError, SystemExit):  # the last of them by SIGTERM
        run.fail("KILLED")
        raise
    except BaseException:
        run.fail()
        raise


@contextlib.contextmanager
def only_writer(folder: Folder) -> Iterator[None]:
    """Hold a local folder, which is made where it is not there, for this program alone, until it ends however it does:
    two would delete each other's unfinished files and states. Raises `InputError` where another one has it. S3 and file
    systems without locks hold nothing."""
    if not folder.is_local:
        yield
        return
    place = Path(folder.uri)
    place.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"expected nobody else at work in {folder.uri}, found another program{_holder(descriptor)}; wait until "
                "it is done, or stop it: the same command then goes on from there"
            ) from error
        except OSError:  # a network's file system may have none
            pass
        yield
    finally:
        os.close(descriptor)
        with contextlib.suppress(OSError):  # it goes where nothing was written
            place.rmdir()


def _holder(descriptor: int) -> str:
    """Who holds a lock on an open file, as far as this machine says."""
    with contextlib.suppress(OSError, ValueError):
        inode = os.fstat(descriptor).st_ino
        for line in Path("/proc/locks").read_text().splitlines():
            fields = line.split()
            if fields[1] == "FLOCK" and int(fields[5].rpartition(":")[2]) == inode:
                return f" (process {fields[4]} of this machine)"
    return ""


def fan_out(
    session: Session, task: Callable[[dict[str, Any]], dict[str, Any]], jobs: Iterable[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Run task(job) for each job over Ray Data, one row each; yields the results as they come, in no fixed order.

    Jobs are taken in waves, so that they may be made while earlier ones run and need not fit in memory together. Jobs
    and results are JSON. An `InputError` of a task is raised here, not as Ray's.
    """
    for wave in _waves((json.dumps(job) for job in jobs), lambda: max(_WAVE, _WAVE_A_CPU * session.num_cpus())):
        yield from _fan_out(session, task, wave)


def _waves(jobs: Iterable[T], size: Callable[[], int]) -> Iterator[list[T]]:
    """Jobs by so many; size is asked for where there is a job. What Ray Data keeps of a wave ends with it."""
    waiting = iter(jobs)
    wave = list(itertools.islice(waiting, 1))
    most = size() if wave else 0
    while wave := [*wave, *itertools.islice(waiting, most - len(wave))]:
        yield wave
        wave = []
        let_go()


def _fan_out(
    session: Session, task: Callable[[dict[str, Any]], dict[str, Any]], jobs: Sequence[str]
) -> Iterator[dict[str, Any]]:
    import ray.data
    from ray.exceptions import RayError

    _quiet()
    rows = [{"job": job} for job in jobs]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # max_retries has no other way in, yet
        data = ray.data.from_items(rows, override_num_blocks=len(rows))
        data = data.map(_Run(task), max_retries=_WORKER_DEATHS, **session.pool("cpu"))
    # All tasks are handed to Ray at once, which starts one as soon as another ends. With its reservations Ray Data
    # starts a single one in the first second, and then lets each CPU wait for 0.15 s between two. Results are small.
    data.context.op_resource_reservation_enabled = False
    try:
        for row in session.rows(data):
            result = json.loads(row["result"])
            if "error" in result:
                raise InputError(result["error"])
            yield result
    except RayError as error:
        if _is_death(error):
            raise InputError(
                f"a worker died {_WORKER_DEATHS + 1} times in {task.__name__}: is memory short, or does one image kill "
                "it? What is finished is kept, the same command goes on from here"
            ) from error
        raise root_cause(error) from error


def _quiet() -> None:
    """The stages show their own progress."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)


@dataclass(frozen=True)
class _Run:
    task: Callable[[dict[str, Any]], dict[str, Any]]

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        begin = time.time()
        try:
            result = {**self.task(json.loads(row["job"])), "begin": begin, "end": time.time()}
        except InputError as error:  # as a value: Ray wraps a raised error in its own and prints it
            result = {"error": str(error)}
        except OSError as error:  # a disk or a store that fails for good
            result = {"error": f"{type(error).__name__}: {error}; the same command goes on from here"}
        return {"result": json.dumps(result)}


def root_cause(error: BaseException) -> BaseException:
    """The error that a task raised, out of the layers that Ray wraps around it."""
    cause = getattr(error, "cause", None) or error.__cause__
    return error if cause is None or cause is error else root_cause(cause)


class WorkClock:
    """Seconds from the first begin to the last end of the jobs of a fan-out."""

    def __init__(self) -> None:
        self._begin: float | None = None
        self._end = 0.0

    def add(self, result: Mapping[str, Any]) -> None:
        self._begin = min(self._begin or result["begin"], result["begin"])
        self._end = max(self._end, result["end"])

    @property
    def seconds(self) -> float:
        return 0.0 if self._begin is None else self._end - self._begin


def check_space(folder: Folder, needed_bytes: int, what: str) -> None:
    """Raises `StorageError` where a local folder has less space than a stage will need."""
    free = folder.free_bytes()
    if free is not None and free < needed_bytes:
        raise StorageError(
            f"expected {needed_bytes / 2**30:.2f} GiB of free space at {folder.uri} for {what}, found "
            f"{free / 2**30:.2f} GiB; free some or choose another --root"
        )


def provenance() -> dict[str, Any]:
    """Commit, versions and machine: recorded, never hashed."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": versions,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def encode_shards(
    session: Session,
    read: Callable[[dict[str, Any]], dict[str, Any]],
    encoder: type,
    jobs: Iterable[dict[str, Any]],
    resources: Resources,
) -> Iterator[dict[str, Any]]:
    """read(job) in CPU tasks, then encoder()(row) in actors with a GPU, one row a shard; yields what they return. Where
    there is no GPU the actors read too: they use the same CPUs, and pixels need not move between processes.

    job["name"] names the shard, in results too; job["threads"] tells an encoder how many threads it has. Rows and
    results have "error", "" where all is well. Where an encoder dies, what is left is handed out again. Jobs are taken
    in waves, each with encoders of its own: Ray Data plans all that it is given before it begins.
    """

    def size() -> int:
        return max(_WAVE, _WAVE_AN_ENCODER * _encoders(session, resources, sys.maxsize)[0])

    for wave in _waves(jobs, size):
        yield from _encode_wave(session, read, encoder, wave, resources)


def _encode_wave(
    session: Session,
    read: Callable[[dict[str, Any]], dict[str, Any]],
    encoder: type,
    jobs: Sequence[dict[str, Any]],
    resources: Resources,
) -> Iterator[dict[str, Any]]:
    from ray.exceptions import RayError

    left = {job["name"]: job for job in jobs}
    for attempt in range(_ENCODER_DEATHS + 1):
        try:
            for row in _encode_shards(session, read, encoder, list(left.values()), resources):
                if row["error"]:
                    raise InputError(row["error"])
                del left[row["name"]]
                yield row
            return
        except RayError as error:
            if attempt == _ENCODER_DEATHS or not _is_death(error):
                raise root_cause(error) from error
            print(f"an encoder died; going on with the {len(left)} shards that are left", flush=True)


def _is_death(error: BaseException) -> bool:
    """A process or node ended, which says nothing about the work."""
    from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, WorkerCrashedError

    causes = (error, getattr(error, "cause", None), error.__cause__, root_cause(error))
    return any(
        isinstance(cause, RayActorError | WorkerCrashedError | NodeDiedError | OutOfMemoryError) for cause in causes
    )


def _encode_shards(
    session: Session,
    read: Callable[[dict[str, Any]], dict[str, Any]],
    encoder: type,
    jobs: Sequence[dict[str, Any]],
    resources: Resources,
) -> Iterator[dict[str, Any]]:
    if not jobs:
        return
    session.connect()
    import ray.data

    actors, threads = _encoders(session, resources, len(jobs))
    _quiet()
    rows = [{"job": json.dumps({**job, "threads": threads})} for job in jobs]
    data = ray.data.from_items(rows, override_num_blocks=len(rows))
    # Elsewhere a node may go and its actors start again on another. Here that would only make Ray print a warning.
    options: dict[str, Any] = {"max_restarts": 0, "max_task_retries": 0} if session.alone else {}
    pool = ray.data.ActorPoolStrategy(size=actors)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the options have no other way in, yet
        if resources.use_gpu:
            # Each asks for half of the CPUs that it can use: a reader is short beside an encoder, and always finds its
            # own half, so that they cannot wait for each other.
            data = data.map(_Read(read), num_cpus=0.5, **session.pool("cpu"))
            data = data.map(encoder, num_cpus=0.5 * threads, num_gpus=1, compute=pool, **options)
        else:
            both = {"read": read, "encoder": encoder}
            together: Any = _ReadAndEncode
            options |= session.pool("cpu")
            data = data.map(together, fn_constructor_kwargs=both, num_cpus=threads, compute=pool, **options)
    yield from session.rows(data)


def _encoders(session: Session, resources: Resources, num_jobs: int) -> tuple[int, int]:
    """How many encoders there are, and threads of each: one a GPU, else some a node, with few threads each, since many
    small encoders are faster than one that has all CPUs."""
    if resources.use_gpu:
        # What a training worker has, on a node with a GPU: others may train beside it.
        each = session.check(
            num_workers=resources.num_workers, cpus_per_worker=resources.cpus_per_worker, use_gpu=True,
            min_workers=resources.min_workers,
        )  # fmt: skip
        return min(num_jobs, resources.num_workers), max(1, each // 2)
    cpus = session.cpus_of_largest_node()
    threads = max(1, cpus // _ENCODERS_PER_NODE)
    return min(num_jobs, max(1, session.num_cpus() // threads)), threads


@dataclass(frozen=True)
class _Read:
    read: Callable[[dict[str, Any]], dict[str, Any]]

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return self.read(json.loads(row["job"]))


class _ReadAndEncode:
    def __init__(self, read: Callable[[dict[str, Any]], dict[str, Any]], encoder: type) -> None:
        self._read, self._encode = read, encoder()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return self._encode(self._read(json.loads(row["job"])))
