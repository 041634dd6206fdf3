"""verify names each planted fault, and is content with what stages make."""

import dataclasses
import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.session import Session
from pipelines import verify
from tests.pipelines.data import frame
from vqvae_core import image_shards, token_shards
from vqvae_core.artifacts import FILES, MANIFEST, Artifact, ArtifactError, FileEntry, FileTable, commit, hash_bytes
from vqvae_core.image_shards import Sample, write_tar
from vqvae_core.images import encode
from vqvae_core.storage import Folder
from vqvae_core.token_shards import TokenShape, write_parquet

SHAPE = TokenShape(height=2, width=2, num_groups=1, num_codes=8)
SPLITS = {"train": {"shards": 2, "images": 10}, "validation": {"shards": 1, "images": 4}}


def sample(number: int, **changes) -> Sample:
    facts = {"label": number % 2, "level": "ab"[number % 2]}
    values = {"key": f"k{number}", "image_format": "png", "data": encode(frame(number), "png"), "facts": facts}
    return Sample(**{**values, **changes})


def shard(numbers: range, **changes) -> bytes:
    return write_tar(sample(number, **(changes if number == numbers[0] else {})) for number in numbers)


def tokens(numbers: range, model: str = "m" * 64) -> bytes:
    values = np.array(numbers)[:, None, None, None] % 8 * np.ones((1, 2, 2, 1), int)
    return write_parquet([f"k{number}" for number in numbers], [0] * len(numbers), values, SHAPE, model)


STRETCHES = {"train-000000": range(6), "train-000001": range(6, 10), "validation-000000": range(10, 14)}


def put(folder: Folder, kind: str, files: dict[str, tuple[bytes, int]], facts: dict) -> Artifact:
    for name, (data, _) in files.items():
        folder.write(name, data)
    entries = [FileEntry.of(name, data, rows=rows) for name, (data, rows) in files.items()]
    return commit(folder, kind=kind, stage="s", stage_version=1, fingerprint="f", recipe={}, inputs={}, files=entries,
                  facts=facts, provenance={})  # fmt: skip


def images_artifact(place: Path, **shards: bytes) -> Artifact:
    made = {name: shards.get(name.replace("-", "_"), shard(numbers)) for name, numbers in STRETCHES.items()}
    files = {f"{name}.tar": (data, len(STRETCHES[name])) for name, data in made.items()}
    files["rejects.parquet"] = (parquet([{"key": "x"}]), 1)
    facts = {"size": 16, "image_format": "png", "splits": SPLITS, "label_map": {"a": 0, "b": 1}, "source_images": 15,
             "rejects": {"broken": 1}}  # fmt: skip
    return put(Folder.of(place), image_shards.KIND, files, facts)


def tokens_artifact(place: Path, **shards: bytes) -> Artifact:
    made = {name: shards.get(name.replace("-", "_"), tokens(numbers)) for name, numbers in STRETCHES.items()}
    files = {f"{name}.parquet": (data, len(STRETCHES[name])) for name, data in made.items()}
    facts = {"shape": {"H": 2, "W": 2, "G": 1, "K": 8}, "model": "m" * 64, "splits": SPLITS, "label_map": {"a": 0}}
    return put(Folder.of(place), token_shards.KIND, files, facts)


def parquet(rows: list[dict]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "fan_out", lambda session, task, jobs: (task(job) for job in jobs))


def faults(artifact: Artifact) -> list[str]:
    return verify.verify(Session(), Artifact.open(artifact.folder))


def flip(place: Path, name: str) -> None:
    data = bytearray((place / name).read_bytes())
    data[len(data) // 3] ^= 1
    (place / name).write_bytes(data)


def swap(place: Path, one: str, other: str) -> None:
    first, second = (place / one).read_bytes(), (place / other).read_bytes()
    (place / one).write_bytes(second)
    (place / other).write_bytes(first)


def test_good_artifacts(tmp_path: Path) -> None:
    assert faults(images_artifact(tmp_path / "i")) == faults(tokens_artifact(tmp_path / "t")) == []


PLANTED: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "flipped byte": (lambda p: flip(p, "train-000001.tar"), ["train-000001.tar: expected sha256"]),
    "missing file": (
        lambda p: (p / "train-000001.tar").unlink(),
        ["train-000001.tar: expected the file, it is"],
    ),
    "missing rejects": (
        lambda p: (p / "rejects.parquet").unlink(),
        ["rejects.parquet: expected the file, it is"],
    ),
    "extra sample": (
        lambda p: (p / "train-000001.tar").write_bytes(shard(range(6, 11))),
        ["train-000001.tar: expected 10240 bytes, found 20480; expected 4 samples, found 5"],
    ),
    "extra row": (
        lambda p: (p / "rejects.parquet").write_bytes(parquet([{"key": "x"}, {"key": "y"}])),
        ["expected 1 samples, found 2"],
    ),
    "swapped shards": (
        lambda p: swap(p, "train-000000.tar", "validation-000000.tar"),
        [
            "train-000000.tar: .*expected 6 samples, found 4; these are the contents of validation-000000.tar",
            "validation-000000.tar: .*expected 4 samples, found 6; these are the contents of train-000000.tar",
        ],
    ),
    "cut tar": (
        lambda p: (p / "train-000000.tar").write_bytes((p / "train-000000.tar").read_bytes()[:4000]),
        ["train-000000.tar: expected 20480 bytes, found 4000; its samples cannot be read"],
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_named(tmp_path: Path, name: str) -> None:
    plant, expected = PLANTED[name]
    artifact = images_artifact(tmp_path)
    plant(tmp_path)
    found = faults(artifact)
    own = [fault for fault in found if "expected keys that differ" not in fault]
    assert len(own) == len(expected), found
    for fault, pattern in zip(own, expected, strict=True):
        assert re.search(pattern, fault), fault


def forged(place: Path, change: Callable[[list[FileEntry]], list[FileEntry]]) -> None:
    """The table of files changed, and the manifest made to name the new table."""
    entries = change(list(Artifact.open(Folder.of(place)).files.values()))
    buffer = io.BytesIO()
    pq.write_table(FileTable.of(entries).table, buffer)
    (place / FILES).write_bytes(buffer.getvalue())
    manifest = json.loads((place / MANIFEST).read_text())
    manifest["files"]["sha256"] = hash_bytes(buffer.getvalue())
    (place / MANIFEST).write_text(json.dumps(manifest))


def test_a_table_of_files_with_another_row(tmp_path: Path) -> None:
    artifact = images_artifact(tmp_path)
    data = shard(range(20, 22))
    (tmp_path / "train-000002.tar").write_bytes(data)
    forged(tmp_path, lambda entries: [*entries, FileEntry.of("train-000002.tar", data, rows=2)])
    found = faults(artifact)
    assert any("expected the content digest" in fault for fault in found)
    assert any("expected 10 samples in 2 shards of train, the table of files has 12 in 3" in fault for fault in found)
    assert any(
        "expected 15 images to be samples or rejects, found 16 samples and 1 rejects" in fault for fault in found
    )


def test_shards_of_a_split_that_the_manifest_does_not_have(tmp_path: Path) -> None:
    artifact = tokens_artifact(tmp_path)
    data = tokens(range(20, 22))
    (tmp_path / "test-000000.parquet").write_bytes(data)
    forged(tmp_path, lambda entries: [*entries, FileEntry.of("test-000000.parquet", data, rows=2)])
    found = faults(artifact)
    assert any("expected 0 samples in 0 shards of test, the table of files has 2 in 1" in fault for fault in found)


def test_a_table_of_files_that_is_not_the_manifests(tmp_path: Path) -> None:
    artifact = images_artifact(tmp_path)
    flip(tmp_path, FILES)
    with pytest.raises(ArtifactError, match="expected sha256 .* for files.parquet"):
        faults(artifact)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": encode(frame(0, 24), "png")}, "k0: expected 16 x 16 pixels, found 24 x 24"),
        ({"data": b"broken"}, "k0: cannot be decoded"),
        ({"facts": {"label": 2}}, "k0: expected a label of the label map, found 2"),
        ({"facts": {"label": "1"}}, "k0: expected a label of the label map, found 1"),
        ({"image_format": "webp"}, "k0: expected a .png, found a .webp"),
    ],
)
def test_samples_that_were_made_wrong(tmp_path: Path, changes: dict, said: str) -> None:
    (fault,) = faults(images_artifact(tmp_path, train_000000=shard(range(6), **changes)))
    assert fault.startswith("train-000000.tar: ")
    assert said in fault


def test_keys_that_come_again(tmp_path: Path) -> None:
    artifact = images_artifact(tmp_path, train_000001=shard(range(6, 10), key="k3"))
    assert faults(artifact) == ["expected keys that differ from each other, 1 of 14 come again"]


def test_tokens_of_another_model_or_shape(tmp_path: Path) -> None:
    (fault,) = faults(tokens_artifact(tmp_path / "a", train_000001=tokens(range(6, 10), "n" * 64)))
    assert fault == "train-000001.parquet: expected tokens of model mmmmmmmmmmmm, found nnnnnnnnnnnn"
    other = write_parquet(["k6", "k7", "k8", "k9"], [0] * 4, np.zeros((4, 2, 2, 1), int),
                          dataclasses.replace(SHAPE, num_codes=9), "m" * 64)  # fmt: skip
    (fault,) = faults(tokens_artifact(tmp_path / "b", train_000001=other))
    assert fault == "train-000001.parquet: expected tokens of G=1, H=2, K=8, W=2, found G=1, H=2, K=9, W=2"
    labelled = write_parquet(["k6", "k7", "k8", "k9"], [0, 0, 3, None], np.zeros((4, 2, 2, 1), int), SHAPE, "m" * 64)
    (fault,) = faults(tokens_artifact(tmp_path / "d", train_000001=labelled))
    assert fault == "train-000001.parquet: expected labels of the label map, found 3 in 1 rows or more"
    (fault,) = faults(tokens_artifact(tmp_path / "c", validation_000000=tokens(range(10, 15))))
    assert fault == "validation-000000.parquet: expected 4 samples, found 5"
