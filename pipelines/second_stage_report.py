"""second_stage.html: one self-contained page on a run of the second stage."""

import html
import json
from collections.abc import Mapping
from typing import Any

from pipelines.report import curves_of, page, picture, stage_table
from pipelines.show_second_stage import COLUMNS, DECODINGS, TABLE, WALK, cells_of, title
from pipelines.stage import StageReport
from pipelines.train_vqvae import RECONSTRUCTIONS

REPORT = "second_stage.html"
_KINDS = {"codes": "codes", "none": "no z", "gaussian": "VAE"}


def make_second_stage_report(name: str, reports: list[StageReport], config: Mapping[str, Any], seconds: float) -> bytes:
    """The page as HTML. reports: what happened to each stage of this run."""
    stages = {report.name: report.artifact for report in reports}
    shown = stages["show_second_stage"]
    histories = {kind: _histories(reports, kind) for kind in _KINDS}
    every = {label: history for found in histories.values() for label, history in found.items()}
    codes, vae = histories["codes"], histories["gaussian"]
    parts = [
        f"<p class=lead>A second VQ-VAE over the tokens of the first. This run took {seconds:.0f} s.</p>",
        "<h2>Codes of whole images</h2>",
        picture(shown, DECODINGS, "A validation frame a row: itself, its reconstruction by the first stage, then "
                "drawings of the decoder that is told its codes and nothing else, one seed each."),
        picture(shown, WALK, "A latent a row: the reconstruction of a frame, a drawing for its codes, then drawings "
                "where this latent's code is another one, and the others and the seed stay."),
        "<h2>Numbers</h2>",
        f"<p>Of {shown.facts['validation_images']:,} validation images, each model at its best validation of "
        f"{shown.facts['steps']:,} steps.</p>",
        _table(json.loads(shown.read(TABLE))["runs"]),
        "<h2>Training</h2>",
        "<div class=curves>",
        curves_of("NLL on validation images (nats an image)", every, "validation_nll_nats"),
        curves_of("Codes: the same with z shuffled", codes, "validation_shuffled_nll_nats"),
        curves_of("Codes: mean perplexity over an epoch", codes, "epoch_perplexity"),
        curves_of("VAE: KL on validation images (nats an image)", vae, "validation_kl_nats"),
        "</div>",
        "<h2>First stage</h2>",
        picture(stages["train_vqvae"], RECONSTRUCTIONS, "Validation images; below them their reconstructions."),
        "<h2>Stages</h2>",
        stage_table(reports),
        "<details><summary>Configuration of this run</summary><pre>",
        html.escape(json.dumps(config, indent=1)),
        "</pre></details>",
    ]  # fmt: skip
    return page(f"{name}: second stage", parts)


def _histories(reports: list[StageReport], kind: str) -> dict[str, list[dict[str, float]]]:
    """The curves of each training of a kind of latents."""
    return {
        f"{_KINDS[kind]}, seed {report.artifact.facts['seed']}": json.loads(report.artifact.read("history.json"))
        for report in reports
        if report.name == f"train_second_stage_{kind}"
    }


def _table(runs: list[dict[str, float]]) -> str:
    """A column a run, with what each number means."""
    rows = [{name: value for name, value in run.items() if name != "seed"} for run in runs]
    head = ["", *(f"seed {run['seed']}" for run in runs), "mean (min to max)", ""]
    lines = [f"<tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr>"]
    for name, cells, spread in cells_of(rows):
        meaning = COLUMNS[name if name in COLUMNS else name.rpartition("_")[0]][1]
        numbers = "".join(f"<td class=number>{cell}</td>" for cell in (*cells, spread))
        lines.append(f"<tr><th>{title(name)}</th>{numbers}<td><small>{html.escape(meaning)}</small></td></tr>")
    return f"<table>{''.join(lines)}</table>"
