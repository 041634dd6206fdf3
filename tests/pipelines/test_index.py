"""The index: one entry an image, small in memory, with a key of its own for each."""

from pathlib import Path

import numpy as np
import pytest

from cluster.session import Session
from pipelines import index
from pipelines.config import ShardConfig
from pipelines.index import SourceIndex, index_parts, safe_key, source_to_json
from pipelines.plan import make_plan
from pipelines.prepare import key_of
from pipelines.shard import _Group
from pipelines.sources import AnySource, ClassFoldersSource, ImageNetSource, WebDatasetSource
from pipelines.sources.base import Entry, Part, Run, RunIndex
from pipelines.sources.files import forget_files
from pipelines.stage import Workspace
from tests.pipelines.data import write_class_folders, write_imagenet, write_webdataset
from vqvae_core.artifacts import Artifact, FileEntry, commit
from vqvae_core.storage import Folder


@pytest.mark.parametrize(
    ("prefix", "name", "key"),
    [
        ("", "n01440764_1.JPEG", "n01440764_1"),
        ("n01440764", "n01440764_1.JPEG", "n01440764_1"),
        ("cat", "photo 1.png", "cat_photo_1"),
        ("", "a/../b.png", "a____b"),
        ("", "many.dots.jpg", "many_dots"),
        ("", "no_extension.5", "no_extension_5"),
        ("", "ä b", "__b"),
        ("", "x" * 300 + ".png", "x" * 90),
    ],
)
def test_keys_are_no_paths(prefix: str, name: str, key: str) -> None:
    assert safe_key(prefix, name) == key


def test_a_renamed_key_is_a_function_of_its_place() -> None:
    run, entry = Run(name="r"), Entry(position=3, name="k" * 200)
    assert key_of(run, entry, renamed=False) == "k" * 90
    other = key_of(run, entry, renamed=True)
    assert other == key_of(run, entry, renamed=True)
    assert len(other) == 90
    assert other != key_of(run, Entry(position=4, name="k" * 200), renamed=True)


def built(source: AnySource, place: Path, monkeypatch: pytest.MonkeyPatch) -> SourceIndex:
    """An index made in this process, without a pipeline."""

    class Pipeline:
        session = Session()

    monkeypatch.setattr(index, "fan_out", lambda _, task, jobs: (task(job) | {"begin": 0, "end": 0} for job in jobs))
    folder = Folder.of(place)
    made = index._build(Pipeline(), source, Workspace(folder, "work"))  # type: ignore[arg-type]
    artifact = commit(folder, kind=index.KIND, stage="index", stage_version=1, fingerprint="f", recipe={}, inputs={},
                      files=made.files, facts=made.facts, provenance={})  # fmt: skip
    return SourceIndex(artifact)


def test_entries_are_those_of_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_imagenet(tmp_path / "s", num_synsets=70)  # more parts than one file has
    source = ImageNetSource(path=str(tmp_path / "s"))
    made = built(source, tmp_path / "i", monkeypatch)
    runs = [run for part in source.parts() for run in source.index(part, made.spool)]
    assert made.counts().tolist() == [[len(run.entries), 0] for run in runs[:-1]] + [[0, 5]]
    some = np.array([1, 33, 70])
    rows = made.entries(some).table.to_pylist()
    expected = [(number, entry) for number in some for entry in runs[number].entries]
    assert [(row["run"], row["position"], row["name"].decode(), row["level"], row["offset"], row["num_bytes"])
            for row in rows] == [(number, e.position, e.name, e.level, e.offset, e.num_bytes)
                                 for number, e in expected]  # fmt: skip
    assert made.runs([33, 1]) == {number: runs[number].run for number in (1, 33)}


@pytest.mark.slow
def test_an_image_costs_at_most_64_bytes_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With names and sizes as ImageNet's are."""

    class Large:
        def parts(self) -> list[Part]:
            return [Part(name=f"n{number:08d}") for number in range(100)]

        def index(self, part: Part, spool: Folder):
            names = [f"{part.name}_{number:05d}.JPEG" for number in range(1000)]
            entries = [
                Entry(position=number, name=name, level=part.name, offset=2**37 + number, num_bytes=110_000)
                for number, name in enumerate(names)
            ]
            yield RunIndex(run=Run(name=part.name), entries=entries)

        def labels(self, levels: set[str]) -> dict[str, int]:
            return {level: label for label, level in enumerate(sorted(levels))}

    monkeypatch.setattr(index, "source_to_json", lambda source: {})
    monkeypatch.setattr(index, "source_from_json", lambda values: Large())
    made = built(Large(), tmp_path, monkeypatch)  # type: ignore[arg-type]
    entries = made.entries(np.arange(100))
    assert entries.table.num_rows == 100_000
    assert entries.num_bytes_in_memory / 100_000 <= 64
    group = _Group.load(made, make_plan(made.counts(), ShardConfig()), 0)  # what the driver holds of it
    arrays = (group.shard, group.place, *group.order)
    assert (group.entries.num_bytes_in_memory + sum(array.nbytes for array in arrays)) / 100_000 <= 64


@pytest.mark.parametrize("at_once", [1 << 26, 7])
def test_keys_are_compared_in_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    write_webdataset(tmp_path / "s", num_tars=2)
    for number in (2, 3):
        (tmp_path / "s" / f"shard-{number:04d}.tar").write_bytes((tmp_path / "s" / "shard-0001.tar").read_bytes())
    monkeypatch.setattr(index, "_HASHES_AT_ONCE", at_once)
    made = built(WebDatasetSource(path=str(tmp_path / "s")), tmp_path / "i", monkeypatch)
    renamed = made.entries(np.arange(4)).table["renamed"].to_numpy()
    assert renamed.tolist() == [False] * 16 + [True] * 16
    assert made.artifact.facts["renamed"] == 16
    assert made.entries(np.array([1, 3])).table["renamed"].to_numpy().tolist() == [False] * 8 + [True] * 8


def test_keys_of_a_very_large_source_all_carry_a_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_webdataset(tmp_path / "s", num_tars=2)
    monkeypatch.setattr(index, "_MOST_COMPARED", 10)
    made = built(WebDatasetSource(path=str(tmp_path / "s")), tmp_path / "i", monkeypatch)
    assert made.artifact.facts["renamed"] == 16
    assert made.entries(np.arange(2)).table["renamed"].to_numpy().all()


def test_a_finished_part_is_not_indexed_again(tmp_path: Path) -> None:
    write_imagenet(tmp_path / "s")
    source = ImageNetSource(path=str(tmp_path / "s"))
    job = {"folder": str(tmp_path / "i"), "work": "w", "name": "index-000000", "source": source_to_json(source),
           "parts": [{"name": part.name, "locator": part.locator} for part in source.parts()]}  # fmt: skip
    first = index_parts(job)
    (tmp_path / "s" / "ILSVRC2012_img_train.tar").unlink()
    assert index_parts(job) == first
    assert FileEntry(**first["file"]).rows == 17


@pytest.mark.parametrize("comes", [False, True])
def test_an_index_begun_before_a_folder_without_images_came_or_went(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, comes: bool
) -> None:
    """It is in no fingerprint, but moves the parts behind it from one file of the index to another."""
    monkeypatch.setattr(index, "_PARTS_PER_FILE", 2)
    write_class_folders(tmp_path / "s", splits=("b", "c"))
    before, after = (tmp_path / "away", tmp_path / "s" / "a") if comes else (tmp_path / "s" / "a", tmp_path / "away")
    before.mkdir()
    (before / "notes.txt").write_text("x")
    made = built(ClassFoldersSource(path=str(tmp_path / "s")), tmp_path / "i", monkeypatch)
    identity = ClassFoldersSource(path=str(tmp_path / "s")).identity()
    before.rename(after)
    forget_files()
    assert ClassFoldersSource(path=str(tmp_path / "s")).identity() == identity
    for name in ("manifest.json", "sidecars/index-000001.json"):  # killed before it was done
        (tmp_path / "i" / name).unlink()
    made = built(ClassFoldersSource(path=str(tmp_path / "s")), tmp_path / "i", monkeypatch)
    fresh = built(ClassFoldersSource(path=str(tmp_path / "s")), tmp_path / "fresh", monkeypatch)
    assert made.artifact.files == fresh.artifact.files
    assert made.artifact.facts["images"] == fresh.artifact.facts["images"]


def test_the_artifact_names_what_was_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines.sources import Cifar10Source
    from tests.pipelines.data import write_cifar10

    write_cifar10(tmp_path / "s")
    made = built(Cifar10Source(path=str(tmp_path / "s")), tmp_path / "i", monkeypatch)
    artifact = Artifact.open(made.artifact.folder)
    assert sum(path.startswith("spool/") for path in artifact.files) == 6
    artifact.check_files()
