"""The evaluate stage: what a VQ-VAE and its prior are worth on held-out images, each figure with its definition.

The split is test where the images have one, else validation. Shards are measured one by one (`meter.py`); the driver
puts what was found together.
"""

import io
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from pipelines import ray_train
from pipelines.config import EvaluateConfig
from pipelines.data_report import jpeg_notes
from pipelines.extractor import Extractor, NamedFile, Network, PerceptualDistance
from pipelines.image_metrics import num_scales
from pipelines.measure_bits import check_parts, held_out
from pipelines.meter import IMAGES, STAGING, Meter, read_arrays, read_part, tokens_of
from pipelines.progress import Progress
from pipelines.sample import KIND as SAMPLES_KIND
from pipelines.stage import Made, Pipeline, WorkClock, Workspace, encode_shards
from pipelines.train_vqvae import png
from vqvae_core.artifacts import Artifact, FileEntry
from vqvae_core.augment import centre_crop
from vqvae_core.errors import InputError
from vqvae_core.frechet import Gaussian, RunningGaussian, frechet_distance
from vqvae_core.image_shards import ImageShards
from vqvae_core.images import grid
from vqvae_core.likelihood import bits_per_dim
from vqvae_core.metrics import PooledPSNR, entropy_bits, mean_perplexity, usage
from vqvae_core.prior_training import latent_bits_per_dim
from vqvae_core.round_trip import decoded, encoded
from vqvae_core.token_shards import TokenShards, as_taken
from vqvae_core.vqvae import VQVAE

VERSION = 1
KIND = "Evaluation"
FIGURES, TABLE, PICTURE, STATISTICS = "evaluation.json", "evaluation.md", "evaluation.png", "statistics.npz"
_COLUMNS = 8
_NO_BITS = "a density has no bits: train with --vqvae.likelihood.kind logistic"
_BOUND = "an upper bound on -log2 p(x | label), or -log2 p(x) without labels: it counts one code alone (ELBO)"
_CARD = ("split", "num_images", "num_samples", "resize", "crop", "extractor", "extractor_sha256", "num_features",
         "network", "network_sha256", "reference", "reference_sha256", "note")  # fmt: skip
# name, label, format, what it is
_DEFINITIONS = (
    ("psnr_db", "PSNR", "{:.2f} dB", "from the mean squared error over every pixel value of all images, peak 255"),
    ("ssim", "SSIM", "{:.4f}", "mean over images; window 11, deviation 1.5, RGB, images in [0, 1], data range 1"),
    ("ms_ssim", "MS-SSIM", "{:.4f}", "the same over several scales, mean over images"),
    ("ms_ssim_scales", "its scales", "{:d}", "first scales of the five whose window fits, weights scaled to their sum"),
    ("lpips", "LPIPS", "{:.4f}", "mean over images of the distance that the given network finds"),
    ("rfid", "rFID", "{:.3f}", "Frechet distance of reconstructions to the originals of the split"),
    ("fid", "FID of samples", "{:.3f}", "Frechet distance of the prior's samples to the reference"),
    ("perplexity", "Perplexity", "{:.1f}", "2 to the entropy of code use, the mean over a site's tables"),
    ("usage", "Codes in use", "{:.4f}", "share of the codes that occur at all"),
    ("unigram_bits_per_token", "Unigram entropy", "{:.4f} bits/token", "of the tokens' frequencies in this split"),
    ("bits_per_token", "Prior", "{:.4f} bits/token", "-log2 p(tokens | label), the mean over all tokens"),
    ("reconstruction_bits_per_dim", "Reconstruction", "{:.4f} bits/dim", "-log2 p(x | z) over height x width x 3"),
    ("latent_bits_per_dim_uniform", "Latents, uniform prior", "{:.4f} bits/dim", "log2 K for each token"),
    ("latent_bits_per_dim", "Latents, learned prior", "{:.4f} bits/dim", "the prior's bits, over height x width x 3"),
    ("total_bits_per_dim_uniform", "Total, uniform prior", "{:.4f} bits/dim", f"as in the paper; {_BOUND}"),
    ("total_bits_per_dim", "Total, learned prior", "{:.4f} bits/dim", f"the paper's table has none; {_BOUND}"),
)  # fmt: skip


@dataclass(frozen=True)
class Judges:
    """The files that a user named: each None where there is none."""

    lpips: NamedFile | None = None
    extractor: NamedFile | None = None
    reference: NamedFile | None = None

    @classmethod
    def read(cls, config: EvaluateConfig) -> "Judges":
        """Raises `InputError` where a file is missing or not what it must be: before any work is done."""
        found = cls(
            **{
                name: NamedFile.read(place, f"--evaluate.{name}")
                for name in ("lpips", "extractor", "reference")
                if (place := getattr(config, name)) is not None
            }
        )
        if found.lpips is not None:
            PerceptualDistance(found.lpips)
        num_features = None if found.extractor is None else Extractor(found.extractor).num_features
        if found.reference is not None:
            reference = Gaussian.load(found.reference.data, found.reference.place)
            if num_features not in (None, reference.num_features):
                raise InputError(
                    f"expected statistics of the {num_features} features of the extractor in {found.reference.place}, "
                    f"found {reference.num_features}; were they made by the same extractor?"
                )
        return found

    def recipe(self) -> dict[str, str | None]:
        """What is hashed of them: their contents."""
        return {name: None if file is None else file.sha256 for name, file in vars(self).items()}


NO_JUDGES = Judges()


def evaluate(
    pipeline: Pipeline,
    images: ImageShards,
    vqvae: Artifact,
    tokens: TokenShards,
    prior: Artifact,
    samples: Artifact | None = None,
    judges: Judges = NO_JUDGES,
) -> Artifact:
    """The figures of a VQ-VAE and its prior on the held-out split. samples: for their FID, where there is an extractor.

    Raises `InputError` where the parts do not belong together or no image is held out.
    """
    check_parts(vqvae, tokens, prior)
    if judges.extractor is None:
        samples = None
    inputs = {"images": images.artifact, "vqvae": vqvae, "tokens": tokens.artifact, "prior": prior}
    made = pipeline.make(
        "evaluate",
        version=VERSION,
        kind=KIND,
        recipe=judges.recipe(),
        inputs=inputs if samples is None else inputs | {"samples": samples},
        build=lambda space, run: _Build(pipeline, images, vqvae, tokens, prior, samples, judges, space).made(),
    )
    made.folder.delete_folder(STAGING)  # only now: a kill before the commit would find parts without their features
    return made


@dataclass
class _Sums:
    """What parts add up to, in their order."""

    table: pa.Table
    counts: Tensor
    originals: RunningGaussian | None = None
    reconstructions: RunningGaussian | None = None
    samples: RunningGaussian | None = None


class _Build:
    """The driver's side: hands out the shards and makes figures of what comes back."""

    def __init__(
        self,
        pipeline: Pipeline,
        images: ImageShards,
        vqvae: Artifact,
        tokens: TokenShards,
        prior: Artifact,
        samples: Artifact | None,
        judges: Judges,
        space: Workspace,
    ) -> None:
        self._pipeline, self._images, self._vqvae, self._tokens = pipeline, images, vqvae, tokens
        self._samples, self._judges, self._space = samples, judges, space
        self._split = held_out(images)
        if not images.num_images(self._split):
            raise InputError(
                f"expected a test or validation split in {images.artifact.folder.uri}, found no image of either; give "
                "the source one"
            )
        self._size = vqvae.facts["image_size"]
        self._shards = {path.removesuffix(".tar"): path for path in images.shards(self._split)}
        self._parts = [] if samples is None else _parts(samples)
        self._spec = {
            "images": images.artifact.folder.uri,
            "vqvae": vqvae.folder.uri,
            "tokens": tokens.artifact.folder.uri,
            "prior": prior.folder.uri,
            "samples": None if samples is None else samples.folder.uri,
            "judges": {
                name: [file.place, file.sha256]
                for name, file in vars(judges).items()
                if file is not None and name != "reference"
            },
            "out": space.folder.uri,
            "work": space.work,
            "use_gpu": pipeline.resources.use_gpu,
        }

    def made(self) -> Made:
        clock = self._measure()
        sums = self._sum()
        values, reasons, card = self._figures(sums)
        lpips = self._judges.lpips
        facts = {
            "split": self._split,
            "num_images": sums.table.num_rows,
            "image_size": self._size,
            **values,
            "card": card,
            "lpips_card": None
            if lpips is None
            else _file_card("network", PerceptualDistance(lpips).network, self._size),
            "device": ray_train.describe(self._pipeline.resources),
        }
        page = {
            **{name: value for name, value in facts.items() if name not in values and name != "device"},
            "figures": {
                name: {"value": values[name], "text": _text(values[name], form), "label": label,
                       "definition": definition, "reason": reasons.get(name)}
                for name, label, form, definition in _DEFINITIONS
            },
            "notes": jpeg_notes(self._images.artifact),
        }  # fmt: skip
        files = {
            FIGURES: (json.dumps(page, indent=1, allow_nan=False) + "\n").encode(),
            TABLE: markdown(page).encode(),
            PICTURE: self._picture(sums.table),
        }
        if sums.originals is not None and sums.originals.count > 1:
            files[STATISTICS] = sums.originals.gaussian().dump()
        folder = self._space.folder
        entries = [FileEntry(**record["file"]) for record in self._space.records(self._shards)]
        for name, data in files.items():
            folder.write(name, data)
            entries.append(FileEntry.of(name, data))
        return Made(entries, facts, clock.seconds)

    def _measure(self) -> WorkClock:
        rows = {name: self._images.artifact.files[path].rows for name, path in self._shards.items()}
        if self._samples is not None:
            rows |= {name: self._samples.files[f"{name}.parquet"].rows for name in self._parts}
        there = dict(zip(rows, self._space.finished_parts(rows), strict=True))
        done = sum(count for name, count in rows.items() if there[name])
        jobs = ({**self._spec, "name": name} for name in rows if not there[name])
        clock = WorkClock()
        with Progress("evaluate", sum(rows.values()), "images", done=done) as progress:
            for result in encode_shards(self._pipeline.session, read_part, Meter, jobs, self._pipeline.resources):
                clock.add(result)
                done += result["rows"]
                progress.advance_to(done)
        return clock

    def _sum(self) -> _Sums:
        """Shard by shard: what is kept is a row of figures an image, and statistics of features."""
        shape, folder, tables = self._tokens.shape, self._space.folder, []
        sums = _Sums(IMAGES.empty_table(), torch.zeros(shape.num_groups, shape.num_codes, dtype=torch.int64))
        for name in self._shards:
            tables.append(pq.read_table(io.BytesIO(folder.read(f"{name}.parquet")), schema=IMAGES))
            arrays = read_arrays(folder.read(f"{STAGING}/{name}.npz"))
            sums.counts += torch.from_numpy(arrays["counts"])
            if "originals" in arrays:
                sums.originals = _added(sums.originals, arrays["originals"])
                sums.reconstructions = _added(sums.reconstructions, arrays["reconstructions"])
        for name in self._parts:
            sums.samples = _added(sums.samples, read_arrays(folder.read(f"{STAGING}/{name}.npz"))["samples"])
        sums.table = pa.concat_tables(tables)
        return sums

    def _figures(self, sums: _Sums) -> tuple[dict[str, Any], dict[str, str], dict[str, Any] | None]:
        """Values by name, reasons of those that are None, and the card of the Frechet distances."""
        shape, table, size = self._tokens.shape, sums.table, self._size
        count, num_dims = table.num_rows, 3 * size**2
        psnr = PooledPSNR()
        psnr.add_errors(float(np.sum(table["squared_error"].to_numpy())), count * num_dims)
        scales = num_scales(size)
        bits_per_token = _mean(table, "latent_nats", count) / math.log(2) / shape.num_tokens
        uniform, learned = (latent_bits_per_dim(bits, shape) for bits in (math.log2(shape.num_codes), bits_per_token))
        values: dict[str, Any] = {name: None for name, *_ in _DEFINITIONS}
        reasons: dict[str, str] = {}
        values |= {
            "psnr_db": psnr.decibels,
            "perplexity": mean_perplexity(sums.counts),
            "usage": usage(sums.counts),
            "unigram_bits_per_token": sum(map(entropy_bits, sums.counts)) / shape.num_groups,
            "bits_per_token": bits_per_token,
            "latent_bits_per_dim_uniform": uniform,
            "latent_bits_per_dim": learned,
        }
        if not psnr.squared_error:
            values["psnr_db"], reasons["psnr_db"] = None, "infinite: every reconstruction equals its original"
        small = f"pictures of {size} x {size} have no room for"
        for name, needed, text in (("ssim", 1, "its window of 11 pixels"), ("ms_ssim", 2, "its window at two scales")):
            if scales < needed:
                reasons[name] = f"{small} {text}"
            else:
                values[name] = _mean(table, name, count)
        if scales < 2:
            reasons["ms_ssim_scales"] = reasons["ms_ssim"]
        else:
            values["ms_ssim_scales"] = scales
        if self._judges.lpips is None:
            reasons["lpips"] = "no network was given: --evaluate.lpips FILE.onnx"
        else:
            values["lpips"] = _mean(table, "lpips", count)
        totals = ("reconstruction_bits_per_dim", "total_bits_per_dim_uniform", "total_bits_per_dim")
        if table["reconstruction_nats"].null_count:
            reasons |= dict.fromkeys(totals, _NO_BITS)
        else:
            left = bits_per_dim(_mean(table, "reconstruction_nats", count), num_dims)
            values |= dict(zip(totals, (left, left + uniform, left + learned), strict=True))
        card = self._distances(sums, values, reasons)
        return values, reasons, card

    def _distances(self, sums: _Sums, values: dict[str, Any], reasons: dict[str, str]) -> dict[str, Any] | None:
        """Fills in rFID and FID. Returns their card."""
        extractor, given = self._judges.extractor, self._judges.reference
        if extractor is None or sums.originals is None or sums.reconstructions is None:
            reasons |= dict.fromkeys(("rfid", "fid"), "no extractor was given: --evaluate.extractor FILE.onnx")
            return None
        reference, own = None, None
        if sums.originals.count > 1:
            own = sums.originals.gaussian()
            values["rfid"] = frechet_distance(sums.reconstructions.gaussian(), own)
        else:
            reasons["rfid"] = "one image has no covariance"
        if given is not None:
            reference = Gaussian.load(given.data, given.place)
        reference = reference or own
        if sums.samples is None or sums.samples.count < 2 or reference is None:
            reasons["fid"] = "at least 2 samples are needed, and a reference"
        else:
            values["fid"] = frechet_distance(sums.samples.gaussian(), reference)
        card = {
            "split": self._split,
            "num_images": sums.originals.count,
            "num_samples": 0 if sums.samples is None else sums.samples.count,
            **_file_card("extractor", Extractor(extractor).network, self._size),
            "crop": "none"
            if self._images.size == self._size
            else f"centre of {self._images.size} x {self._images.size}",
            "num_features": sums.originals.num_features,
            "reference": f"originals of the {self._split} split" if given is None else given.name,
            "reference_sha256": given.sha256 if given is not None else None if own is None else _sha256(own),
        }
        if min(sums.originals.count, card["num_samples"] or sums.originals.count) <= sums.originals.num_features:
            card["note"] = "no more images than features: compare only with figures of as many images"
        return card

    def _picture(self, table: pa.Table) -> bytes:
        """Originals over reconstructions, by PSNR: the worst, the middle and the best, each from low to high."""
        errors = table["squared_error"].to_numpy()
        order = np.lexsort((table["key"].to_numpy(), -errors))  # worst first, by key where they are equal
        columns = max(1, min(_COLUMNS, len(order) // 3))
        middle = (len(order) - columns) // 2
        chosen = [order[:columns], order[middle : middle + columns], order[len(order) - columns :]]
        pictures = dict(self._pairs(sorted({int(row) for rows in chosen for row in rows})))
        cells = [pictures[int(row)][side] for rows in chosen for side in (0, 1) for row in rows]
        return png(grid(np.stack(cells), columns))

    def _pairs(self, rows: list[int]) -> Iterator[tuple[int, tuple[np.ndarray, np.ndarray]]]:
        """(row, (original, reconstruction)) of rows in ascending order."""
        model, first, waiting = VQVAE.of(self._vqvae), 0, rows
        for name, path in self._shards.items():
            stop = first + self._images.artifact.files[path].rows
            mine, waiting = [row for row in waiting if row < stop], [row for row in waiting if row >= stop]
            if mine:
                places = [row - first for row in mine]
                samples = self._images.read(path)
                pixels = torch.from_numpy(np.stack([samples[place].pixels() for place in places]))
                pixels = centre_crop(pixels, self._size)
                tokens = tokens_of(self._tokens, name, [sample.key for sample in samples])
                codes = encoded(model, pixels) if tokens is None else as_taken(tokens[places])
                made = decoded(model, codes)[0]
                yield from zip(mine, zip(pixels.numpy(), made.numpy(), strict=True), strict=True)
            first = stop


def _file_card(name: str, network: Network, size: int) -> dict[str, Any]:
    return {name: network.file.name, f"{name}_sha256": network.file.sha256, "resize": network.resize(size)}


def _sha256(gaussian: Gaussian) -> str:
    return FileEntry.of(STATISTICS, gaussian.dump()).sha256


def _mean(table: pa.Table, name: str, count: int) -> float:
    return float(np.sum(table[name].to_numpy())) / count


def _added(running: RunningGaussian | None, features: np.ndarray) -> RunningGaussian:
    running = running or RunningGaussian(features.shape[1])
    running.add(torch.from_numpy(features))
    return running


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def markdown(page: Mapping[str, Any]) -> str:
    """evaluation.json as a table."""
    lines = [
        f"# {page['num_images']:,} images of the {page['split']} split, {page['image_size']} x {page['image_size']}",
        "",
        "| figure | value | what it is |",
        "|---|---:|---|",
    ]
    for figure in page["figures"].values():
        text = figure["definition"] if figure["reason"] is None else f"left out: {figure['reason']}"
        lines.append(f"| {figure['label']} | {figure['text']} | {text.replace('|', '&#124;')} |")
    for title, card in (("FID", page["card"]), ("LPIPS", page["lpips_card"])):
        if card is not None:
            lines += ["", f"{title}: {card_text(card)}."]
    return "\n".join([*lines, *(f"\n{note}" for note in page["notes"])]) + "\n"


def card_text(card: Mapping[str, Any]) -> str:
    """A card in one line: what a figure depends on, beside the images. A manifest keeps no order of names."""
    return ", ".join(f"{name.replace('_', ' ')} {card[name]}" for name in _CARD if card.get(name) is not None)


def _parts(samples: Artifact) -> list[str]:
    if samples.manifest.kind != SAMPLES_KIND:
        raise InputError(f"expected samples at {samples.folder.uri}, found an artifact of kind {samples.manifest.kind}")
    return [path.removesuffix(".parquet") for path in samples.files if path.endswith(".parquet")]


if __name__ == "__main__":
    from pipelines import cli, full

    cli.run(lambda arguments: full.main(arguments, until="evaluate"))
