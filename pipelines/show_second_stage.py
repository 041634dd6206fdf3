"""The show_second_stage stage: one table of all trainings of the second stage, and pictures of the first one's codes.

Pictures: frames, their reconstructions by the first stage, and grids drawn for their codes; and a walk that changes one
code where the others and the noise stay.
"""

import csv
import io
import json
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from pipelines import ray_train
from pipelines.config import SecondStageRuns, recipe_of
from pipelines.stage import Made, Pipeline, Workspace
from pipelines.train_vqvae import png, write_files
from vqvae_core.artifacts import Artifact, FileEntry
from vqvae_core.augment import centre_crop
from vqvae_core.image_shards import ImageShards
from vqvae_core.images import grid
from vqvae_core.order import mix
from vqvae_core.second_stage import SecondStage
from vqvae_core.token_shards import TokenShards
from vqvae_core.vqvae import VQVAE

VERSION = 3
KIND = "SecondStageReport"
DECODINGS, WALK, TABLE = "decodings.png", "walk.png", "table.json"
_SCALE = 2

Row = dict[str, float]
# What each column is: read by the table, the report and docs/second_stage.md.
COLUMNS: dict[str, tuple[str, str]] = {
    "nll_nats": ("NLL with z", "-log p(tokens | z), nats an image, of the VQ-VAE"),
    "shuffled_nll_nats": ("NLL with z shuffled", "the same with the z of another image"),
    "blank_nll_nats": ("NLL without z", "of the same decoder, trained for as many steps with z blanked"),
    "gain_over_shuffled_nats": ("gain over shuffled", "NLL with z shuffled - NLL with z"),
    "gain_over_blank_nats": ("gain over no z", "NLL without z - NLL with z"),
    "total_nats": ("NLL + codes", "NLL with z + log K for each code: a bound on -log p(tokens)"),
    "codes_nats": ("entropy of the codes", "the sum of those of their use: the most nats an image that z can tell"),
    "perplexity": ("perplexity of latent", "2 to the entropy of code use over the validation split"),
    "usage": ("usage of latent", "the share of its codes that occur in the validation split"),
    "vae_kl_nats": ("KL of the VAE", "of the Gaussian posterior to N(0, 1), nats an image; near 0: collapsed"),
    "vae_nll_nats": ("NLL of the VAE", "-log p(tokens | z) for a draw of z, nats an image"),
    "vae_total_nats": ("NLL + KL of the VAE", "the negative ELBO: a bound on -log p(tokens)"),
}
_SPREAD = ("mean", "min", "max")


def show_second_stage(
    pipeline: Pipeline,
    config: SecondStageRuns,
    images: ImageShards,
    vqvae: Artifact,
    tokens: TokenShards,
    models: Sequence[Mapping[str, Artifact]],
) -> Artifact:
    """models: by kind of latents, for each run. Facts: each number of the table by `<column>_run_<i>`, and its mean,
    least and largest by `<column>_mean`, `_min`, `_max`."""
    trained = {f"{kind}_{number}": model for number, run in enumerate(models) for kind, model in run.items()}
    recipe = {name: value for name, value in recipe_of(config).items() if name != "seeds"}  # as many as there are
    return pipeline.make(
        "show_second_stage",
        version=VERSION,
        kind=KIND,
        recipe=recipe,
        inputs={"images": images.artifact, "vqvae": vqvae, "tokens": tokens.artifact, **trained},
        build=lambda space, run: _build(pipeline, config, images, vqvae, tokens, models, space),
    )


def _build(
    pipeline: Pipeline,
    config: SecondStageRuns,
    images: ImageShards,
    vqvae: Artifact,
    tokens: TokenShards,
    models: Sequence[Mapping[str, Artifact]],
    space: Workspace,
) -> Made:
    begin = time.time()
    rows = [figures_of({kind: model.facts for kind, model in run.items()}) for run in models]
    seeds = [run["codes"].facts["seed"] for run in models]
    first = SecondStage.of(models[0]["codes"])
    pixels, known = _frames(config, images, tokens)
    with torch.no_grad():
        pictures = drawn(config, first, VQVAE.of(vqvae), centre_crop(pixels, vqvae.facts["image_size"]), known)
    files = {
        TABLE: (json.dumps(table_json(rows, seeds), indent=1) + "\n").encode(),
        "table.csv": table_csv(rows, seeds).encode(),
        "table.md": table_markdown(rows, seeds).encode(),
        **pictures,
    }
    numbers = {f"{name}_run_{number}": value for number, row in enumerate(rows) for name, value in row.items()}
    numbers |= {f"{name}_{which}": value for name, spread in spread_of(rows).items() for which, value in spread.items()}
    facts = {
        "runs": len(rows),
        "steps": models[0]["codes"].facts["steps"],
        "validation_images": models[0]["codes"].facts["validation_images"],
        **numbers,
        "device": ray_train.describe(pipeline.resources),
    }
    entries = [FileEntry(**entry) for entry in write_files(space.folder, files)]
    return Made(entries, facts, time.time() - begin)


def _frames(config: SecondStageRuns, images: ImageShards, tokens: TokenShards) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels (N, H, W, 3) and tokens (N, H/4, W/4, G) of a few validation frames, drawn by the seed: only their shards
    are read."""
    generator = torch.Generator().manual_seed(mix(config.seed, 7) & (2**63 - 1))
    chosen = torch.randperm(images.num_images("validation"), generator=generator)[: config.num_frames].tolist()
    found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    first = 0
    for path in images.shards("validation"):
        stop = first + images.artifact.files[path].rows
        mine = [number for number in chosen if first <= number < stop]
        if mine:
            samples, table = images.read(path), tokens.read(f"{path.removesuffix('.tar')}.parquet")
            for number in mine:
                found[number] = samples[number - first].pixels(), table.tokens[number - first].astype(np.int64)
        first = stop
    pixels, known = zip(*(found[number] for number in chosen), strict=True)
    return torch.from_numpy(np.stack(pixels)), torch.from_numpy(np.stack(known))


def figures_of(facts: Mapping[str, Mapping[str, Any]]) -> Row:
    """One row of the table from the facts of a run's three models."""
    codes, none, vae = facts["codes"], facts["none"], facts["gaussian"]
    row = {name: codes[name] for name in ("nll_nats", "shuffled_nll_nats")}
    row["blank_nll_nats"] = none["nll_nats"]
    row["gain_over_shuffled_nats"] = codes["shuffled_nll_nats"] - codes["nll_nats"]
    row["gain_over_blank_nats"] = none["nll_nats"] - codes["nll_nats"]
    row["total_nats"] = codes["total_nats"]
    perplexities = {name: codes[name] for name in codes if name.startswith("perplexity_")}
    row["codes_nats"] = sum(map(math.log, perplexities.values()))
    row |= perplexities | {name: codes[name] for name in codes if name.startswith("usage_")}
    return row | {f"vae_{name}": vae[name] for name in ("kl_nats", "nll_nats", "total_nats")}


def spread_of(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Mean, least and largest of each number over the runs."""
    found = {name: [row[name] for row in rows] for name in rows[0]}
    return {
        name: {"mean": sum(values) / len(values), "min": min(values), "max": max(values)}
        for name, values in found.items()
    }


def title(name: str) -> str:
    """The heading of a column."""
    stem, _, number = name.rpartition("_")
    return COLUMNS[name][0] if name in COLUMNS else f"{COLUMNS[stem][0]} {number}"


def table_json(rows: Sequence[Row], seeds: Sequence[int]) -> dict[str, Any]:
    return {
        "columns": {name: meaning for name, (_, meaning) in COLUMNS.items()},
        "runs": [{"seed": seed, **row} for seed, row in zip(seeds, rows, strict=True)],
        "spread": spread_of(rows),
    }


def table_csv(rows: Sequence[Row], seeds: Sequence[int]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["seed", *rows[0]])
    writer.writerows([seed, *row.values()] for seed, row in zip(seeds, rows, strict=True))
    spread = spread_of(rows)
    writer.writerows([which, *(spread[name][which] for name in rows[0])] for which in _SPREAD)
    return out.getvalue()


def table_markdown(rows: Sequence[Row], seeds: Sequence[int]) -> str:
    """A column a run, since there are more numbers than runs."""
    lines = [["", *(f"seed {seed}" for seed in seeds), "mean (min to max)"]]
    lines += [[title(name), *cells, spread] for name, cells, spread in cells_of(rows)]
    lines.insert(1, ["---", *["---:"] * (len(lines[0]) - 1)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cells_of(rows: Sequence[Row]) -> list[tuple[str, list[str], str]]:
    """For each column: its name, a number for each run, and their spread, as text."""
    return [
        (name, [f"{row[name]:.2f}" for row in rows], f"{one['mean']:.2f} ({one['min']:.2f} to {one['max']:.2f})")
        for name, one in spread_of(rows).items()
    ]


def drawn(
    config: SecondStageRuns, second: SecondStage, vqvae: VQVAE, pixels: torch.Tensor, tokens: torch.Tensor
) -> dict[str, bytes]:
    """Two sheets, PNG files by name. pixels: (N, H, W, 3), tokens: (N, H/4, W/4, G), of the frames to show."""
    frames = pixels.numpy()
    codes = second.encode(tokens)
    rebuilt = _decoded(vqvae, tokens)
    seeds = range(config.seed, config.seed + config.num_draws)
    repeated = codes.repeat_interleave(config.num_draws, dim=0)
    made = second.sample(repeated, [*seeds] * len(codes), draw=config.draw)
    cells = _decoded(vqvae, made.tokens).reshape(len(codes), config.num_draws, *frames.shape[1:])
    decodings = np.concatenate([frames[:, None], rebuilt[:, None], cells], axis=1)
    walk = _walk(config, second, vqvae, codes[0], rebuilt[0])
    return {
        DECODINGS: png(grid(decodings.reshape(-1, *frames.shape[1:]), decodings.shape[1], scale=_SCALE)),
        WALK: png(grid(walk, 1 + config.num_changes, scale=_SCALE)),
    }


def _walk(
    config: SecondStageRuns, second: SecondStage, vqvae: VQVAE, codes: torch.Tensor, rebuilt: np.ndarray
) -> np.ndarray:
    """A row for each latent: the frame, then drawings by one seed where this latent's code is its own, then others out
    of its table and all other codes stay."""
    num_latents = len(codes)
    generator = torch.Generator().manual_seed(mix(config.seed, 8) & (2**63 - 1))
    num_codes = second.network.config.quantizer.num_codes
    changed = codes.repeat(num_latents, config.num_changes, 1)
    for latent in range(num_latents):
        others = torch.randperm(num_codes, generator=generator)
        others = others[others != codes[latent].cpu()].to(codes.device)
        count = config.num_changes - 1
        if len(others):  # a table of one code has no other
            changed[latent, 1:, latent] = others.repeat(-(-count // len(others)))[:count]
    rows = changed.flatten(0, 1)
    made = _decoded(vqvae, second.sample(rows, [config.seed] * len(rows), draw=config.draw).tokens)
    made = made.reshape(num_latents, config.num_changes, *rebuilt.shape)
    first = np.broadcast_to(rebuilt, (num_latents, 1, *rebuilt.shape))
    return np.concatenate([first, made], axis=1).reshape(-1, *rebuilt.shape)


def _decoded(vqvae: VQVAE, tokens: torch.Tensor) -> np.ndarray:
    """Pixels of tokens (N, H, W), or (N, H, W, G), one at a time: how many there are rounds no pixel otherwise."""
    grids = tokens[..., 0] if tokens.dim() == 4 and tokens.shape[3] == 1 else tokens
    return torch.cat([vqvae.decode(one) for one in grids.split(1)]).cpu().numpy()


def tell(pipeline: Pipeline) -> None:
    """The line to read, on the terminal."""
    facts = next(report.artifact.facts for report in pipeline.reports if report.name == "show_second_stage")

    def spread(name: str) -> str:
        return f"{facts[f'{name}_mean']:.1f} ({facts[f'{name}_min']:.1f} to {facts[f'{name}_max']:.1f})"

    print(f"second stage, nats an image, mean (min to max) of {facts['runs']} seeds: NLL with z {spread('nll_nats')}")
    print(f"  {spread('gain_over_shuffled_nats')} below shuffled z, {spread('gain_over_blank_nats')} below no z")
    latents = sorted(name[:-5] for name in facts if name.startswith("perplexity_") and name.endswith("_mean"))
    print(f"  perplexities {', '.join(spread(name) for name in latents)}; KL of the VAE {spread('vae_kl_nats')}")
