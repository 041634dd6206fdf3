"""The measure_bits stage: what a model of the likelihood table costs on held-out images, in bits/dim.

One row is one image shard: read, decoded and measured by an actor (with a GPU where asked), whose sums stand in a
sidecar, so that a stopped stage goes on where it was.
"""

import json
import time
from typing import Any

import numpy as np
import torch

from pipelines.progress import Progress
from pipelines.stage import Made, Pipeline, WorkClock, Workspace, encode_shards, write_sidecar
from pipelines.tokenize_images import read_shard
from vqvae_core.artifacts import Artifact, FileEntry
from vqvae_core.augment import centre_crop
from vqvae_core.contender import Contender, figures, load_contender
from vqvae_core.errors import InputError
from vqvae_core.image_shards import ImageShards
from vqvae_core.prior import Prior
from vqvae_core.prior_training import bits_per_token, latent_bits_per_dim
from vqvae_core.storage import Folder
from vqvae_core.token_shards import as_taken, read_parquet
from vqvae_core.train import to_device

VERSION = 1
KIND = "Bits"
BITS = "bits.json"


def held_out(images: ImageShards) -> str:
    """The split that nothing was selected by: the test split where there is one."""
    return "test" if images.shards("test") else "validation"


def measure_bits(
    pipeline: Pipeline,
    images: ImageShards,
    name: str,
    model: Artifact,
    samples: tuple[int, ...],
    tokens: Artifact | None = None,
    prior: Artifact | None = None,
) -> Artifact:
    """Bits/dim of a model. samples: numbers of samples of VIMCO's bounds. tokens, prior: of a VQ-VAE, for its latents
    under a learned prior. Facts: split, images, and the means of `contender.figures`."""
    inputs = {"images": images.artifact, "model": model}
    if tokens is not None and prior is not None:
        inputs |= {"tokens": tokens, "prior": prior}
    samples = samples if name.startswith("vimco") else (1,)
    return pipeline.make(
        "measure_bits",
        version=VERSION,
        kind=KIND,
        recipe={"name": name, "samples": samples},
        inputs=inputs,
        build=lambda space, run: _build(pipeline, images, name, inputs, samples, space),
    )


def _build(
    pipeline: Pipeline,
    images: ImageShards,
    name: str,
    inputs: dict[str, Artifact],
    samples: tuple[int, ...],
    space: Workspace,
) -> Made:
    split, model = held_out(images), inputs["model"]
    names = [path.removesuffix(".tar") for path in images.shards(split)]
    if not names:
        raise InputError(f"expected held-out images in {images.artifact.folder.uri}, found none; give the source some")
    there = space.finished_parts(names)
    spec = {
        "images": images.artifact.folder.uri,
        "model": model.folder.uri,
        "contender": name,
        "precision": model.facts["precision"],
        "samples": samples,
        "tokens": inputs["tokens"].folder.uri if "tokens" in inputs else None,
        "prior": inputs["prior"].folder.uri if "prior" in inputs else None,
        "mebibytes": pipeline.resources.decode_mebibytes // 4,  # of several actors
        "out": space.folder.uri,
        "work": space.work,
        "use_gpu": pipeline.resources.use_gpu,
    }
    clock = WorkClock()
    done = int(there.sum())
    with Progress(f"measure_bits {name}", len(names), "shards", done=done) as progress:
        jobs = ({**spec, "name": shard} for shard, is_done in zip(names, there, strict=True) if not is_done)
        for result in encode_shards(pipeline.session, read_shard, Measurer, jobs, pipeline.resources):
            clock.add(result)
            done += 1
            progress.advance_to(done)
    records = list(space.records(names))
    rows = np.array([record["file"]["rows"] for record in records])
    sums = {key: np.array([record["figures"][key] for record in records]) for key in records[0]["figures"]}
    found = {key: float((values * rows).sum() / rows.sum()) for key, values in sums.items()}
    facts = {"name": name, "split": split, "images": int(rows.sum()), "samples": list(samples), **found}
    data = (json.dumps(facts, indent=1) + "\n").encode()
    space.folder.write(BITS, data)
    return Made([FileEntry.of(BITS, data), *(FileEntry(**record["file"]) for record in records)], facts, clock.seconds)


class Measurer:
    """An actor with the model: measures one shard and writes its means, then its sidecar."""

    def __init__(self) -> None:
        self._loaded: tuple[Contender, Prior | None] | None = None

    def _load(self, job: dict[str, Any]) -> tuple[Contender, Prior | None]:
        if self._loaded is None:
            torch.set_num_threads(job["threads"])
            device = "cuda" if job["use_gpu"] else "cpu"
            model = load_contender(job["contender"], Artifact.open(Folder(job["model"])))
            to_device(model, device)
            prior = Prior.load(job["prior"], device) if job["prior"] else None
            self._loaded = model, prior
        return self._loaded

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        job = json.loads(row["job"])
        nothing = {"name": job["name"], "rows": 0, "begin": row["begin"], "end": 0.0}
        if row["error"]:
            return nothing | {"error": row["error"]}
        try:
            return nothing | {"rows": self._write(row, job), "end": time.time(), "error": ""}
        except InputError as error:
            return nothing | {"error": str(error)}

    def _write(self, row: dict[str, Any], job: dict[str, Any]) -> int:
        model, prior = self._load(job)
        pixels = torch.frombuffer(bytearray(row["pixels"]), dtype=torch.uint8).view(json.loads(row["shape"]))
        size = Artifact.open(Folder(job["model"])).facts["image_size"]
        pixels = centre_crop(pixels, size)
        device = "cuda" if job["use_gpu"] else "cpu"
        tokens, labels = _stored(job) if prior is not None else (None, None)
        found = figures(
            job["contender"],
            model,
            pixels,
            job["samples"],
            job["precision"],
            device,
            job["mebibytes"],
            tokens if tokens is None else as_taken(tokens),
        )
        if prior is not None and tokens is not None and labels is not None:
            found |= _learned(prior, tokens, labels, found["reconstruction_bits_per_dim"], device)
        folder, name = Folder(job["out"]), job["name"]
        data = json.dumps(found, sort_keys=True).encode()
        folder.write(f"{name}.json", data)
        write_sidecar(folder, job["work"], name, FileEntry.of(f"{name}.json", data, rows=len(pixels)), figures=found)
        return len(pixels)


def _stored(job: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, int64 (N, H, W, G), and labels of a shard's images, as they were tokenized."""
    artifact = Artifact.open(Folder(job["tokens"]))
    path = f"{job['name']}.parquet"
    table = read_parquet(artifact.read(path), artifact.folder.path(path))
    return torch.from_numpy(table.tokens.astype(np.int64)), torch.from_numpy(table.labels.astype(np.int64))


def _learned(
    prior: Prior, tokens: torch.Tensor, labels: torch.Tensor, reconstruction: float, device: str
) -> dict[str, float]:
    """The same tokens under the learned prior."""
    bits = latent_bits_per_dim(bits_per_token(prior.network, tokens, labels, "fp32", device), prior.shape)
    return {"latents_learned_bits_per_dim": bits, "total_learned_bits_per_dim": reconstruction + bits}
