"""The measure_bits stage: what a model of the likelihood table costs on held-out images, in bits/dim.

One row is one image shard: read, decoded and measured by an actor (with a GPU where asked), whose sums stand in a
sidecar, so that a stopped stage goes on where it was.
"""

import json
import time
from typing import Any

import numpy as np
import torch

from pipelines.meter import tokens_of
from pipelines.progress import Progress
from pipelines.stage import Made, Pipeline, WorkClock, Workspace, encode_shards, write_sidecar
from pipelines.tokenize_images import read_shard
from vqvae_core.artifacts import Artifact, FileEntry
from vqvae_core.augment import centre_crop
from vqvae_core.contender import VQ_VAE, Contender, figures, load_contender, vqvae_figures
from vqvae_core.errors import InputError
from vqvae_core.image_shards import ImageShards
from vqvae_core.likelihood import bits_per_dim
from vqvae_core.prior import Prior
from vqvae_core.prior_training import grid_nll_nats
from vqvae_core.round_trip import decoded
from vqvae_core.storage import Folder
from vqvae_core.token_shards import TokenShards, as_taken
from vqvae_core.train import to_device
from vqvae_core.train_config import Precision
from vqvae_core.vqvae import VQVAE

VERSION = 1
KIND = "Bits"
BITS = "bits.json"


def held_out(images: ImageShards) -> str:
    """The test split, which nothing was selected by; where there is none the validation split, which chose weights."""
    return "test" if images.shards("test") else "validation"


def measure_bits(
    pipeline: Pipeline,
    images: ImageShards,
    name: str,
    model: Artifact,
    samples: tuple[int, ...],
    tokens: TokenShards | None = None,
    prior: Artifact | None = None,
) -> Artifact:
    """Bits/dim of a model, computed in fp32, but for a learned prior, which is in its own precision.

    samples: numbers of samples of VIMCO's bounds. tokens, prior: of a VQ-VAE, whose bits are those of its stored
    tokens, under the uniform prior and this one. Facts: split, images, and the means of `contender.figures`.
    Raises `InputError` where the parts do not belong together.
    """
    inputs = {"images": images.artifact, "model": model}
    if name == VQ_VAE:
        assert tokens is not None and prior is not None, "a VQ-VAE is measured with its tokens and their prior"
        check_parts(model, tokens, prior)
        inputs |= {"tokens": tokens.artifact, "prior": prior}
    samples = samples if name.startswith("vimco") else (1,)
    return pipeline.make(
        "measure_bits",
        version=VERSION,
        kind=KIND,
        recipe={"name": name, "samples": samples},
        inputs=inputs,
        build=lambda space, run: _build(pipeline, images, name, inputs, samples, space),
    )


def check_parts(vqvae: Artifact, tokens: TokenShards, prior: Artifact) -> None:
    """Raises `InputError` where tokens or prior are those of another VQ-VAE."""
    found = tokens.artifact.facts["model"], Prior.of(prior).vqvae
    if set(found) != {vqvae.manifest.fingerprint}:
        raise InputError(
            f"expected tokens and prior of the VQ-VAE {vqvae.manifest.fingerprint[:12]}, found those of "
            f"{found[0][:12]} and {found[1][:12]}; name the artifacts of one run"
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
    firsts = np.cumsum([0, *(images.artifact.files[f"{shard}.tar"].rows for shard in names)])[:-1]
    spec = {
        "images": images.artifact.folder.uri,
        "model": model.folder.uri,
        "contender": name,
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
        jobs = (
            {**spec, "name": shard, "first": int(first)}
            for shard, first, is_done in zip(names, firsts, there, strict=True)
            if not is_done
        )
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
            artifact = Artifact.open(Folder(job["model"]))
            self._size = artifact.facts["image_size"]
            model = load_contender(job["contender"], artifact)
            to_device(model, device)
            prior = None
            if job["prior"]:
                trained = Artifact.open(Folder(job["prior"]))
                prior = Prior.of(trained)
                prior.network.to(device)
                self._precision: Precision = trained.facts.get("precision", "fp32")
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
        pixels = centre_crop(pixels, self._size)
        device = "cuda" if job["use_gpu"] else "cpu"
        if prior is not None and isinstance(model, VQVAE):
            found = _vqvae_figures(model, prior, job, row, pixels, device, self._precision)
        else:
            found = figures(
                job["contender"], model, pixels, job["samples"], "fp32", device, job["mebibytes"], job["first"]
            )
        folder, name = Folder(job["out"]), job["name"]
        data = json.dumps(found, sort_keys=True).encode()
        folder.write(f"{name}.json", data)
        write_sidecar(folder, job["work"], name, FileEntry.of(f"{name}.json", data, rows=len(pixels)), figures=found)
        return len(pixels)


def _vqvae_figures(
    model: VQVAE,
    prior: Prior,
    job: dict[str, Any],
    row: dict[str, Any],
    pixels: torch.Tensor,
    device: str,
    precision: Precision,
) -> dict[str, float]:
    """Of the stored tokens: what they leave to be said, and what they cost under both priors."""
    tokens = tokens_of(TokenShards.open(Folder(job["tokens"])), job["name"], json.loads(row["keys"]))
    if tokens is None:
        raise InputError(f"expected tokens of {job['name']} in {job['tokens']}, found none; tokenize the images again")
    _, nats = decoded(model, as_taken(tokens), pixels)
    assert nats is not None, "the likelihood has bits"
    found = vqvae_figures(model.config, nats, pixels.shape[1:3])
    labels = torch.tensor([-1 if label is None else label for label in json.loads(row["labels"])])
    cost = grid_nll_nats(prior.network, tokens, labels, precision, device)
    learned = bits_per_dim(float(cost.mean()), pixels[0].numel())
    total = found["reconstruction_bits_per_dim"] + learned
    return found | {"latents_learned_bits_per_dim": learned, "total_learned_bits_per_dim": total}
