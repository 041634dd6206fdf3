from pathlib import Path

import numpy as np
import pytest

from pipelines.sources import ImageNetSource, RecordedFramesSource, ViZDoomSource
from pipelines.sources.base import SourceError
from tests.pipelines.data import frame, write_frames, write_imagenet
from vqvae_core.images import decode


def test_recorded_frames(tmp_path: Path) -> None:
    write_frames(tmp_path)
    source = RecordedFramesSource(path=str(tmp_path))
    source.check()
    index = source.index()
    assert index.num_images == 72
    assert index.validation.sum() == 24
    assert index.label_map == {"cave": 0, "tower": 1}
    items = [item for run in index.runs for item in source.read(run)]
    assert len({item.key for item in items}) == 72
    assert all(np.array_equal(decode(item.image), frame(100 * item.facts["episode"] + item.facts["step"]))
               for item in items)  # fmt: skip
    run = index.runs[1]
    assert [item.key for item in source.read(run, [2, 5])] == [list(source.read(run))[n].key for n in (2, 5)]


def test_an_episode_is_in_one_split(tmp_path: Path) -> None:
    write_frames(tmp_path, validation=False)
    source = RecordedFramesSource(path=str(tmp_path), validation_fraction=0.4)
    index = source.index()
    items = [item for run in index.runs for item in source.read(run)]
    splits: dict[int, set[bool]] = {}
    for item, validation in zip(items, index.validation, strict=True):
        splits.setdefault(item.facts["episode"], set()).add(bool(validation))
    assert all(len(found) == 1 for found in splits.values())
    assert set().union(*splits.values()) == {True, False}


def test_identity_is_content_not_place(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_frames(tmp_path / name)
    one, other = (RecordedFramesSource(path=str(tmp_path / name)).identity() for name in ("a", "b"))
    assert one == other
    assert str(tmp_path) not in str(one)


def test_imagenet(tmp_path: Path) -> None:
    write_imagenet(tmp_path)
    source = ImageNetSource(path=str(tmp_path))
    source.check()
    index = source.index()
    assert (index.num_images, int(index.validation.sum())) == (17, 5)
    assert index.label_map == {"n00000000": 0, "n00000001": 1, "n00000002": 2}
    items = list(source.read(index.runs[1]))
    assert [item.key for item in items] == [f"n00000001_{n}" for n in range(4)]
    assert [decode(item.image).shape for item in items] == [(24 + 8 * n,) * 2 + (3,) for n in range(4)]
    validation = list(source.read(index.runs[-1], [0, 3]))
    assert [(item.key[-1], item.level) for item in validation] == [("1", "n00000001"), ("4", "n00000002")]


@pytest.mark.shared_data
def test_the_real_archives(shared_data: Path) -> None:
    index = ImageNetSource(path=str(shared_data / "imagenet")).index()
    assert (index.num_images, int(index.validation.sum()), len(index.label_map)) == (600, 100, 600)


@pytest.mark.shared_data
def test_the_real_frames(shared_data: Path) -> None:
    index = RecordedFramesSource(path=str(shared_data / "dmlab")).index()
    assert (index.num_images, int(index.validation.sum()), len(index.label_map)) == (16410 + 3283, 3283, 32)


@pytest.mark.parametrize("kind", [RecordedFramesSource, ImageNetSource])
def test_a_source_that_is_not_there(tmp_path: Path, kind: type) -> None:
    with pytest.raises(SourceError, match="none was given; name it with --source PATH"):
        kind().check()
    with pytest.raises(SourceError, match="found no such folder"):
        kind(path=str(tmp_path / "nothing")).check()
    with pytest.raises(SourceError, match="found no .* there"):
        kind(path=str(tmp_path)).check()


def test_files_that_are_something_else(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"text")
    with pytest.raises(SourceError, match="expected a Parquet file at .*x.parquet, it cannot be read"):
        RecordedFramesSource(path=str(tmp_path)).check()
    write_imagenet(tmp_path)
    (tmp_path / "val_synsets.txt").write_text("n1\n")
    with pytest.raises(SourceError, match="found 5 pictures in ILSVRC2012_img_val.tar and 1 lines"):
        ImageNetSource(path=str(tmp_path)).index()


@pytest.mark.parametrize("cut", [0.3, 0.7])
def test_a_cut_archive(tmp_path: Path, cut: float) -> None:
    write_imagenet(tmp_path)
    path = tmp_path / "ILSVRC2012_img_train.tar"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * cut)])
    with pytest.raises(SourceError, match="expected a complete tar at ILSVRC2012_img_train.tar"):
        ImageNetSource(path=str(tmp_path)).index()


@pytest.mark.slow
def test_an_episode_is_a_function_of_its_seed() -> None:
    source = ViZDoomSource(maps=("E1M3",), train_episodes_per_map=2, frames_per_episode=12)
    one, other, validation = source.index().runs
    frames = [item.image for item in source.read(one)]
    assert all(np.array_equal(a, b.image) for a, b in zip(frames, source.read(one), strict=True))
    assert not all(np.array_equal(a, b.image) for a, b in zip(frames, source.read(other), strict=True))
    assert {picture.shape for picture in frames} == {(240, 320, 3)}
    assert np.mean([picture.std() for picture in frames]) > 15, "it stares at walls"
    assert len({picture.tobytes() for picture in frames}) == 12, "it stands still"
    assert validation.name == "E1M3/000002"
