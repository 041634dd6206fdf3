"""The trials of a sweep as a table, and as a picture of parallel coordinates."""

import csv
import io
import math
from collections.abc import Sequence
from typing import Any

from pipelines.objective import Objective
from pipelines.search_space import Dimension, Value

MARKDOWN, CSV, JSON, PICTURE = "table.md", "table.csv", "sweep.json", "parallel.png"
PRESET = "preset"  # the trial that is none
Row = dict[str, Any]  # trial (a number, or PRESET), values {field: value}, steps, objective, state, model


def markdown(rows: Sequence[Row], dimensions: Sequence[Dimension], objective: Objective) -> str:
    """rows: in the order that they are shown in."""
    names = [one.field.replace("_", "-") for one in dimensions]
    lines = [
        "| " + " | ".join(["trial", *names, "steps", objective.title, ""]) + " |",
        "|---|" + "---:|" * (len(names) + 2) + "---|",
    ]
    for row in rows:
        values = [_text(row["values"].get(one.field)) for one in dimensions]
        found = "-" if row["objective"] is None else f"{row['objective']:.4f}"
        lines.append("| " + " | ".join([str(row["trial"]), *values, f"{row['steps']:,}", found, row["state"]]) + " |")
    return "\n".join(lines) + "\n"


def csv_of(rows: Sequence[Row], dimensions: Sequence[Dimension]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["trial", *(one.field for one in dimensions), "steps", "objective", "state", "model"])
    for row in rows:
        values = [row["values"].get(one.field) for one in dimensions]
        writer.writerow([row["trial"], *values, row["steps"], row["objective"], row["state"], row["model"]])
    return buffer.getvalue()


def _text(value: Value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def place(value: Value, dimension: Dimension) -> float:
    """Where a value lies on its axis: 0 at the lower end, 1 at the upper one."""
    if dimension.kind == "choice":
        options = list(dimension.values)
        return options.index(value) / (len(options) - 1) if value in options else math.nan
    if not isinstance(value, int | float):
        return math.nan
    low, high = dimension.low, dimension.high
    if dimension.kind == "log":
        return math.log(value / low) / math.log(high / low) if value > 0 else math.nan
    return (value - low) / (high - low)


def parallel_coordinates(rows: Sequence[Row], dimensions: Sequence[Dimension], objective: Objective) -> bytes:
    """A PNG: an axis a field and one for the objective, a line a trial. A value that lies outside its axis ends the
    line there."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    known = [row for row in rows if row["objective"] is not None]
    values = [row["objective"] for row in known]
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    figure = Figure(figsize=(2.2 * (len(dimensions) + 1) + 1, 4.2), layout="constrained", dpi=130)
    axes = figure.subplots()
    for row in sorted(known, key=lambda row: row["trial"] == PRESET):
        heights = [place(row["values"].get(one.field), one) for one in dimensions]
        share = (row["objective"] - low) / span
        good = share if objective.mode == "max" else 1 - share
        is_default = row["trial"] == PRESET
        axes.plot(
            range(len(dimensions) + 1), [*heights, share],
            color="black" if is_default else colormaps["viridis"](good), marker="o", markersize=3,
            linewidth=2.2 if is_default else 1.4, linestyle="-" if row["model"] else ":",
        )  # fmt: skip
    for number, one in enumerate(dimensions):
        axes.axvline(number, color="0.75", linewidth=0.8, zorder=0)
        for text, height in _ticks(one):
            axes.annotate(
                text, (number, height), xytext=(6, 0), textcoords="offset points", fontsize=7, va="center", zorder=5,
                bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.85},
            )  # fmt: skip
    axes.axvline(len(dimensions), color="0.75", linewidth=0.8, zorder=0)
    for value, height in ((low, 0.0), (high, 1.0)):
        axes.annotate(f"{value:.3f}", (len(dimensions), height), xytext=(4, 0), textcoords="offset points", fontsize=7,
                      va="center")  # fmt: skip
    names = [one.field.rpartition(".")[2].replace("_", " ") for one in dimensions]
    axes.set_xticks(range(len(dimensions) + 1), [*names, objective.title.split(",")[0]], fontsize=8)
    axes.set_yticks([])
    axes.set_ylim(-0.06, 1.06)
    axes.set_xlim(-0.15, len(dimensions) + 0.35)
    axes.spines[:].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _ticks(dimension: Dimension) -> list[tuple[str, float]]:
    if dimension.kind == "choice":
        return [(_text(value), place(value, dimension)) for value in dimension.values]
    ends = (int(dimension.low), int(dimension.high)) if dimension.whole else (dimension.low, dimension.high)
    return [(_text(ends[0]), 0.0), (_text(ends[1]), 1.0)]
