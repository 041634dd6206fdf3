"""The figures of each image of a shard, for the evaluate stage: what CPU tasks read, and actors (with a GPU each, where
asked) measure and write, an image a row. What the driver needs beside them, such as features, is staged.
"""

import functools
import io
import json
import time
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipelines.extractor import Extractor, NamedFile, PerceptualDistance
from pipelines.image_metrics import ms_ssim, ssim
from pipelines.index import to_parquet
from pipelines.sample import KIND as SAMPLES_KIND
from pipelines.stage import write_sidecar
from pipelines.tokenize_images import read_shard
from vqvae_core.artifacts import Artifact, ArtifactError, FileEntry
from vqvae_core.augment import centre_crop
from vqvae_core.decoding import decode
from vqvae_core.errors import InputError
from vqvae_core.metrics import squared_errors
from vqvae_core.prior import Prior
from vqvae_core.prior_training import grid_nll_nats
from vqvae_core.round_trip import decoded, encoded
from vqvae_core.storage import Folder
from vqvae_core.token_shards import TokenShards, as_taken, read_parquet
from vqvae_core.vqvae import VQVAE
from vqvae_core.vqvae_training import counts_of

STAGING = "staging"
_BATCH = 16
IMAGES = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("squared_error", pa.float64(), nullable=False),
        pa.field("psnr_db", pa.float64(), nullable=False),
        pa.field("ssim", pa.float64()),
        pa.field("ms_ssim", pa.float64()),
        pa.field("lpips", pa.float64()),
        pa.field("reconstruction_nats", pa.float64()),
        pa.field("latent_nats", pa.float64(), nullable=False),
    ]
)


def read_part(job: dict[str, Any]) -> dict[str, Any]:
    """Read and decode the images of one shard, or of one part of the samples: one row, with all its pixels."""
    if not job["name"].startswith("part-"):
        return read_shard(job)
    row = {"job": json.dumps(job), "begin": time.time(), "pixels": b"", "shape": "[]", "keys": "[]", "labels": "[]"}
    try:
        pixels = _sample_pixels(_samples(job["samples"], job["work"]), job["name"])
    except InputError as error:
        return row | {"error": str(error)}
    return row | {"pixels": pixels.tobytes(), "shape": json.dumps(pixels.shape), "error": ""}


@functools.lru_cache(maxsize=1)
def _samples(uri: str, work: str) -> Artifact:
    """The samples of a stage's work, opened once a process."""
    return Artifact.open(Folder(uri), SAMPLES_KIND)


def _sample_pixels(samples: Artifact, name: str) -> np.ndarray:
    """uint8 (N, H, W, 3)."""
    if f"pictures/{name}.npz" in samples.files:
        return read_arrays(samples.read(f"pictures/{name}.npz"))["arr_0"]
    keys = read_parquet(samples.read(f"{name}.parquet"), samples.folder.path(f"{name}.parquet")).keys
    return np.stack([decode(samples.read(f"pictures/{key}.png")) for key in keys])


def tokens_of(shards: TokenShards, name: str, keys: list[str]) -> Tensor | None:
    """Tokens, int64 (N, H, W, G), of an image shard; None for a split that was not tokenized."""
    path = f"{name}.parquet"
    if path not in shards.artifact.files:
        return None
    table = shards.read(path)
    if table.keys != keys:
        raise ArtifactError(
            f"expected the tokens of the images of {name} in {shards.artifact.folder.path(path)}, found those of "
            "others; tokenize them again"
        )
    return torch.from_numpy(table.tokens.astype(np.int64))


class _Models:
    """What an actor needs, loaded once: all parts of an artifact have the same job but for their names."""

    def __init__(self, job: dict[str, Any]) -> None:
        torch.set_num_threads(job["threads"])
        self.device = "cuda" if job["use_gpu"] else "cpu"
        vqvae, prior = Artifact.open(Folder(job["vqvae"])), Artifact.open(Folder(job["prior"]))
        self.size = vqvae.facts["image_size"]
        self.vqvae = VQVAE.of(vqvae).to(self.device)
        self.network = Prior.of(prior).network.to(self.device)
        self.precision = prior.facts.get("precision", "fp32")
        self.tokens = TokenShards.open(Folder(job["tokens"]))
        files = {name: _again(name, *found) for name, found in job["judges"].items()}
        options = {"threads": job["threads"], "use_gpu": job["use_gpu"]}
        self.extractor = Extractor(files["extractor"], **options) if "extractor" in files else None
        self.distance = PerceptualDistance(files["lpips"], **options) if "lpips" in files else None


def _again(name: str, place: str, sha256: str) -> NamedFile:
    """A file that the driver has read, on this machine."""
    file = NamedFile.read(place, f"--evaluate.{name}")
    if file.sha256 != sha256:
        raise InputError(
            f"expected sha256 {sha256[:12]} for {place}, found {file.sha256[:12]}; did it change meanwhile?"
        )
    return file


class Meter:
    """An actor with the models: measures one shard and writes its figures, then its sidecar."""

    def __init__(self) -> None:
        self._models: _Models | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        job = json.loads(row["job"])
        nothing = {"name": job["name"], "rows": 0, "begin": row["begin"], "end": 0.0}
        if row["error"]:
            return nothing | {"error": row["error"]}
        try:
            self._models = self._models or _Models(job)
            pixels = torch.frombuffer(bytearray(row["pixels"]), dtype=torch.uint8).view(json.loads(row["shape"]))
            write = self._write_samples if job["name"].startswith("part-") else self._write_images
            write(self._models, job, row, pixels)
        except InputError as error:
            return nothing | {"error": str(error)}
        return nothing | {"rows": len(pixels), "end": time.time(), "error": ""}

    def _write_samples(self, models: _Models, job: dict[str, Any], row: dict[str, Any], pixels: Tensor) -> None:
        assert models.extractor is not None, "samples are measured by it alone"
        folder, path = Folder(job["out"]), f"{STAGING}/{job['name']}.npz"
        data = _npz(samples=models.extractor.features(pixels))
        folder.write(path, data)
        write_sidecar(folder, job["work"], job["name"], FileEntry.of(path, data, rows=len(pixels)))

    def _write_images(self, models: _Models, job: dict[str, Any], row: dict[str, Any], pixels: Tensor) -> None:
        name, keys, folder = job["name"], json.loads(row["keys"]), Folder(job["out"])
        pixels = centre_crop(pixels, models.size)
        tokens = tokens_of(models.tokens, name, keys)
        if tokens is None:
            found = encoded(models.vqvae, pixels)
            tokens = found.reshape(*found.shape[:3], models.vqvae.config.quantizer.num_groups)
        made, nats = decoded(models.vqvae, as_taken(tokens), pixels)
        labels = torch.tensor([-1 if label is None else label for label in json.loads(row["labels"])])
        data = to_parquet(_image_table(models, keys, pixels, made, nats, tokens, labels))
        arrays = {"counts": counts_of(tokens, models.vqvae.config.quantizer).numpy()}
        if models.extractor is not None:
            arrays["originals"] = models.extractor.features(pixels)
            arrays["reconstructions"] = models.extractor.features(made)
        staged = _npz(**arrays)
        files = {f"{name}.parquet": data, f"{STAGING}/{name}.npz": staged}
        for path, content in files.items():
            folder.write(path, content)
        entry, more = (FileEntry.of(path, content) for path, content in files.items())
        entry = FileEntry.of(entry.path, data, rows=len(keys))
        write_sidecar(folder, job["work"], name, entry, [more])


def _image_table(
    models: _Models, keys: list[str], pixels: Tensor, made: Tensor, nats: Tensor | None, tokens: Tensor, labels: Tensor
) -> pa.Table:
    """The figures of each image, with the columns of IMAGES."""
    errors = squared_errors(made, pixels)
    with np.errstate(divide="ignore"):
        decibels = 10 * np.log10(255**2 / (errors.numpy() / pixels[0].numel()))
    alike = {"ssim": [], "ms_ssim": []}
    for part, other in zip(made.split(_BATCH), pixels.split(_BATCH), strict=True):
        pair = part.to(models.device), other.to(models.device)
        for name, measure in (("ssim", ssim), ("ms_ssim", ms_ssim)):
            found = measure(*pair)
            alike[name] += [None] * len(part) if found is None else found.double().cpu().tolist()
    columns = {
        "key": keys,
        "squared_error": errors.numpy(),
        "psnr_db": decibels,
        **alike,
        "lpips": [None] * len(keys) if models.distance is None else models.distance(made, pixels),
        "reconstruction_nats": [None] * len(keys) if nats is None else nats.numpy(),
        "latent_nats": grid_nll_nats(models.network, tokens, labels, models.precision, models.device).numpy(),
    }
    return pa.table([pa.array(columns[field.name], field.type) for field in IMAGES], schema=IMAGES)


def _npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def read_arrays(data: bytes) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays}
