"""The paper's first stage and prior on a bare machine, without Ray, in several visits, with their pictures.

    python -m benchmarks.paper_frames --preset dmlab84 --shards FOLDER --states FOLDER --out FOLDER --seconds 300
        --prior-seconds 200
    python -m benchmarks.paper_frames --preset imagenet128 --shards FOLDER --states FOLDER --out FOLDER --seconds 100

--shards is what pipelines/shard.py made. The VQ-VAE of the preset is trained for --seconds, from its last state on, and
judged by all validation images; then, where --prior-seconds are given, its prior on the tokens of all images, and 64
samples are drawn. It needs torch, numpy, pyarrow, pillow and safetensors alone. Images are ordered by a list in memory,
not by shards, and not augmented, so that figures are not the pipeline's to the last digit. Bars, for what is trained to
the end of its schedule: reconstructions are 3 dB above pictures that were shrunk to as many bits, and a token costs the
prior 2 bits less than its frequency alone. The last line is one JSON object.
"""

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.bare import VERSION, InMemory, Visit, preset, run, visit
from benchmarks.peers import Bar, report
from pipelines.config import PipelineConfig
from vqvae_core.artifacts import hash_json
from vqvae_core.checkpoint import StateFolder
from vqvae_core.errors import InputError
from vqvae_core.image_shards import ImageShards
from vqvae_core.images import encode, grid
from vqvae_core.order import mix
from vqvae_core.pixelcnn import PixelCNN
from vqvae_core.prior import Prior
from vqvae_core.prior_training import PriorTraining, bits_per_token, unigram_bits_per_token
from vqvae_core.storage import Folder
from vqvae_core.token_shards import TokenShape
from vqvae_core.train import autocast
from vqvae_core.train_config import TrainConfig
from vqvae_core.vqvae import VQVAE
from vqvae_core.vqvae_training import VQVAETraining, against_shrunken, comparison, evaluate

_ABOVE_DB, _GAIN_BITS = 3.0, 2.0
_SAMPLES, _COLUMNS, _BATCH = 64, 8, 64
_READS = ("train.", "vqvae.", "train-prior.", "prior.", "sample.draw.")
Split = tuple[Tensor, Tensor]  # uint8 (N, H, W, 3), and labels (N,), -1 where there is none


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="First stage and prior of the paper, in visits, with pictures.")
    parser.add_argument("--shards", required=True, help="folder of image shards, by pipelines/shard.py")
    parser.add_argument("--states", required=True, help="folder for checkpoints: the same again goes on from them")
    parser.add_argument("--out", required=True, help="folder for pictures")
    parser.add_argument("--preset", default="dmlab84", choices=("dmlab84", "imagenet128", "doom84", "smoke"))
    parser.add_argument("--seconds", type=float, default=300.0, help="of training the VQ-VAE; 0: none")
    parser.add_argument("--prior-seconds", type=float, default=0.0, help="of training the prior; 0: no prior")
    parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="such as train.steps=10000")
    parser.add_argument("--no-compile", action="store_true")
    options = parser.parse_args(arguments)
    return run(lambda: _measure(options))


def _measure(options: argparse.Namespace) -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = preset(options.preset, options.set, _READS, device)
    precision = config.train.precision
    shards = ImageShards.open(Folder.of(options.shards))
    splits = {split: read_split(shards, split) for split in ("train", "validation")}
    fingerprint = shards.artifact.manifest.fingerprint
    told = {"version": VERSION, "shards": fingerprint, "model": config.vqvae, "train": config.train}
    identity = hash_json(told)[:16]
    torch.manual_seed(mix(config.train.seed, 0) & (2**63 - 1))
    model = VQVAE(config.vqvae)
    states = StateFolder(Folder.of(options.states) / f"vqvae-{identity}", identity, keep=1)
    first = _train_vqvae(model, config, splits, states, device, options.seconds, compiled=not options.no_compile)
    if first is None:
        raise InputError(f"expected a state of the VQ-VAE in {options.states}, or --seconds above 0, found neither")
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    pixels = splits["validation"][0]
    (out / "reconstructions.png").write_bytes(comparison(model.eval(), pixels, precision, device))
    judged = evaluate(model, pixels, precision, device) | against_shrunken(config.vqvae, pixels)
    rows = {"vqvae": _shown(first) | judged}
    print(f"vqvae: {rows['vqvae']}", flush=True)
    bars = []
    if first.steps == config.train.steps:
        above = rows["vqvae"]["psnr_db"] - rows["vqvae"]["same_bits_psnr_db"]
        bars.append(Bar("db_above_shrunken_pictures_of_as_many_bits", above, _ABOVE_DB))
    if options.prior_seconds > 0:
        row = _prior(model, config, splits, shards, first, identity, Path(options.states), out, device,
                     seconds=options.prior_seconds)  # fmt: skip
        rows["prior"] = row
        print(f"prior: {row}", flush=True)
        if row["steps"] == config.train_prior.steps:
            gain = row["unigram_bits_per_token"] - row["bits_per_token"]
            bars.append(Bar("bits_per_token_below_unigram", gain, _GAIN_BITS))
    settings = {
        "preset": options.preset, "set": options.set, "precision": precision,
        "steps": config.train.steps, "prior_steps": config.train_prior.steps if options.prior_seconds > 0 else None,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "images": {split: len(pixels) for split, (pixels, _) in splits.items()}, "size": shards.size,
    }  # fmt: skip
    return report("paper_frames", settings, bars, rows)


def read_split(shards: ImageShards, split: str) -> Split:
    """All images of a split, in order. Raises `InputError` where it has none."""
    with ThreadPoolExecutor() as pool:
        samples = [sample for path in shards.shards(split) for sample in shards.read(path)]
        pixels = list(pool.map(lambda sample: sample.pixels(), samples))
    if not pixels:
        raise InputError(f"expected a {split} split in {shards.artifact.folder.uri}, found no image")
    labels = [-1 if sample.label is None else sample.label for sample in samples]
    return torch.from_numpy(np.stack(pixels)), torch.tensor(labels)


def _shown(made: Visit) -> dict[str, Any]:
    names = ("validation_psnr_db", "validation_bits_per_token")
    return {
        "steps": made.steps, "weights_of_step": made.weights_of_step, "images_per_second": made.images_per_second,
        "curve": made.curve(*names),
    }  # fmt: skip


def _train_vqvae(
    model: VQVAE,
    config: PipelineConfig,
    splits: dict[str, Split],
    states: StateFolder,
    device: str,
    seconds: float,
    *,
    compiled: bool,
) -> Visit | None:
    schedule = config.train
    batches = InMemory(schedule, splits["train"][0])
    return visit(
        lambda worker: VQVAETraining(
            model, steps=schedule.steps, steps_per_epoch=batches.order.steps_per_epoch, seed=schedule.seed,
            precision=schedule.precision, worker=worker,
            validation=splits["validation"][0][: schedule.validation_images],
        ),
        batches, schedule, states, device=device, seconds=seconds, compiled=compiled,
    )  # fmt: skip


@torch.no_grad()
def tokens_of(model: VQVAE, pixels: Tensor, schedule: TrainConfig, device: str) -> Tensor:
    """int64 (N, H/4, W/4, G) of uint8 (N, H, W, 3)."""
    found = []
    for part in pixels.split(_BATCH):
        with autocast(device, schedule.precision):
            found.append(model.encode(part.to(device)).cpu().long())
    tokens = torch.cat(found)
    return tokens if tokens.dim() == 4 else tokens[..., None]


def _prior(
    model: VQVAE,
    config: PipelineConfig,
    splits: dict[str, Split],
    shards: ImageShards,
    first: Visit,
    identity: str,
    states: Path,
    out: Path,
    device: str,
    *,
    seconds: float,
) -> dict[str, Any]:
    """Train the prior on the tokens that the VQ-VAE makes now, judge it, and draw its samples."""
    schedule, quantizer = config.train_prior, config.vqvae.quantizer
    tokens = {split: tokens_of(model, pixels, config.train, device) for split, (pixels, _) in splits.items()}
    labels = {split: labels for split, (_, labels) in splits.items()}
    _, height, width, num_groups = tokens["train"].shape
    shape = TokenShape(height=height, width=width, num_groups=num_groups, num_codes=quantizer.num_codes)
    label_map = (shards.label_map or None) if config.prior.use_labels else None
    identity = hash_json({"tokens": [identity, first.weights_of_step], "model": config.prior, "train": schedule})[:16]
    torch.manual_seed(mix(schedule.seed, 0) & (2**63 - 1))
    network = PixelCNN(config.prior, shape, len(label_map or {}))
    some = slice(None, schedule.validation_images)
    made = visit(
        lambda worker: PriorTraining(
            network, seed=schedule.seed, precision=schedule.precision, worker=worker,
            validation=(tokens["validation"][some], labels["validation"][some]),
        ),
        InMemory(schedule, tokens["train"], labels["train"]), schedule,
        StateFolder(Folder.of(states) / f"prior-{identity}", identity, keep=1), device=device, seconds=seconds,
    )  # fmt: skip
    assert made is not None, "seconds are above 0"
    prior = Prior(network.eval(), label_map, identity)
    classes = network.num_classes
    told = [seed % classes for seed in range(_SAMPLES)] if classes else None
    drawn = prior.sample(_SAMPLES, labels=told, draw=config.sample.draw, batch_size=_SAMPLES)
    pictures = model.decode(drawn.tokens.to(device)).cpu().numpy()
    (out / "samples.png").write_bytes(encode(grid(pictures, _COLUMNS), "png"))
    found, unigram = tokens["validation"], unigram_bits_per_token(tokens["validation"], quantizer.num_codes)
    return {
        **_shown(made),
        "bits_per_token": bits_per_token(network, found, labels["validation"], schedule.precision, device),
        "unigram_bits_per_token": unigram,
    }


if __name__ == "__main__":
    sys.exit(main())
