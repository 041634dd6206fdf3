"""Is an artifact what its manifest says? Every file against its hash, every sample against its shard's count.

    python pipelines/verify.py runs/doom84/shard-2c97927ef0ed

Prints a line for each fault and exits with 1; exits with 0 where all is well.
"""

import argparse
import base64
import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.session import Session
from pipelines import cli
from pipelines.data_report import MAX_HASHES
from pipelines.plan import SPLITS
from pipelines.progress import Progress
from pipelines.shard import REJECTS
from pipelines.stage import fan_out
from vqvae_core import image_shards, token_shards
from vqvae_core.artifacts import Artifact, FileEntry, content_digest, hash_bytes
from vqvae_core.errors import InputError
from vqvae_core.image_shards import read_tar
from vqvae_core.storage import Folder


def verify(session: Session, artifact: Artifact) -> list[str]:
    """What is wrong with an artifact, a line each: the name of the file, what was expected, what was found."""
    faults = list(_facts(artifact))
    by_hash = {entry.sha256: entry.path for entry in artifact.files.values()} if len(artifact.files) < 10**6 else {}
    needed = _needed(artifact)
    jobs = (
        {
            "folder": artifact.folder.uri,
            "kind": artifact.manifest.kind,
            "facts": needed,
            "file": dataclasses.asdict(entry),
        }
        for entry in artifact.files.values()
    )
    hashes: list[np.ndarray] = []
    num_keys = 0
    with Progress("verify", len(artifact.files), "files") as progress:
        for result in fan_out(session, check_file, jobs):
            path = result["path"]
            twin = by_hash.get(result["sha256"])
            moved = [f"these are the contents of {twin}"] if result["faults"] and twin not in (None, path) else []
            if found := [*result["faults"], *moved]:
                faults.append(f"{path}: {'; '.join(found)}")
            if num_keys <= MAX_HASHES:
                hashes.append(np.frombuffer(base64.b64decode(result["keys"]), "<u8"))
                num_keys += len(hashes[-1])
            progress.advance_to(progress.done + 1)
    return sorted(faults) + list(_repeated_keys(hashes))


def _needed(artifact: Artifact) -> dict[str, Any]:
    names = ("size", "image_format", "shape", "model")
    labels = artifact.facts.get("label_map") or {}
    return {
        **{name: artifact.facts[name] for name in names if name in artifact.facts},
        "largest_label": max(labels.values(), default=None),
    }


def _facts(artifact: Artifact) -> Iterator[str]:
    """The manifest against itself: digest, and counts against the table of files."""
    manifest, facts = artifact.manifest, artifact.facts
    found = content_digest(artifact.files)
    if found != manifest.content:
        yield f"manifest.json: expected the content digest {manifest.content[:12]}, the table of files has {found[:12]}"
    total = 0
    splits = facts.get("splits", {})
    for split in SPLITS if splits else ():
        counts = splits.get(split, {"shards": 0, "images": 0})
        shards = [entry for entry in artifact.files.values() if entry.path.startswith(f"{split}-")]
        rows = sum(entry.rows for entry in shards)
        total += rows
        if (len(shards), rows) != (counts["shards"], counts["images"]):
            yield (
                f"manifest.json: expected {counts['images']} samples in {counts['shards']} shards of {split}, "
                f"the table of files has {rows} in {len(shards)}"
            )
    if "source_images" in facts:
        rejected = sum(facts["rejects"].values())
        if facts["source_images"] != total + rejected:
            yield (
                f"manifest.json: expected {facts['source_images']} images to be samples or rejects, found {total} "
                f"samples and {rejected} rejects"
            )
        listed = artifact.files.get(REJECTS)
        if listed is None or listed.rows != rejected:
            found_rows = "no such file" if listed is None else listed.rows
            yield f"{REJECTS}: expected {rejected} rejects, the table of files has {found_rows}"


def check_file(job: dict[str, Any]) -> dict[str, Any]:
    """What is wrong with one file; its hash, and the hashes of its keys."""
    folder, entry = Folder(job["folder"]), FileEntry(**job["file"])
    faults: list[str] = []
    keys: list[str] = []
    try:
        data = folder.read(entry.path)
    except FileNotFoundError:
        return _result(entry.path, "", ["expected the file, it is missing"], [])
    except OSError as error:
        return _result(entry.path, "", [f"expected a file that can be read, but: {error}"], [])
    found = hash_bytes(data)
    if len(data) != entry.bytes:
        faults.append(f"expected {entry.bytes} bytes, found {len(data)}")
    elif found != entry.sha256:
        faults.append(f"expected sha256 {entry.sha256[:12]}, found {found[:12]}")
    try:
        keys, rows, more = _samples(job["kind"], entry.path, data, job["facts"])
        faults += more
        if rows is not None and rows != entry.rows:
            faults.append(f"expected {entry.rows} samples, found {rows}")
    except (InputError, pa.ArrowException, OSError, ValueError) as error:
        faults.append(f"its samples cannot be read: {str(error).splitlines()[0]}")
    return _result(entry.path, found, faults, keys)


def _result(path: str, sha256: str, faults: list[str], keys: list[str]) -> dict[str, Any]:
    hashes = np.array([int(hash_bytes(key.encode())[:16], 16) for key in keys], "<u8")
    return {"path": path, "sha256": sha256, "faults": faults, "keys": base64.b64encode(hashes.tobytes()).decode()}


def _samples(kind: str, path: str, data: bytes, facts: dict[str, Any]) -> tuple[list[str], int | None, list[str]]:
    """(keys, rows, faults) of a shard; no rows where the file has none."""
    if kind == image_shards.KIND and path.endswith(".tar"):
        return _images(path, data, facts)
    if kind == token_shards.KIND and path.endswith(".parquet"):
        table = token_shards.read_parquet(data, path)
        faults = []
        shape = facts["shape"]
        found = {
            "H": table.shape.height,
            "W": table.shape.width,
            "G": table.shape.num_groups,
            "K": table.shape.num_codes,
        }
        if found != shape:
            faults.append(f"expected tokens of {_say(shape)}, found {_say(found)}")
        if table.model != facts["model"]:
            faults.append(f"expected tokens of model {facts['model'][:12]}, found {table.model[:12]}")
        outside = table.labels[~np.isin(table.labels, np.arange(-1, _num_labels(facts)))]
        if len(outside):
            faults.append(f"expected labels of the label map, found {outside[0]} in {len(outside)} rows or more")
        return table.keys, len(table.keys), faults
    if path.endswith(".parquet"):
        return [], pq.read_metadata(pa.BufferReader(data)).num_rows, []
    return [], None, []


def _images(path: str, data: bytes, facts: dict[str, Any]) -> tuple[list[str], int, list[str]]:
    keys, faults = [], []
    size, image_format, num_labels = facts["size"], facts["image_format"], _num_labels(facts)
    for sample in read_tar(data, path):
        keys.append(sample.key)
        try:
            height, width = sample.pixels().shape[:2]
            if (height, width) != (size, size):
                faults.append(f"{sample.key}: expected {size} x {size} pixels, found {width} x {height}")
        except InputError as error:
            faults.append(f"{sample.key}: {error}")
        if sample.image_format != image_format:
            faults.append(f"{sample.key}: expected a .{image_format}, found a .{sample.image_format}")
        label = sample.facts.get("label")
        if label is not None and (not isinstance(label, int) or not 0 <= label < num_labels):
            faults.append(f"{sample.key}: expected a label of the label map, found {label}")
    return keys, len(keys), faults[:10]


def _num_labels(facts: dict[str, Any]) -> int:
    largest = facts["largest_label"]
    return 0 if largest is None else largest + 1


def _say(shape: dict[str, int]) -> str:
    return ", ".join(f"{name}={value}" for name, value in sorted(shape.items()))


def _repeated_keys(hashes: list[np.ndarray]) -> Iterator[str]:
    if sum(map(len, hashes)) > MAX_HASHES:
        print(f"more than {MAX_HASHES} samples: their keys were not compared", flush=True)
        return
    keys = np.sort(np.concatenate([*hashes, np.zeros(0, np.uint64)]))
    repeated = int((keys[1:] == keys[:-1]).sum())
    if repeated:
        yield f"expected keys that differ from each other, {repeated} of {len(keys)} come again"


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="verify.py", description="Check artifacts against their manifests.")
    parser.add_argument("artifact", nargs="+", help="folder of an artifact, local or s3://")
    options = parser.parse_args(arguments)
    artifacts = [Artifact.open(Folder.of(location)) for location in options.artifact]
    session = Session()
    wrong = 0
    try:
        for artifact in artifacts:
            faults = verify(session, artifact)
            wrong += len(faults)
            for fault in faults:
                print(f"{artifact.folder.name}/{fault}")
            rows = sum(entry.rows for entry in artifact.files.values())
            state = f"{len(faults)} faults" if faults else "all well"
            print(f"{artifact.folder.uri}: {len(artifact.files)} files, {rows} rows, {state}")
    finally:
        session.close()
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
