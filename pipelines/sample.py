"""The sample stage: draws from the prior, decoded to pictures. Each sample depends on its own seed only."""

from typing import Any

import numpy as np
import torch

from pipelines.config import SampleConfig, recipe_of
from pipelines.progress import Progress
from pipelines.stage import Made, Pipeline, WorkClock, Workspace, fan_out, write_sidecar
from pipelines.train_prior import load_prior
from pipelines.train_vqvae import load_vqvae, png
from vqvae_core.artifacts import Artifact, FileEntry
from vqvae_core.decoding import decode
from vqvae_core.images import grid
from vqvae_core.sampler import sample as draw
from vqvae_core.storage import Folder
from vqvae_core.token_shards import write_parquet

VERSION = 1
KIND = "Samples"
GRID = "samples.png"
_MOST_COLUMNS = 12


def sample(pipeline: Pipeline, config: SampleConfig, prior: Artifact, vqvae: Artifact, label_map: Any) -> Artifact:
    """Samples of a prior. Files: tokens (Parquet) and a picture of each batch, and one grid of all."""
    return pipeline.make(
        "sample",
        version=VERSION,
        kind=KIND,
        # The batch size only says which samples share a file.
        recipe=recipe_of(config),
        inputs={"prior": prior, "vqvae": vqvae},
        build=lambda space, run: _build(pipeline, config, prior, vqvae, label_map, space),
    )


def _build(
    pipeline: Pipeline,
    config: SampleConfig,
    prior: Artifact,
    vqvae: Artifact,
    label_map: dict[str, int] | None,
    space: Workspace,
) -> Made:
    numbers = list(range(config.num_images))
    parts = [numbers[start : start + config.batch_size] for start in range(0, len(numbers), config.batch_size)]
    names = [f"part-{number:06d}" for number in range(len(parts))]
    jobs = [
        {
            "prior": prior.folder.uri,
            "vqvae": vqvae.folder.uri,
            "out": space.folder.uri,
            "work": space.work,
            "name": name,
            "numbers": part,
            "seed": config.seed,
            "batch_size": config.batch_size,
            "temperature": config.temperature,
            "num_labels": len(label_map or {}),
        }
        for name, part in zip(names, parts, strict=True)
        if space.finished(name) is None
    ]
    clock = WorkClock()
    done = config.num_images - sum(len(job["numbers"]) for job in jobs)
    with Progress("sample", config.num_images, "images", done=done) as progress:
        for result in fan_out(pipeline.session, draw_part, jobs):
            clock.add(result)
            done += result["file"]["rows"]
            progress.advance_to(done)
    records = [record for name in names if (record := space.finished(name))]
    files = [FileEntry(**record["file"]) for record in records]
    files += [FileEntry(**record["picture"]) for record in records]
    pictures = [_cells(space.folder.read(record["picture"]["path"]), record["file"]["rows"]) for record in records]
    num_labels = len(label_map or {})
    columns = num_labels if 1 < num_labels <= _MOST_COLUMNS else 8  # a column a label, where they fit
    sheet = png(grid(np.concatenate(pictures), min(columns, config.num_images), scale=2))
    space.folder.write(GRID, sheet)
    files.append(FileEntry.of(GRID, sheet))
    nll = [value for record in records for value in record["nll_nats"]]
    facts = {
        "num_images": config.num_images,
        "mean_bits_per_token": float(np.mean(nll) / np.log(2) / records[0]["num_tokens"]),
        "nll_nats": nll,
    }
    return Made(files, facts, clock.seconds)


def draw_part(job: dict[str, Any]) -> dict[str, Any]:
    """Draw some samples and write their tokens and pictures."""
    prior_artifact, vqvae_artifact = Artifact.open(Folder(job["prior"])), Artifact.open(Folder(job["vqvae"]))
    prior, vqvae = load_prior(prior_artifact), load_vqvae(vqvae_artifact)
    numbers = job["numbers"]
    labels = torch.tensor([number % job["num_labels"] for number in numbers]) if job["num_labels"] else None
    seeds = [job["seed"] + number for number in numbers]
    # A fixed batch, the last one filled up: a sample must not depend on how many share its batch.
    fill = job["batch_size"] - len(seeds)
    batch_labels = None if labels is None else torch.cat([labels, labels[-1:].expand(fill)])
    batch_seeds = [*seeds, *[seeds[-1]] * fill]
    tokens, nll_nats = draw(prior, batch_seeds, batch_labels, temperature=job["temperature"])
    tokens, nll_nats = tokens[: len(seeds)], nll_nats[: len(seeds)]
    with torch.no_grad():
        pictures = vqvae.decode(tokens).numpy()
    keys = [f"sample-{seed:09d}" for seed in seeds]
    label_list = [None] * len(numbers) if labels is None else labels.tolist()
    data = write_parquet(keys, label_list, tokens.numpy()[..., None], prior.shape, vqvae_artifact.manifest.fingerprint)
    folder, name = Folder(job["out"]), job["name"]
    folder.write(f"{name}.parquet", data)
    picture = png(np.concatenate(list(pictures), axis=0))
    folder.write(f"pictures/{name}.png", picture)
    file = FileEntry.of(f"{name}.parquet", data, rows=len(numbers))
    facts = {
        "picture": vars(FileEntry.of(f"pictures/{name}.png", picture, rows=len(numbers))),
        "nll_nats": nll_nats.tolist(),
        "num_tokens": prior.shape.num_tokens,
    }
    return write_sidecar(folder, job["work"], name, file, **facts)


def _cells(data: bytes, count: int) -> np.ndarray:
    """The pictures (N, H, W, 3) of a strip."""
    strip = decode(data)
    return strip.reshape(count, strip.shape[0] // count, *strip.shape[1:])


if __name__ == "__main__":
    from pipelines import cli, full

    cli.run(lambda arguments: full.main(arguments, until="sample"))
