import json
from pathlib import Path

import pytest

from vqvae_core.artifacts import (
    MANIFEST,
    Artifact,
    ArtifactError,
    FileEntry,
    canonical_json,
    commit,
    content_digest,
    hash_json,
)
from vqvae_core.storage import Folder


def made(folder: Folder, **files: bytes) -> Artifact:
    for name, data in files.items():
        folder.write(name, data)
    return commit(
        folder,
        kind="Things",
        stage="make",
        stage_version=1,
        fingerprint="f" * 64,
        recipe={"size": 3},
        inputs={},
        files=[FileEntry.of(name, data, rows=1) for name, data in files.items()],
        facts={"K": 2},
        provenance={"commit": None},
    )


def test_round_trip(tmp_path: Path) -> None:
    written = made(Folder.of(tmp_path), a=b"1", b=b"22")
    artifact = Artifact.open(Folder.of(tmp_path), "Things")
    assert artifact.manifest == written.manifest
    artifact.check_files()
    assert artifact.read("b") == b"22"
    assert artifact.files["b"] == FileEntry.of("b", b"22", rows=1)


def test_same_content_same_digest() -> None:
    files = [FileEntry.of("a", b"1"), FileEntry.of("b", b"2")]
    assert content_digest(files) == content_digest(reversed(files))
    assert content_digest(files) != content_digest([FileEntry.of("a", b"2"), FileEntry.of("b", b"1")])


def test_fingerprints_do_not_depend_on_the_order_of_keys() -> None:
    assert hash_json({"a": 1, "b": [1.5, None]}) == hash_json({"b": [1.5, None], "a": 1})
    assert canonical_json({"b": 1, "a": "x"}) == '{"a":"x","b":1}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(float("nan"))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda folder: folder.delete("a"), "expected 1 bytes for a of .*, found nothing; restore the file"),
        (lambda folder: folder.write("a", b"123"), "expected 1 bytes for a of .*, found 3 bytes"),
        (lambda folder: folder.write("files.parquet", b"x"), "expected sha256 .* for files.parquet of .*, found"),
        (lambda folder: folder.delete("files.parquet"), "expected the file for files.parquet of .*, found nothing"),
    ],
)
def test_what_is_checked_at_reuse(tmp_path: Path, harm, message: str) -> None:
    folder = Folder.of(tmp_path)
    made(folder, a=b"1")
    harm(folder)
    with pytest.raises(ArtifactError, match=message):
        Artifact.open(folder).check_files()


def test_a_changed_byte_is_found_when_the_file_is_read(tmp_path: Path) -> None:
    folder = Folder.of(tmp_path)
    made(folder, a=b"1")
    folder.write("a", b"2")
    artifact = Artifact.open(folder)
    artifact.check_files()
    with pytest.raises(ArtifactError, match=r"expected sha256 6b86b273ff34 for a of .*, found d4735e3a265e"):
        artifact.read("a")


def test_a_file_that_the_manifest_does_not_name_is_not_read(tmp_path: Path) -> None:
    folder = Folder.of(tmp_path)
    made(folder, a=b"1")
    folder.write("b", b"stray")
    with pytest.raises(ArtifactError, match="expected the file b in the manifest"):
        Artifact.open(folder).read("b")


def test_manifests_that_are_none(tmp_path: Path) -> None:
    folder = Folder.of(tmp_path)
    with pytest.raises(ArtifactError, match="found no manifest.json; run the stage that makes it"):
        Artifact.open(folder)
    made(folder, a=b"1")
    with pytest.raises(ArtifactError, match="expected an artifact of kind Other at .*, found Things"):
        Artifact.open(folder, "Other")
    manifest = json.loads(folder.read(MANIFEST))
    folder.write(MANIFEST, json.dumps({**manifest, "version": 99}).encode())
    with pytest.raises(ArtifactError, match="expected manifest version 1 at .*, found 99; use the release that wrote"):
        Artifact.open(folder)
    folder.write(MANIFEST, b"{")
    with pytest.raises(ArtifactError, match="expected a manifest at .*, found something else"):
        Artifact.open(folder)
