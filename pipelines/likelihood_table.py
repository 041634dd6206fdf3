"""The likelihood_table stage: what each model of compare.py costs, a row a model and bound, over its seeds."""

import csv
import io
import json
import statistics
from collections.abc import Mapping
from typing import Any

from pipelines.config import PipelineConfig
from pipelines.data_report import jpeg_notes
from pipelines.measure_bits import held_out
from pipelines.stage import Made, Pipeline, Workspace
from pipelines.train_vqvae import write_files
from vqvae_core.artifacts import Artifact, FileEntry
from vqvae_core.contender import TITLES, VQ_VAE
from vqvae_core.image_shards import ImageShards

VERSION = 3
KIND = "LikelihoodTable"
MARKDOWN, CSV, JSON = "table.md", "table.csv", "table.json"
_BOUNDS = {
    "vae": "ELBO: one draw of z, KL to N(0, 1) in closed form",
    VQ_VAE: "ELBO: z is the nearest code, KL is log K a code",
}
_COLUMNS = (
    "model", "seed", "steps", "samples_in_training", "bound", "samples_of_bound", "split", "images", "reconstruction",
    "latents", "total", "latents_learned", "total_learned",
)  # fmt: skip
Row = dict[str, Any]


def likelihood_table(
    pipeline: Pipeline, config: PipelineConfig, images: ImageShards, measured: Mapping[str, Artifact]
) -> Artifact:
    """The table of measured bits; their names are model-seed. Facts: the means over seeds, and their spread."""
    compare = config.compare
    settings = {
        "likelihood": config.vqvae.likelihood.kind,
        "steps": config.train.steps,
        "train_samples": compare.train_samples,
        "first_seed": config.train.seed,
        "notes": _notes(images),
    }
    return pipeline.make(
        "likelihood_table",
        version=VERSION,
        kind=KIND,
        recipe=settings,
        inputs=measured,
        build=lambda space, run: _build(settings, measured, space),
    )


def _notes(images: ImageShards) -> list[str]:
    """What has to be said of the figures, beside what they are."""
    chosen = (
        "These images also chose each model's weights: there is no test split, which a source of single images that "
        "holds some out has with --shard.holdout-images."
    )
    return [*([chosen] if held_out(images) == "validation" else []), *jpeg_notes(images.artifact)]


def _build(settings: dict[str, Any], measured: Mapping[str, Artifact], space: Workspace) -> Made:
    rows = [row for name, artifact in measured.items() for row in rows_of(name, artifact.facts, settings)]
    summary = summarize(rows)
    text = markdown(summary, settings)
    files = {
        MARKDOWN: text.encode(),
        CSV: csv_of(rows).encode(),
        JSON: (json.dumps({"rows": rows, "models": summary}, indent=1) + "\n").encode(),
    }
    facts: dict[str, Any] = {
        "likelihood": settings["likelihood"],
        "steps": settings["steps"],
        "notes": settings["notes"],
    }
    facts |= order(rows)
    for line in summary:
        name = line["model"] if line["samples_of_bound"] is None else f"{line['model']}_{line['samples_of_bound']}"
        for key in ("reconstruction", "latents", "total", "latents_learned", "total_learned"):
            if line[key] is not None:
                facts[f"{name}.{key}"] = line[key]["mean"]
    return Made([FileEntry(**entry) for entry in write_files(space.folder, files)], facts, 0.0)


def rows_of(name: str, facts: Mapping[str, Any], settings: Mapping[str, Any]) -> list[Row]:
    """The rows of one trained model, in bits/dim: one for each bound."""
    model, _, seed = name.rpartition("-")
    row: Row = dict.fromkeys(_COLUMNS) | {
        "model": model,
        "seed": int(seed),
        "steps": settings["steps"],
        "split": facts["split"],
        "images": facts["images"],
        "reconstruction": facts.get("reconstruction_bits_per_dim"),
        "latents": facts.get("latents_bits_per_dim"),
        "total": facts["total_bits_per_dim"],
        "latents_learned": facts.get("latents_learned_bits_per_dim"),
        "total_learned": facts.get("total_learned_bits_per_dim"),
        "bound": _BOUNDS.get(model),
    }
    if model in _BOUNDS:
        return [row]
    row["samples_in_training"] = settings["train_samples"]
    return [
        {
            **row,
            "bound": f"{samples} samples",
            "samples_of_bound": samples,
            "total": facts[f"bound_{samples}_bits_per_dim"],
        }
        for samples in facts["samples"]
    ]


def summarize(rows: list[Row]) -> list[Row]:
    """Rows over their seeds: numbers become their mean, least and greatest."""
    groups: dict[tuple[str, int | None], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["samples_of_bound"]), []).append(row)
    lines = []
    for found in groups.values():
        line = {**found[0], "seeds": [row["seed"] for row in found]}
        del line["seed"]
        for key in ("reconstruction", "latents", "total", "latents_learned", "total_learned"):
            values = [row[key] for row in found if row[key] is not None]
            line[key] = None if not values else {
                "mean": statistics.fmean(values), "least": min(values), "greatest": max(values),
            }  # fmt: skip
        lines.append(line)
    return lines


def order(rows: list[Row]) -> dict[str, Any]:
    """In how many seeds VAE < VQ-VAE < VIMCO (lower is better), as in the paper, by each VIMCO's first bound, and the
    learned prior's total lies below the uniform one's."""
    first: dict[tuple[int, str], Row] = {}
    for row in rows:
        first.setdefault((row["seed"], row["model"]), row)
    seeds = sorted({row["seed"] for row in rows})
    found: dict[str, Any] = {"seeds": len(seeds)}
    if all((seed, name) in first for seed in seeds for name in ("vae", VQ_VAE, "vimco")):
        totals = [[first[seed, name]["total"] for name in ("vae", VQ_VAE, "vimco")] for seed in seeds]
        found["seeds_in_the_papers_order"] = sum(one < two < three for one, two, three in totals)
    learned = [first[seed, VQ_VAE] for seed in seeds if (seed, VQ_VAE) in first]
    if learned and all(row["total_learned"] is not None for row in learned):
        found["seeds_where_a_learned_prior_gains"] = sum(row["total_learned"] < row["total"] for row in learned)
    return found


def markdown(summary: list[Row], settings: Mapping[str, Any]) -> str:
    """The table, with what its numbers are below it."""
    head = ("model", "reconstruction", "latents", "total", "latents, learned prior", "total, learned prior", "bound")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for line in summary:
        cells = [
            _spread(line[key]) for key in ("reconstruction", "latents", "total", "latents_learned", "total_learned")
        ]
        lines.append("| " + " | ".join([TITLES[line["model"]], *cells, line["bound"]]) + " |")
    first = summary[0]
    trained = [line["samples_in_training"] for line in summary if line["samples_in_training"] is not None]
    vimco = f"; VIMCO trained with S = {trained[0]}" if trained else ""
    seeds = ", ".join(map(str, first["seeds"]))
    lines += [
        "",
        f"Bits/dim (lower is better): the mean over {first['images']:,} images of the {first['split']} split, and over "
        f"the seeds {seeds} (least to greatest). {settings['steps']:,} steps each, p(x|z): "
        f"{settings['likelihood']}{vimco}. All are bounds on -log2 p(x). The latents' cost is that "
        "under the prior of training: log2 K a code of the VQ-VAE (the uniform prior), the KL of a VAE.",
        "",
        *(line for note in settings["notes"] for line in (note, "")),
    ]
    return "\n".join(lines)


def _spread(value: dict[str, float] | None) -> str:
    if value is None:
        return "-"
    mean, least, greatest = (f"{value[key]:.3f}" for key in ("mean", "least", "greatest"))
    return mean if least == greatest else f"{mean} ({least} to {greatest})"


def csv_of(rows: list[Row]) -> str:
    """A row a model, seed and bound; empty where there is no such number."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(_COLUMNS)
    writer.writerows([row[column] for column in _COLUMNS] for row in rows)
    return buffer.getvalue()
