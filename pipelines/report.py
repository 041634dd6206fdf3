"""report.html: one self-contained page on a run. Made from artifacts alone, so it can be made again at any time."""

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipelines.data_report import REPORT as DATA_REPORT
from pipelines.data_report import SHEET
from pipelines.evaluate import FIGURES, PICTURE, card_text
from pipelines.plan import SPLITS
from pipelines.sample import GRID
from pipelines.stage import StageReport
from pipelines.train_vqvae import RECONSTRUCTIONS
from vqvae_core.artifacts import Artifact
from vqvae_core.token_shards import TokenShards

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2330; max-width: 1120px; margin: 2.5rem auto; }
body { padding: 0 1.5rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { font-size: 1.2rem; margin-top: 2.4rem; }
p.lead, td small, figcaption { color: #5b6577; }
table { border-collapse: collapse; width: 100%; } th { text-align: left; font-weight: 600; }
th, td { padding: .35rem .8rem .35rem 0; border-bottom: 1px solid #e3e7ee; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
img { max-width: 100%; image-rendering: pixelated; border-radius: 4px; } figure { margin: 1rem 0; }
.curves { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; } .curves img { image-rendering: auto; }
details { margin-top: 2rem; } pre { background: #f5f7fa; padding: 1rem; overflow: auto; font-size: 12px; }
"""


def make_report(name: str, reports: list[StageReport], config: Mapping[str, Any], seconds: float) -> bytes:
    """The page as HTML. reports: what happened to each stage of this run."""
    stages = {report.name: report.artifact for report in reports}
    parts = [
        f"<p class=lead>Raw frames to tokens, a prior, samples and figures. This run took {seconds:.0f} s.</p>",
        "<h2>Data</h2>",
        picture(stages["shard"], SHEET, "Images of the train split, as they are in the shards."),
        _data(stages["shard"]),
        "<h2>Reconstructions</h2>",
        picture(stages["train_vqvae"], RECONSTRUCTIONS, "Validation images; below them their reconstructions."),
        "<h2>Samples of the prior</h2>",
        picture(stages["sample"], GRID, "Tokens drawn from the prior, one seed each, decoded."),
        "<h2>Evaluation on held-out images</h2>",
        picture(
            stages["evaluate"],
            PICTURE,
            "Originals over reconstructions: the worst by PSNR, the middle and the best, each from low to high.",
        ),
        _evaluation(stages["evaluate"]),
        "<h2>Numbers</h2>",
        _numbers(stages),
        "<h2>Training</h2>",
        f"<div class=curves>{_curves(stages)}</div>",
        "<h2>Stages</h2>",
        stage_table(reports),
        "<details><summary>Configuration of this run</summary><pre>",
        html.escape(json.dumps(config, indent=1)),
        "</pre></details>",
    ]
    return page(name, parts)


def page(title: str, parts: Sequence[str]) -> bytes:
    """A whole page in this project's style."""
    text = html.escape(title)
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{text}</title><style>{_STYLE}</style>"
    return (head + f"<body><h1>{text}</h1>" + "\n".join(parts) + "</body></html>\n").encode()


def _image(data: bytes, caption: str, kind: str = "png") -> str:
    encoded = base64.b64encode(data).decode()
    text = html.escape(caption)
    return (
        f'<figure><img alt="{text}" src="data:image/{kind};base64,{encoded}"><figcaption>{text}</figcaption></figure>'
    )


def picture(artifact: Artifact, path: str, caption: str) -> str:
    """A PNG of an artifact, with its caption."""
    return _image(artifact.read(path), caption)


def _data(shards: Artifact) -> str:
    """What the shard stage counted."""
    report, facts = json.loads(shards.read(DATA_REPORT)), shards.facts
    splits = facts["splits"]
    there = [split for split in SPLITS if split in splits]
    sides = ", ".join(f"{name}: {count:,}" for name, count in report["shorter_side"].items() if count)
    kinds = ", ".join(f"{name}: {count:,}" for name, count in report["kinds"].items())
    rejects, ignored = (
        ", ".join(f"{name}: {count:,}" for name, count in report[what].items()) for what in ("rejects", "ignored")
    )
    counts = [sum(each.values()) for each in report["levels"].values()]
    duplicates = report["exact_duplicates"]
    rows = [
        ("Images", " + ".join(f"{splits[split]['images']:,}" for split in there),
         f"{' + '.join(there)}, out of {facts['source_images']:,} taken of the source"),
        ("Rejected", f"{sum(report['rejects'].values()):,}", rejects or "none"),
        ("Ignored", f"{sum(report['ignored'].values()):,}",
         "files that are no images, by extension, and of a test split of the source that is not used: "
         f"{ignored or 'none'}"),
        ("Exact duplicates", "not counted" if duplicates is None else f"{duplicates:,}",
         "files with the same bytes as another one before; they are kept"),
        ("Source size", " x ".join(_range(*report[name]) for name in ("width", "height")),
         f"width x height in pixels; shorter side {sides}; {report['enlarged']:,} enlarged"),
        ("Source files", f"{len(report['kinds'])} kind{'s' * (len(report['kinds']) != 1)}", kinds),
        ("Labels", f"{len(counts):,}", _spread(counts)),
        ("Mean", _channels(report["mean"]), "of the train split's pixels, red, green, blue, in 0 to 255"),
        ("Deviation", _channels(report["deviation"]), "standard deviation of the same"),
    ]  # fmt: skip
    return _table(rows)


def _range(low: int, high: int) -> str:
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _spread(counts: list[int]) -> str:
    return f"with {_range(min(counts), max(counts))} images each" if counts else "the source has none"


def _channels(values: list[float]) -> str:
    return " / ".join(f"{value:.1f}" for value in values)


def _table(rows: list[tuple[str, str, str]]) -> str:
    lines = [
        f"<tr><th>{name}</th><td class=number>{value}</td><td><small>{html.escape(meaning)}</small></td></tr>"
        for name, value, meaning in rows
    ]
    return f"<table>{''.join(lines)}</table>"


def _numbers(stages: Mapping[str, Artifact]) -> str:
    model, prior = stages["train_vqvae"].facts, stages["train_prior"].facts
    rows = [
        (
            "PSNR",
            f"{model['psnr_db']:.2f} dB",
            "of reconstructions, from the mean squared error over every pixel of the validation split, peak 255",
        ),
        (
            "over shrinking",
            f"{model['psnr_db'] - model['shrunken_psnr_db']:+.2f} dB",
            f"against the same images shrunk to {model['shrunken_side']} x {model['shrunken_side']} pixels and "
            "enlarged, bicubic",
        ),
        (
            "over equal bits",
            f"{model['psnr_db'] - model['same_bits_psnr_db']:+.2f} dB",
            f"against {model['same_bits_side']} x {model['same_bits_side']} pixels of 24 bits: about the bits of the "
            "tokens",
        ),
        (
            "Perplexity",
            f"{model['perplexity']:.0f} of {model['K']}",
            "2 to the entropy of code use over the validation split",
        ),
        ("Codes in use", f"{100 * model['usage']:.1f} %", "that occur at all in the validation split"),
        (
            "Prior",
            f"{prior['bits_per_token']:.3f} bits/token",
            "-log2 p(tokens | label), the mean over the validation split",
        ),
        (
            "Unigram entropy",
            f"{prior['unigram_bits_per_token']:.3f} bits/token",
            "of the same tokens: the least that a prior without context costs",
        ),
        (
            "Latents, learned prior",
            f"{prior['latent_bits_per_dim']:.4f} bits/dim",
            "the prior's bits an image over height x width x 3",
        ),
        ("Latents, uniform prior", f"{prior['latent_bits_per_dim_uniform']:.4f} bits/dim", "log2 K for each token"),
    ]
    return _table(rows)


def _evaluation(evaluation: Artifact) -> str:
    """What the evaluate stage found, and what its figures depend on."""
    found = json.loads(evaluation.read(FIGURES))
    lead = (
        f"{found['num_images']:,} images of the {found['split']} split, {found['image_size']} x {found['image_size']}."
    )
    rows = [
        (figure["label"], figure["text"], figure["definition"] if figure["reason"] is None else figure["reason"])
        for figure in found["figures"].values()
    ]
    cards = [
        f"<p><small>{title}: {html.escape(card_text(card))}.</small></p>"
        for title, card in (("FID", found["card"]), ("LPIPS", found["lpips_card"]))
        if card is not None
    ]
    notes = [f"<p><small>{html.escape(note)}</small></p>" for note in found["notes"]]
    return "".join([f"<p>{lead}</p>", _table(rows), *cards, *notes])


def _curves(stages: Mapping[str, Artifact]) -> str:
    vqvae = json.loads(stages["train_vqvae"].read("history.json"))
    prior = json.loads(stages["train_prior"].read("history.json"))
    tokens = TokenShards(stages["tokenize"])
    counts = sum(
        np.bincount(tokens.read(path).tokens.reshape(-1), minlength=tokens.shape.num_codes)
        for path in tokens.shards("validation")
    )
    if any("mse" in point for point in vqvae):
        loss = _plot("VQ-VAE: mean squared error of a batch, images in [-1, 1]", vqvae, ["mse"], log=True)
    else:
        loss = _plot("VQ-VAE: -log p(x | z) of a batch, nats an image", vqvae, ["nll_nats"])
    return "".join(
        [
            loss,
            _plot("VQ-VAE: PSNR on validation images (dB)", vqvae, ["validation_psnr_db"]),
            _plot("Prior: bits/token", prior, ["bits_per_token", "validation_bits_per_token"]),
            _bars("Use of codes on the validation split, by rank", np.sort(counts)[::-1] / np.sum(counts)),
        ]
    )


def _plot(title: str, history: list[dict[str, float]], names: list[str], *, log: bool = False) -> str:
    figure, axes = _axes(title)
    for name in names:
        points = [(point["step"], point[name]) for point in history if name in point]
        marker = "o" if name.startswith("validation") else None
        axes.plot(*zip(*points, strict=True), marker=marker, markersize=4, linewidth=1.4, label=name)
    if log:
        axes.set_yscale("log")
    axes.set_xlabel("step")
    if len(names) > 1:
        axes.legend(frameon=False)
    return _svg(figure, title)


def curves_of(title: str, histories: Mapping[str, list[dict[str, float]]], metric: str) -> str:
    """One metric of several trainings, by name."""
    figure, axes = _axes(title)
    for name, history in histories.items():
        points = [(point["step"], point[metric]) for point in history if metric in point]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1.2, label=name)
    axes.set_xlabel("step")
    axes.legend(frameon=False, fontsize=7)
    return _svg(figure, title)


def _bars(title: str, shares: np.ndarray) -> str:
    figure, axes = _axes(title)
    axes.fill_between(np.arange(len(shares)), 100 * shares, step="mid", alpha=0.8)
    axes.set_xlabel("code, most used first")
    axes.set_ylabel("% of tokens")
    return _svg(figure, title)


def _axes(title: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    figure = Figure(figsize=(5.4, 3.0), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def _svg(figure: Any, title: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(title)}" src="data:image/svg+xml;base64,{encoded}">'


def stage_table(reports: list[StageReport]) -> str:
    """What was made and what reused."""
    lines = ["<tr><th>Stage</th><th>This run</th><th>Seconds when made</th><th>of which work</th><th>Folder</th></tr>"]
    for report in reports:
        made = report.artifact.manifest.provenance
        lines.append(
            f"<tr><td>{report.name}</td><td>{'reused' if report.reused else 'made'}</td>"
            f"<td>{made['seconds']:.1f}</td><td>{made['work_seconds']:.1f}</td>"
            f"<td><small>{html.escape(report.artifact.folder.uri)}</small></td></tr>"
        )
    return f"<table>{''.join(lines)}</table>"
