"""The shard stage on small sources: its plan, its rejects, its output."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cluster.session import Session
from pipelines import stage
from pipelines.config import Resources, ShardConfig
from pipelines.shard import RejectedError, shard
from pipelines.sources import AnySource, ImageNetSource, RecordedFramesSource
from pipelines.sources.base import SourceError
from pipelines.stage import Pipeline, check_space, fan_out
from pipelines.tracking import Tracker
from tests.pipelines.data import write_frames, write_imagenet
from vqvae_core.artifacts import hash_bytes
from vqvae_core.errors import InputError
from vqvae_core.image_shards import ImageShards
from vqvae_core.storage import Folder, StorageError


def test_too_little_disk(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"expected 1048576.00 GiB of free space at .* for it, found"):
        check_space(Folder.of(tmp_path / "not" / "yet"), 2**50, "it")


@pytest.fixture(scope="module")
def session():
    session = Session()
    yield session
    session.close()


def run(session: Session, root: Path, source: AnySource, config: ShardConfig) -> ImageShards:
    folder = Folder.of(root)
    return shard(Pipeline(folder, Resources(), session, Tracker(folder, "t", {}, "", enabled=False)), source, config)


SMALL = ShardConfig(image_size=16, images_per_shard=20, resize="exact")


def contents(images: ImageShards) -> str:
    """A hash of all keys, facts and pixels, in order: the same for every version of the encoders."""
    parts = [
        f"{path} {sample.key} {sorted(sample.facts.items())} {hash_bytes(sample.pixels().tobytes())}"
        for split in ("train", "validation")
        for path in images.shards(split)
        for sample in images.read(path)
    ]
    return hash_bytes("\n".join(parts).encode())


@pytest.mark.slow
def test_recorded_frames_become_shards(session: Session, tmp_path: Path) -> None:
    write_frames(tmp_path / "frames")
    images = run(session, tmp_path / "root", RecordedFramesSource(path=str(tmp_path / "frames")), SMALL)
    assert [images.artifact.files[path].rows for path in images.shards("train")] == [20, 20, 8]
    assert images.num_images("validation") == 24
    assert not (Path(images.artifact.folder.uri) / "staging").exists()
    golden = "1ceb634832b3"
    assert contents(images)[:12] == golden, "the stage's output changed: raise its VERSION, then this hash"


@pytest.mark.slow
def test_the_same_frames_elsewhere_are_the_same_artifact(session: Session, tmp_path: Path) -> None:
    made = []
    for place in ("a", "b"):
        write_frames(tmp_path / place / "frames")
        source = RecordedFramesSource(path=str(tmp_path / place / "frames"))
        made.append(run(session, tmp_path / place / "root", source, SMALL).artifact)
    assert made[0].manifest.fingerprint == made[1].manifest.fingerprint
    assert made[0].files == made[1].files


@pytest.mark.slow
def test_broken_images_are_counted_and_their_neighbours_kept(session: Session, tmp_path: Path) -> None:
    write_frames(tmp_path / "frames", broken=(3, 17))
    source = RecordedFramesSource(path=str(tmp_path / "frames"))
    config = ShardConfig(image_size=16, images_per_shard=20, max_rejected_fraction=0.05)
    images = run(session, tmp_path / "root", source, config)
    assert images.num_images("train") + images.num_images("validation") == 70
    assert sum(images.artifact.facts["rejects"].values()) == 2
    rejects = pq.read_table(images.artifact.folder.path("rejects.parquet")).to_pylist()
    assert sorted(reject["key"] for reject in rejects) == ["cave-1-000003", "cave-2-000005"]
    assert all(reject["reason"].startswith("cannot be decoded") for reject in rejects)


@pytest.mark.slow
def test_too_many_rejects_stop_the_stage(session: Session, tmp_path: Path) -> None:
    write_frames(tmp_path / "frames", size=24)
    source = RecordedFramesSource(path=str(tmp_path / "frames"))
    with pytest.raises(
        RejectedError, match=r"expected at most 0 rejected images of 72 .* wrong size: is 24 x 24, expected 16 x 16"
    ):
        run(session, tmp_path / "root", source, SMALL)
    assert not list((tmp_path / "root").glob("shard-*/manifest.json"))


@pytest.mark.slow
def test_imagenet_archives_become_shards(session: Session, tmp_path: Path) -> None:
    write_imagenet(tmp_path / "archives")
    config = ShardConfig(image_size=16, images_per_shard=5, image_format="jpg")
    images = run(session, tmp_path / "root", ImageNetSource(path=str(tmp_path / "archives")), config)
    assert [images.artifact.files[path].rows for path in images.shards("train")] == [5, 5, 2]
    samples = [sample for path in images.shards("train") for sample in images.read(path)]
    assert sorted(sample.key for sample in samples) == [f"n{s:08d}_{n}" for s in range(3) for n in range(4)]
    assert all(images.label_map[sample.key.split("_")[0]] == sample.label for sample in samples)


@pytest.mark.slow
def test_the_error_of_a_task_is_raised_as_itself(session: Session) -> None:
    with pytest.raises(InputError, match="^expected a task that works$"):
        list(fan_out(session, fail, [{}]))


def fail(job: dict) -> dict:
    raise SourceError("expected a task that works")


@pytest.mark.slow
def test_an_empty_source(session: Session, tmp_path: Path) -> None:
    write_frames(tmp_path / "frames")
    (tmp_path / "frames" / "train.parquet").unlink()
    source = RecordedFramesSource(path=str(tmp_path / "frames"), validation_fraction=0.999999)
    with pytest.raises(
        SourceError, match="expected images to train on, the source has 24 images and none in the train"
    ):
        run(session, tmp_path / "root", source, SMALL)


def die(job: dict) -> dict:
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)
    return {}


@pytest.mark.slow
def test_a_task_that_kills_its_worker_ends(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "_WORKER_DEATHS", 1)
    with pytest.raises(InputError, match="a worker died 2 times in die: is memory short, .* the same command goes on"):
        list(fan_out(session, die, [{}]))
