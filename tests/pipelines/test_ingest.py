"""Every source through the shard stage: killed and faulty runs come to the same bytes, and nothing is lost."""

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from botocore.exceptions import BotoCoreError, ClientError

from cluster.session import Session
from pipelines import index
from pipelines import shard as shard_stage
from pipelines.config import Resources, ShardConfig
from pipelines.index import SourceIndex, safe_key
from pipelines.plan import make_plan
from pipelines.shard import shard
from pipelines.sources import SOURCES, AnySource
from pipelines.sources.files import SourceFile
from pipelines.stage import Pipeline
from pipelines.tracking import Tracker
from tests.faults import FaultyProxy
from tests.pipelines.data import (
    WRITERS,
    tar_of,
    write_cifar10,
    write_class_folders,
    write_frames,
    write_huggingface,
    write_imagenet,
    write_webdataset,
)
from tests.pipelines.test_cli import ROOT
from vqvae_core.artifacts import Artifact
from vqvae_core.errors import InputError
from vqvae_core.image_shards import ImageShards
from vqvae_core.images import encode
from vqvae_core.storage import Folder, StorageError

pytestmark = pytest.mark.slow
CONFIG = ShardConfig(image_size=32, images_per_shard=4, max_rejected_fraction=0.5)
LARGER_SHARDS = dataclasses.replace(CONFIG, images_per_shard=12)
GROUPS = dataclasses.replace(CONFIG, mix_images=30)  # several groups, one after the other
LIVE = {
    "vizdoom": {"maps": ("E1M3",), "train_episodes_per_map": 5, "validation_episodes_per_map": 1,
                "frames_per_episode": 30, "actions_per_frame": 1},
    "dmlab": {"levels": ("a", "b"), "train_episodes_per_level": 8, "validation_episodes_per_level": 1,
              "frames_per_episode": 40},
}  # fmt: skip
LIVE_IMAGES = {"vizdoom": (5 + 1) * 30, "dmlab": 2 * (8 + 1) * 40}
BROKEN = (3, 17, 40)
LARGE: dict[str, Callable[[Path], int]] = {
    "recorded_frames": lambda folder: write_frames(folder, size=300, broken=BROKEN),
    "imagenet": lambda folder: write_imagenet(folder, num_synsets=6, num_images=20, broken=BROKEN),
    "class_folders": lambda folder: write_class_folders(folder, num_images=60, broken=BROKEN),
    "huggingface": lambda folder: write_huggingface(folder, num_rows=60, broken=BROKEN),
    "cifar10": lambda folder: write_cifar10(folder, num_records=40, broken=BROKEN),
    "webdataset": lambda folder: write_webdataset(folder, num_tars=8, num_samples=20, broken=BROKEN),
}


def source_of(kind: str, place: Path) -> AnySource:
    if kind in LIVE:
        return SOURCES[kind](**LIVE[kind])
    if not place.exists():
        place.with_suffix(".count").write_text(str(LARGE[kind](place)))
    return SOURCES[kind](path=str(place))


def make(session: Session, root: Folder | Path, source: AnySource, config: ShardConfig = CONFIG) -> ImageShards:
    folder = Folder.of(root) if isinstance(root, Path) else root
    return shard(Pipeline(folder, Resources(), session, Tracker(folder, "t", {}, "", enabled=False)), source, config)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A stand-in for the DeepMind Lab module, for this process, for Ray's workers and for drivers that are started."""
    place = tmp_path_factory.mktemp("engine")
    shutil.copy(Path(__file__).with_name("deepmind_lab_stub.py"), place / "deepmind_lab.py")
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(place))
    patch.setenv("PYTHONPATH", str(place))
    yield
    patch.undo()
    sys.modules.pop("deepmind_lab", None)


@pytest.fixture(scope="module")
def session(engine: None) -> Iterator[Session]:
    session = Session()
    yield session
    session.close()


@pytest.fixture(scope="module")
def whole(session: Session, tmp_path_factory: pytest.TempPathFactory):
    """kind -> the shards of a run that nothing disturbed."""
    made: dict[tuple[str, ShardConfig], ImageShards] = {}
    place = tmp_path_factory.mktemp("whole")

    def get(kind: str, config: ShardConfig = CONFIG) -> ImageShards:
        if (kind, config) not in made:
            made[kind, config] = make(session, place / f"{kind}-root", source_of(kind, place / kind), config)
        return made[kind, config]

    get.place = place  # type: ignore[attr-defined]
    return get


def descendants(pid: int) -> list[int]:
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return [found for child in children for found in (child, *descendants(child))]


def sidecars(root: Folder, store: Any = None) -> dict[str, Any]:
    """The sidecars of the shard stage in a root by name, with the time of their last change; written while it runs.
    store: a client of a bucket's server itself, without faults."""
    if root.is_local:
        found = {}
        for path in Path(root.uri).glob("shard-*/sidecars/*.json"):
            with contextlib.suppress(FileNotFoundError):
                found[str(path)] = path.stat().st_mtime_ns
        return found
    bucket, _, prefix = root.uri.removeprefix("s3://").partition("/")
    try:
        answer = store.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/shard-").get("Contents", [])
    except (ClientError, BotoCoreError):  # the server at its limit
        return {}
    names = {item["Key"]: item["LastModified"] for item in answer}
    return {name: time for name, time in names.items() if "/sidecars/" in name and "/staging/" not in name}


def kill_driver(
    root: Folder, kind: str, place: str, log: Path, config: ShardConfig = CONFIG, store: Any = None
) -> dict[str, Any]:
    """Start the shard stage as a program, and SIGKILL it when some shards are done. Returns their sidecars."""
    command = [sys.executable, str(ROOT / "pipelines" / "shard.py"), "--preset", "smoke", "--root", root.uri,
               "--no-track", "--source-kind", kind, "--shard.images-per-shard", str(config.images_per_shard),
               "--shard.mix-images", str(config.mix_images), "--shard.max-rejected-fraction", "0.5"]  # fmt: skip
    options: dict = LIVE.get(kind, {})
    for name, value in options.items():
        values = value if isinstance(value, tuple) else (value,)
        command += [f"--data.{name.replace('_', '-')}", *map(str, values)]
    if kind not in LIVE:
        command += ["--source", place]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        begin = time.monotonic()
        while len(sidecars(root, store)) < 2 and process.poll() is None:
            assert time.monotonic() - begin < 200
            time.sleep(0.002 if root.is_local else 0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
    return sidecars(root, store)


class WorkerKiller:
    """Kills two of this process's Ray workers while they make shards, some of which are done; a context manager.

    done: how many shards were done when the first was killed."""

    def __init__(self, root: Folder, store: Any = None) -> None:
        self._root, self._store = root, store
        self._before = set(sidecars(root, store))

    def __enter__(self) -> "WorkerKiller":
        self.killed: list[int] = []
        self.done = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._kill)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _kill(self) -> None:
        while len(self.killed) < 2 and not self._stop.wait(0.005):
            found = sidecars(self._root, self._store)
            if not set(found) - self._before:
                continue
            for pid in descendants(os.getpid()):
                with contextlib.suppress(OSError):
                    name = Path(f"/proc/{pid}/cmdline").read_text()
                    if name.startswith("ray::") and "_Run" in name and pid not in self.killed:
                        os.kill(pid, signal.SIGKILL)
                        self.done = self.done or len(found)
                        self.killed.append(pid)
                        break


def until_in_the_middle(attempt: Callable[[Path], bool], place: Path) -> Path:
    """The root of the first attempt in which the kill fell into the middle of the work, which on some machines is over
    in an instant."""
    for number in range(5):
        root = place / f"root{number}"
        if attempt(root):
            return root
    pytest.fail("it was over each time before it could be killed")


def num_shards(images: ImageShards) -> int:
    return len(images.shards("train")) + len(images.shards("validation"))


KILLED = [*((kind, CONFIG) for kind in SOURCES), ("recorded_frames", GROUPS), ("imagenet", GROUPS)]
KILLED_NAMES = [f"{kind}{'-in-groups' if config is GROUPS else ''}" for kind, config in KILLED]


def some(names: set[str]) -> list[Any]:
    """All that may be killed; those of other names are exhaustive."""
    return [
        pytest.param(*one, id=name, marks=() if name in names else pytest.mark.exhaustive)
        for one, name in zip(KILLED, KILLED_NAMES, strict=True)
    ]


@pytest.mark.parametrize(("kind", "config"), some({"vizdoom", "imagenet-in-groups"}))
def test_a_killed_driver_comes_to_the_same_bytes(
    session: Session, whole, tmp_path: Path, kind: str, config: ShardConfig
) -> None:
    expected = whole(kind, config)
    finished: dict[str, Any] = {}

    def attempt(root: Path) -> bool:
        finished.clear()
        finished.update(kill_driver(Folder.of(root), kind, str(whole.place / kind), tmp_path / "log", config))
        assert finished, (tmp_path / "log").read_text()
        return len(finished) < num_shards(expected)

    root = until_in_the_middle(attempt, tmp_path)
    made = make(session, root, source_of(kind, whole.place / kind), config)
    assert [place.name for place in root.glob("shard-*")] == [expected.artifact.folder.name]
    assert made.artifact.files == expected.artifact.files
    now = sidecars(Folder.of(root))
    assert len(now) == num_shards(expected)
    assert {path: now[path] for path in finished} == finished, "a finished shard was made again"
    assert not list(root.rglob(".*.tmp"))


@pytest.mark.parametrize(("kind", "config"), some({"imagenet", "recorded_frames-in-groups"}))
def test_a_killed_worker_comes_to_the_same_bytes(
    session: Session, whole, tmp_path: Path, kind: str, config: ShardConfig
) -> None:
    expected = whole(kind, config)
    files = []

    def attempt(root: Path) -> bool:
        with WorkerKiller(Folder.of(root)) as killer:
            files[:] = [make(session, root, source_of(kind, whole.place / kind), config).artifact.files]
        return 0 < killer.done < num_shards(expected)

    until_in_the_middle(attempt, tmp_path)
    assert files == [expected.artifact.files]


def test_groups_hold_the_same_images_as_one(whole) -> None:
    def keys(config: ShardConfig) -> list[str]:
        images = whole("imagenet", config)
        return sorted(s.key for path in images.shards("train") for s in images.read(path))

    assert make_plan(SourceIndex(index_beside(whole("imagenet", GROUPS))).counts(), GROUPS).num_groups == 5
    assert keys(GROUPS) == keys(CONFIG)


@pytest.mark.parametrize("kind", SOURCES)
def test_what_goes_in_comes_out_or_is_listed(whole, kind: str) -> None:
    """By key: the index's keys are those of samples and rejects together, each once; as many as were written."""
    images = whole(kind)
    found = SourceIndex(index_beside(images))
    expected = []
    runs = found.runs(range(len(found.counts())))
    for row in found.entries(np.arange(len(found.counts()))).table.to_pylist():
        expected.append(safe_key(runs[row["run"]].prefix, os.fsdecode(row["name"])))
    keys = [s.key for split in ("train", "validation") for path in images.shards(split) for s in images.read(path)]
    rejects = pq.read_table(images.artifact.folder.path("rejects.parquet"))["key"].to_pylist()
    assert sorted(keys + rejects) == sorted(expected)
    written = LIVE_IMAGES[kind] if kind in LIVE else int((whole.place / f"{kind}.count").read_text())
    assert len(set(expected)) == len(expected) == images.artifact.facts["source_images"] == written
    assert len(rejects) == sum(images.artifact.facts["rejects"].values()) == (0 if kind in LIVE else len(BROKEN))


def index_beside(images: ImageShards) -> Artifact:
    """The index beside some shards."""
    root = Path(images.artifact.folder.uri).parent
    return Artifact.open(Folder.of(next(root.glob("index-*"))))


NOISE = np.random.default_rng(0).integers(0, 256, (120, 128, 128, 3), dtype=np.uint8)  # as large as its pixels


def write_noise(kind: str, folder: Path) -> None:
    pictures = [encode(picture, "png") for picture in NOISE]
    if kind == "imagenet":
        write_imagenet(folder)
        inner = [
            (f"n{n}.tar", tar_of([(f"n{n}_{i}.JPEG", data) for i, data in enumerate(pictures[n::2])])) for n in (0, 1)
        ]
        (folder / "ILSVRC2012_img_train.tar").write_bytes(tar_of(inner))
    elif kind == "webdataset":
        folder.mkdir()
        members = [(f"{n}.{e}", data) for n, png in enumerate(pictures) for e, data in (("cls", b"1"), ("png", png))]
        (folder / "0.tar").write_bytes(tar_of(members))
    elif kind == "class_folders":
        for number, data in enumerate(pictures):
            (folder / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
            (folder / "ab"[number % 2] / f"{number}.png").write_bytes(data)
    elif kind in ("recorded_frames", "huggingface"):
        folder.mkdir()
        rows = [{"image": {"bytes": data, "path": ""}, "level": "a", "episode": number, "step": 0, "label": 0}
                for number, data in enumerate(pictures)]  # fmt: skip
        pq.write_table(pa.Table.from_pylist(rows), folder / "0.parquet", row_group_size=60)
    else:
        LARGE[kind](folder)


def bytes_read(source: AnySource, place: Path) -> float:
    """How often the files of a source below a place are read to make its shards, index included, in this process."""
    num_bytes = 0
    read_at = SourceFile.read_at

    def counted(self: SourceFile, offset: int, size: int) -> bytes:
        nonlocal num_bytes
        data = read_at(self, offset, size)
        num_bytes += len(data) if self.place.startswith(str(place / "s")) else 0
        return data

    def here(session, task, jobs):
        return (task(job) | {"begin": 0.0, "end": 0.0} for job in jobs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SourceFile, "read_at", counted)
        patch.setattr(index, "fan_out", here)
        patch.setattr(shard_stage, "fan_out", here)
        patch.setattr(Session, "check", lambda self, **_: 1)
        make(Session(), place / "root", source, dataclasses.replace(CONFIG, images_per_shard=50))
    return num_bytes / sum(path.stat().st_size for path in (place / "s").rglob("*") if path.is_file())


@pytest.mark.parametrize("kind", WRITERS)
def test_a_source_is_read_about_once(tmp_path: Path, kind: str) -> None:
    """Index and images together read at most 1.1 times the source."""
    write_noise(kind, tmp_path / "s")
    assert 0.9 < bytes_read(SOURCES[kind](path=str(tmp_path / "s")), tmp_path) <= 1.1


def test_a_source_of_small_images_is_read_about_once(tmp_path: Path) -> None:
    """Headers too: without labels, nothing but the tar's own blocks stands between the pictures."""
    (tmp_path / "s").mkdir()
    pictures = [(f"{number}.jpg", encode(NOISE[number % 100, :24, :24], "jpg")) for number in range(400)]
    (tmp_path / "s" / "0.tar").write_bytes(tar_of(pictures))
    assert bytes_read(SOURCES["webdataset"](path=str(tmp_path / "s")), tmp_path) <= 1.1


@pytest.fixture(scope="module")
def faulty(s3_bucket: str, session: Session, whole) -> Iterator[tuple[str, FaultyProxy, Session, Any]]:
    """A bucket behind a server that fails now and then, a new session whose workers see it, and a client of the server
    itself."""
    store = boto3.client("s3")
    host, _, port = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://").partition(":")
    for kind in SOURCES:
        whole(kind, LARGER_SHARDS)
    session.close()
    proxy = FaultyProxy(host, int(port), period=20, slow="/sidecars/", pause=0.15)
    patch, again = pytest.MonkeyPatch(), Session()
    patch.setenv("AWS_ENDPOINT_URL", proxy.url)
    yield s3_bucket, proxy, again, store
    again.close()
    patch.undo()
    proxy.stop()


def uploaded(kind: str, place: Path, to: Folder) -> AnySource:
    """A source that lies in a bucket; an engine lies nowhere."""
    if kind in LIVE:
        return source_of(kind, place)
    for path in sorted(place.rglob("*")):
        if path.is_file():
            to.write(path.relative_to(place).as_posix(), path.read_bytes())
    return SOURCES[kind](path=to.uri)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=() if kind in ("imagenet", "huggingface") else pytest.mark.exhaustive)
        for kind in SOURCES
    ],
)
def test_from_and_to_a_store_that_fails(whole, faulty, tmp_path: Path, kind: str) -> None:
    """With the driver killed, and with workers killed when it goes on: the same hashes and fingerprint as on disk."""
    bucket, proxy, session, store = faulty
    place = Folder.of(f"{bucket}/{kind}")
    source = uploaded(kind, whole.place / kind, place / "source")
    before = dict(proxy.counts)
    expected, root = whole(kind, LARGER_SHARDS), place / "root"
    log = tmp_path / "log"
    finished = kill_driver(root, kind, (place / "source").uri, log, LARGER_SHARDS, store)
    assert 0 < len(finished) < num_shards(expected), log.read_text()
    with WorkerKiller(root, store) as killer:
        made = make(session, root, source, LARGER_SHARDS)
    assert 0 < killer.done < num_shards(expected), "no worker was killed"
    assert made.artifact.files == expected.artifact.files
    assert made.artifact.manifest.fingerprint == expected.artifact.manifest.fingerprint
    now = sidecars(root, store)
    assert {name: now[name] for name in finished} == finished, "a finished shard was made again"
    assert all(proxy.counts[fault] > before[fault] for fault in before), "not every fault came up"
    for path in made.shards("train"):
        made.read(path)


@pytest.mark.parametrize("kind", ["huggingface", "class_folders"])
def test_a_full_disk_is_said_and_the_same_command_goes_on(
    session: Session, small_disk: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise needs twice what it takes: first the check of the space says so, then, without it, the write itself."""
    place = tmp_path / "source"
    write_noise(kind, place)
    config = dataclasses.replace(CONFIG, image_size=64, images_per_shard=10)
    source = SOURCES[kind](path=str(place))
    root = small_disk / "root"
    (small_disk / "ballast").write_bytes(bytes(400_000))
    with pytest.raises(StorageError, match="expected .* GiB of free space at .* found .* GiB; free some or choose"):
        make(session, root, source, config)
    with monkeypatch.context() as unchecked:
        unchecked.setattr(shard_stage, "check_space", lambda *_: None)
        with pytest.raises(InputError, match="no space left in .*: .* more bytes were needed; free some space and run"):
            make(session, root, source, config)
    assert not list(root.glob("shard-*/manifest.json"))
    done = {path: path.stat().st_mtime_ns for path in root.glob("shard-*/sidecars/*.json")}
    # Of Parquet nothing is: its images are staged in one file, which does not fit.
    assert done or kind == "huggingface", "nothing was finished before the disk was full"
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    made = make(session, root, source, config)
    assert {path: path.stat().st_mtime_ns for path in done} == done, "a finished shard was made again"
    assert made.num_images("train") + made.num_images("validation") == len(NOISE)
    assert made.artifact.files == make(session, tmp_path / "other", source, config).artifact.files
