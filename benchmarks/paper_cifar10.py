"""The paper's likelihood table on a bare machine, without Ray, in several visits: each goes on where the last one was.

    python -m benchmarks.paper_cifar10 --data FOLDER --states FOLDER --seconds 500
    python -m benchmarks.paper_cifar10 --data FOLDER --states FOLDER --seconds 0 --measure 10000

--data has CIFAR-10 as Parquet (train*.parquet, test*.parquet; `img` or `image`, a struct with `bytes`). Each model of
the preset gets its share of --seconds (what one does not need goes to those after it), a checkpoint a minute and before
its end, and then its bits/dim on --measure test images: of the train images 5,000 are held back to validate on. It is
compare.py's loop and measures, and needs torch, numpy, pyarrow, pillow and safetensors alone. Images are held back and
ordered by a list in memory, not by shards, so that its figures are not compare.py's to the last digit, and there is no
learned prior. Of a schedule that is done the weights
that did best in validation are measured, of another the newest. Bars, once all steps are done: the VQ-VAE
at most 0.3 bits/dim above the VAE (0.16 in the paper). The last line is one JSON object.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from benchmarks.bare import VERSION, InMemory, preset, run, visit
from benchmarks.peers import Bar, report
from pipelines.config import PipelineConfig
from vqvae_core.artifacts import hash_bytes, hash_json
from vqvae_core.checkpoint import StateFolder
from vqvae_core.contender import NAMES, VQ_VAE, check_has_bits, figures, make_model, make_task
from vqvae_core.decoding import ImageError, decode
from vqvae_core.errors import InputError
from vqvae_core.order import mix, permutation
from vqvae_core.storage import Folder
from vqvae_core.train import NonFiniteLossError
from vqvae_core.vqvae import VQVAE

HELD_OUT = 5000
_READS = ("train.", "vqvae.", "compare.train-samples")
_ABOVE = 0.3


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The likelihood table of the paper, in visits.")
    parser.add_argument("--data", required=True, help="folder with CIFAR-10 as Parquet")
    parser.add_argument("--states", required=True, help="folder for checkpoints: the same again goes on from them")
    parser.add_argument("--preset", default="cifar10", choices=("cifar10", "cifar10-small"))
    parser.add_argument("--models", nargs="+", default=None, choices=NAMES)
    parser.add_argument("--seconds", type=float, default=500.0, help="of training, shared by the models")
    parser.add_argument("--steps", type=int, default=None, help="of the whole schedule; the preset's where left out")
    parser.add_argument("--measure", type=int, default=1000, help="test images that are measured; 0: none")
    parser.add_argument("--seed", type=int, default=None, help="of the schedule; the preset's where left out")
    parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="such as train.learning-rate=1e-3")
    parser.add_argument("--no-compile", action="store_true")
    options = parser.parse_args(arguments)
    return run(lambda: _measure(options))


def _measure(options: argparse.Namespace) -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = preset(options.preset, options.set, _READS, device)
    check_has_bits(config.vqvae)
    if options.measure < 0:
        raise InputError(f"expected 0 or more images after --measure, found {options.measure}")
    models = tuple(options.models or config.compare.models)
    given = {name: getattr(options, name) for name in ("seed", "steps") if getattr(options, name) is not None}
    try:
        schedule = replace(config.train, **given)
    except ValueError as error:
        raise InputError(f"expected a schedule, but: {error}") from error
    config = replace(config, train=schedule)
    train_pixels, validation, test = read_splits(Path(options.data), schedule.seed)
    rows: dict[str, dict[str, Any]] = {}
    left, failed = options.seconds, False
    for number, name in enumerate(models):
        try:
            rows[name], spent = measured(
                name, config, Path(options.states), train_pixels, validation, test[: options.measure], device,
                seconds=left / (len(models) - number), compiled=not options.no_compile,
            )  # fmt: skip
            left = max(0.0, left - spent)
        except NonFiniteLossError as error:
            rows[name], failed = {"steps": 0, "error": str(error)}, True
        print(f"{name}: {rows[name]}", flush=True)
    bars = []
    done = all(row["steps"] == schedule.steps for row in rows.values())
    if done and options.measure and {"vae", VQ_VAE} <= rows.keys():
        gap = rows[VQ_VAE]["total_bits_per_dim"] - rows["vae"]["total_bits_per_dim"]
        bars.append(Bar("bits_per_dim_of_the_vqvae_above_the_vae", gap, _ABOVE, at_most=True))
    settings = {
        "preset": options.preset, "steps": schedule.steps, "seed": schedule.seed, "measured_images": options.measure,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "precision": schedule.precision,
        "likelihood": config.vqvae.likelihood.kind, "set": options.set, "schedule_done": done,
    }  # fmt: skip
    code = report("paper_cifar10", settings, bars, {"models": rows})
    return 1 if failed else code


def measured(
    name: str,
    config: PipelineConfig,
    states: Path,
    pixels: Tensor,
    validation: Tensor,
    test: Tensor,
    device: str,
    *,
    seconds: float,
    compiled: bool,
) -> tuple[dict[str, Any], float]:
    """Train a model for so many seconds from its last state on, and measure it. Returns its figures and curve, and the
    seconds that were trained."""
    schedule, compare, mebibytes = config.train, config.compare, config.resources.decode_mebibytes
    if device == "cuda":
        mebibytes = max(mebibytes, torch.cuda.mem_get_info()[0] // 2**21)  # half of what is free
    told = {"name": name, "model": config.vqvae, "train": schedule, "samples": compare.train_samples}
    identity = hash_json({**told, "version": VERSION, "pixels": hash_bytes(pixels.numpy().tobytes())})[:16]
    folder = StateFolder(Folder.of(states) / f"{name}-{identity}", identity, keep=1)
    torch.manual_seed(mix(schedule.seed, 0) & (2**63 - 1))
    model: Any = make_model(name, config.vqvae)
    batches = InMemory(schedule, pixels)
    made = visit(
        lambda worker: make_task(
            name, model, steps=schedule.steps, steps_per_epoch=batches.order.steps_per_epoch,
            num_samples=compare.train_samples, seed=schedule.seed, precision=schedule.precision, worker=worker,
            validation=validation[: schedule.validation_images], mebibytes=mebibytes,
        ),
        batches, schedule, folder, device=device, seconds=seconds,
        compiled=compiled and name == VQ_VAE,  # the others' decodings are checkpointed, not compiled
    )  # fmt: skip
    if made is None:
        return {"steps": 0}, 0.0
    row: dict[str, Any] = {
        "steps": made.steps, "weights_of_step": made.weights_of_step, "images_per_second": made.images_per_second
    }  # fmt: skip
    if isinstance(model, VQVAE):
        model.encodes_in_bf16 = schedule.precision == "bf16"  # by the codes that it has learned with
    if len(test):
        row |= figures(name, model.eval(), test, compare.report_samples, "fp32", device, mebibytes)
    row["curve"] = made.curve("validation_bits_per_dim", "validation_reconstruction_bits_per_dim")
    return row, made.seconds


def read_splits(folder: Path, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels of the train, validation and test images, uint8 (N, 32, 32, 3). Validation: images of the train files that
    the seed draws. Raises `InputError` where the folder has no such files, or other ones."""
    train_pixels, test = (_read(folder, split) for split in ("train", "test"))
    held = min(HELD_OUT, len(train_pixels) // 2)
    shuffled = torch.from_numpy(permutation(len(train_pixels), seed))
    return train_pixels[shuffled[held:]], train_pixels[shuffled[:held]], test


def _read(folder: Path, split: str) -> Tensor:
    files = sorted(path for path in folder.glob("*.parquet") if path.name.startswith(split))
    if not files:
        raise InputError(f"expected {split}*.parquet in {folder}, found none")
    found = [picture for path in files for picture in _pictures(path)]
    shapes = {picture.shape for picture in found}
    if len(shapes) != 1:
        raise InputError(
            f"expected images of one size in {split}*.parquet of {folder}, found {sorted(shapes) or 'none'}"
        )
    return torch.from_numpy(np.stack(found))


def _pictures(path: Path) -> Iterator[np.ndarray]:
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"expected a Parquet file at {path}, but: {error}") from error
    column = next((name for name in ("img", "image") if name in table.column_names), None)
    if column is None:
        raise InputError(f"expected a column img or image in {path}, found {', '.join(table.column_names)}")
    for number, row in enumerate(table[column].to_pylist()):
        data = row.get("bytes") if isinstance(row, dict) else None
        if not isinstance(data, bytes):
            raise InputError(f"expected an image as a struct with bytes in row {number} of {path}, found none")
        try:
            yield decode(data)
        except ImageError as error:
            raise InputError(f"expected an image in row {number} of {path}, but: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
