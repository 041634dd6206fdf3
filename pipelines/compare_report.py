"""comparison.html: one self-contained page on a likelihood table."""

import csv
import html
import io
import json
from collections.abc import Mapping
from typing import Any

from pipelines.data_report import SHEET
from pipelines.likelihood_table import CSV, JSON
from pipelines.report import curves_of, page, picture, stage_table
from pipelines.stage import StageReport
from pipelines.train_vqvae import RECONSTRUCTIONS
from vqvae_core.artifacts import Artifact
from vqvae_core.contender import TITLES, VQ_VAE

REPORT = "comparison.html"
_CURVES = ("validation_bits_per_dim", "validation_reconstruction_bits_per_dim")


def make_compare_report(
    name: str,
    reports: list[StageReport],
    models: Mapping[str, Artifact],
    table: Artifact,
    config: Mapping[str, Any],
    seconds: float,
) -> bytes:
    """The page as HTML. models: the trained ones by model-seed. table: of likelihood_table."""
    found = json.loads(table.read(JSON))
    shards = next(report.artifact for report in reports if report.name == "shard")
    parts = [
        f"<p class=lead>Models with the same encoder, decoder, data and schedule. This run took {seconds:.0f} s.</p>",
        "<h2>Bits/dim</h2>",
        _table(found["models"]),
        f"<p><small>{html.escape(_words(found['models'], table.facts))}</small></p>",
        "<details><summary>Every seed</summary>",
        _rows(table.read(CSV).decode()),
        "</details>",
        "<h2>Training</h2>",
        f"<div class=curves>{_curves(models)}</div>",
        "<h2>Reconstructions</h2>",
        *[
            picture(model, RECONSTRUCTIONS, f"{TITLES[kind]}, seed {seed}: validation images over reconstructions.")
            for kind, seed, model in _first_of_each(models)
        ],
        "<h2>Data</h2>",
        picture(shards, SHEET, "Images of the train split, as they are in the shards."),
        "<h2>Stages</h2>",
        stage_table(reports),
        "<details><summary>Configuration of this run</summary><pre>",
        html.escape(json.dumps(config, indent=1)),
        "</pre></details>",
    ]
    return page(f"{name}: likelihoods", parts)


def _first_of_each(models: Mapping[str, Artifact]) -> list[tuple[str, str, Artifact]]:
    first: dict[str, tuple[str, str, Artifact]] = {}
    for name, model in models.items():
        kind, _, seed = name.rpartition("-")
        first.setdefault(kind, (kind, seed, model))
    return list(first.values())


def _table(lines: list[dict[str, Any]]) -> str:
    keys = {
        "reconstruction": "Reconstruction",
        "latents": "Latents",
        "total": "Total",
        "latents_learned": "Latents, learned prior",
        "total_learned": "Total, learned prior",
    }
    head = "".join(f"<th>{title}</th>" for title in ("Model", *keys.values(), "Bound"))
    rows = []
    for line in lines:
        cells = "".join(f"<td>{_cell(line[key])}</td>" for key in keys)
        rows.append(f"<tr><th>{TITLES[line['model']]}</th>{cells}<td><small>{line['bound']}</small></td></tr>")
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _cell(value: dict[str, float] | None) -> str:
    if value is None:
        return "-"
    least, greatest = f"{value['least']:.3f}", f"{value['greatest']:.3f}"
    spread = "" if least == greatest else f"<br><small>{least} to {greatest}</small>"
    return f"{value['mean']:.3f}{spread}"


def _words(lines: list[dict[str, Any]], facts: Mapping[str, Any]) -> str:
    first = lines[0]
    words = (
        f"Lower is better. Means over {first['images']:,} images of the {first['split']} split, then over "
        f"{facts['seeds']} seeds, with the least and the greatest. {first['steps']:,} steps each, p(x|z): "
        f"{facts['likelihood']}. All are bounds on -log2 p(x), for each of an image's height x width x 3 values. "
        "Latents: under the prior of training, log2 K a code or the KL."
    )
    if "seeds_in_the_papers_order" in facts:
        count = facts["seeds_in_the_papers_order"]
        words += f" VAE < VQ-VAE < VIMCO, the paper's order, in {count} of {facts['seeds']} seeds."
    return " ".join([words, *facts["notes"]])


def _rows(text: str) -> str:
    rows = list(csv.reader(io.StringIO(text)))
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td><small>{html.escape(_short(cell))}</small></td>" for cell in row) + "</tr>"
        for row in rows[1:]
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _short(cell: str) -> str:
    return f"{float(cell):.4f}" if "." in cell and cell.replace(".", "").isdigit() else cell


def _curves(models: Mapping[str, Artifact]) -> str:
    parts = []
    for key, title in zip(_CURVES, ("Bound on validation images (bits/dim)", "VQ-VAE: reconstruction of validation "
                                     "images (bits/dim)"), strict=True):  # fmt: skip
        kinds = [name for name in models if (name.rpartition("-")[0] == VQ_VAE) == (key == _CURVES[1])]
        histories = {name: json.loads(models[name].read("history.json")) for name in kinds}
        if histories:
            parts.append(curves_of(title, histories, key))
    return "".join(parts)
