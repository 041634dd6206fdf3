"""The tokenize stage: image shards to token shards, one Parquet file a shard, in the same order.

Named so that it does not hide Python's own `tokenize` when it is run as a script. CPU tasks read and decode, actors
(with a GPU each, where asked) encode: one row is one shard.
"""

import functools
import itertools
import json
import time
from typing import Any

import numpy as np
import torch

from pipelines.plan import SPLITS
from pipelines.progress import Progress
from pipelines.stage import Made, Pipeline, WorkClock, Workspace, encode_shards, write_sidecar
from vqvae_core.artifacts import Artifact, FileEntry, FileTable
from vqvae_core.augment import centre_crop
from vqvae_core.errors import InputError
from vqvae_core.image_shards import ImageShards
from vqvae_core.round_trip import encoded
from vqvae_core.storage import Folder
from vqvae_core.token_shards import KIND, TokenShape, TokenShards, write_parquet
from vqvae_core.train import to_device
from vqvae_core.vqvae import STRIDE, VQVAE

VERSION = 2


def tokenize_images(pipeline: Pipeline, images: ImageShards, model: Artifact) -> TokenShards:
    """The tokens of image shards under a VQ-VAE. Nothing to configure: everything is read from the inputs."""
    artifact = pipeline.make(
        "tokenize",
        version=VERSION,
        kind=KIND,
        recipe={},
        inputs={"images": images.artifact, "model": model},
        build=lambda space, run: _build(pipeline, images, model, space),
    )
    return TokenShards(artifact)


def _build(pipeline: Pipeline, images: ImageShards, model: Artifact, space: Workspace) -> Made:
    names = [path.removesuffix(".tar") for split in SPLITS for path in images.shards(split)]
    there = space.finished_parts(names)
    missing = [name for name, done in zip(names, there, strict=True) if not done]
    rows = [images.artifact.files[f"{name}.tar"].rows for name in names]
    total, done = sum(rows), sum(itertools.compress(rows, there))
    clock = WorkClock()
    spec = {
        "images": images.artifact.folder.uri,
        "model": model.folder.uri,
        "out": space.folder.uri,
        "work": space.work,
        "use_gpu": pipeline.resources.use_gpu,
    }
    with Progress("tokenize", total, "images", done=done) as progress:
        jobs = ({**spec, "name": name} for name in missing)
        for result in encode_shards(pipeline.session, read_shard, Encoder, jobs, pipeline.resources):
            clock.add(result)
            done += result["rows"]
            progress.advance_to(done)
    files = FileTable.of(FileEntry(**record["file"]) for record in space.records(names))
    sites = model.facts["image_size"] // STRIDE
    facts = {
        "shape": {"H": sites, "W": sites, "G": model.facts.get("G", 1), "K": model.facts["K"]},
        "model": model.manifest.fingerprint,
        "precision": model.facts["precision"],
        "splits": images.artifact.facts["splits"],
        "label_map": images.label_map,
    }
    return Made(files.values(), facts, clock.seconds)


def read_shard(job: dict[str, Any]) -> dict[str, Any]:
    """Read and decode one image shard: one row, with all its pixels."""
    empty = {"pixels": b"", "shape": "[]", "keys": "[]", "labels": "[]", "error": ""}
    row = {"job": json.dumps(job), "begin": time.time(), **empty}
    try:
        return row | _read(job)
    except InputError as error:
        return row | {"error": str(error)}


@functools.lru_cache(maxsize=1)
def _images(uri: str, work: str) -> ImageShards:
    """The shards of a stage's work, opened once a process: their table of files grows with their number."""
    return ImageShards.open(Folder(uri))


def _read(job: dict[str, Any]) -> dict[str, Any]:
    images = _images(job["images"], job["work"])
    samples = images.read(f"{job['name']}.tar")
    pixels = np.stack([sample.pixels() for sample in samples])
    labels = [sample.label for sample in samples]
    return {
        "pixels": pixels.tobytes(),
        "shape": json.dumps(pixels.shape),
        "keys": json.dumps([sample.key for sample in samples]),
        "labels": json.dumps(labels),
    }


class Encoder:
    """An actor with the model: encodes one shard and writes its tokens, then its sidecar."""

    def __init__(self) -> None:
        self._model: VQVAE | None = None

    def _load(self, job: dict[str, Any]) -> VQVAE:
        if self._model is not None:
            return self._model
        torch.set_num_threads(job["threads"])
        artifact = Artifact.open(Folder(job["model"]))
        self._fingerprint, self._size = artifact.manifest.fingerprint, artifact.facts["image_size"]
        model = VQVAE.of(artifact)
        to_device(model, "cuda" if job["use_gpu"] else "cpu")
        self._model = model
        return model

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        job = json.loads(row["job"])
        nothing = {"name": job["name"], "rows": 0, "begin": row["begin"], "end": 0.0}
        if row["error"]:
            return nothing | {"error": row["error"]}
        try:
            return nothing | self._write(row, job) | {"end": time.time(), "error": ""}
        except InputError as error:
            return nothing | {"error": str(error)}

    def _write(self, row: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
        model = self._load(job)
        pixels = torch.frombuffer(bytearray(row["pixels"]), dtype=torch.uint8).view(json.loads(row["shape"]))
        pixels = centre_crop(pixels, self._size)  # of images that are stored larger than the model takes them
        groups = model.config.quantizer.num_groups
        tokens = encoded(model, pixels).numpy()
        tokens = tokens.reshape(*tokens.shape[:3], groups)
        shape = TokenShape(
            height=tokens.shape[1],
            width=tokens.shape[2],
            num_groups=groups,
            num_codes=model.config.quantizer.num_codes,
        )
        data = write_parquet(json.loads(row["keys"]), json.loads(row["labels"]), tokens, shape, self._fingerprint)
        folder, name = Folder(job["out"]), job["name"]
        folder.write(f"{name}.parquet", data)
        file = FileEntry.of(f"{name}.parquet", data, rows=len(tokens))
        write_sidecar(folder, job["work"], name, file)
        return {"rows": len(tokens)}


if __name__ == "__main__":
    from pipelines import cli, full

    cli.run(lambda arguments: full.main(arguments, until="tokenize"))
