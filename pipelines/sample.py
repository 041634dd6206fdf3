"""The sample stage: draws from the prior, decoded to pictures. Each sample depends on its own seed only.

    python pipelines/sample.py --model runs/doom84/train_prior-2cf63a77867a --class E1M3 --num 64 --temperature 0.95
    python pipelines/sample.py --model runs/doom84/train_prior-2cf63a77867a --complete frame.png --num 8

Samples are an artifact beside the prior's: the same command again goes on where it stopped, and does nothing where all
is done. Without --model: the pipeline up to its samples, as pipelines/full.py makes them.
"""

import argparse
import dataclasses
import io
import json
import os
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from cluster.session import ResourceError, Session
from pipelines import ray_train
from pipelines.cluster_check import check_cluster
from pipelines.config import Resources, SampleConfig, recipe_of
from pipelines.preflight import check_place
from pipelines.progress import Progress
from pipelines.stage import Made, Pipeline, WorkClock, Workspace, encode_shards, write_sidecar
from pipelines.tracking import Tracker
from pipelines.train_vqvae import png
from vqvae_core.artifacts import MANIFEST, Artifact, FileEntry, hash_json
from vqvae_core.checkpoint import config_from_json
from vqvae_core.decoding import decode
from vqvae_core.errors import InputError
from vqvae_core.images import grid, resize_and_crop
from vqvae_core.pixelcnn import NO_LABEL, NOTHING, Condition
from vqvae_core.prior import KIND as PRIOR_KIND
from vqvae_core.prior import Prior
from vqvae_core.round_trip import encoded, filled
from vqvae_core.sampler import Draw, Given, Sampler, check_guidance
from vqvae_core.storage import Folder
from vqvae_core.token_shards import write_parquet
from vqvae_core.vqvae import KIND as VQVAE_KIND
from vqvae_core.vqvae import VQVAE

VERSION = 2
KIND = "Samples"
GRID = "samples.png"
_MOST_COLUMNS = 12
_GRID_PICTURES = 256
_DECODED_ON_GPU = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """What samples begin with. tokens: (N, H, W, G) as nested lists, which seeds take in turn; rows: how many rows of
    them are kept."""

    tokens: list[Any]
    rows: int


def sample(
    pipeline: Pipeline,
    config: SampleConfig,
    prior: Artifact,
    vqvae: Artifact,
    completion: Completion | None = None,
) -> Artifact:
    """Samples of a prior. Files: tokens (Parquet, with seeds and -log p), pictures, and a grid of the first ones."""
    knows = Prior.of(prior)
    labels = _labels(knows, config, completion)
    check_guidance(knows.network, config.draw)
    if knows.vqvae != vqvae.manifest.fingerprint:
        raise InputError(
            f"expected the VQ-VAE {knows.vqvae[:12]}, whose tokens the prior knows, found "
            f"{vqvae.manifest.fingerprint[:12]} at {vqvae.folder.uri}"
        )
    recipe = {**recipe_of(config), "label": None if config.label is None else labels[0]}
    return pipeline.make(
        "sample",
        version=VERSION,
        kind=KIND,
        recipe=recipe | ({} if completion is None else {"completion": dataclasses.asdict(completion)}),
        inputs={"prior": prior, "vqvae": vqvae},
        build=lambda space, run: _build(pipeline, config, prior, vqvae, labels, completion, space),
    )


def _labels(prior: Prior, config: SampleConfig, completion: Completion | None) -> list[int]:
    """The labels that seeds take in turn; none where the prior has none."""
    if config.label is not None:
        return [prior.label(config.label)]
    classes = prior.network.num_classes
    if completion is None or not classes:
        return list(range(classes))
    if not prior.network.knows_no_label:  # another label in turn would be wrong for all pictures but those of its own
        raise InputError(
            "expected the label of the pictures that are completed (--class), found none: this prior was trained on "
            "images with labels only"
        )
    return [NO_LABEL]


def _build(
    pipeline: Pipeline,
    config: SampleConfig,
    prior: Artifact,
    vqvae: Artifact,
    labels: list[int],
    completion: Completion | None,
    space: Workspace,
) -> Made:
    starts = range(0, config.num_images, config.batch_size)
    names = [f"part-{number:06d}" for number in range(len(starts))]
    sizes = [min(config.batch_size, config.num_images - start) for start in starts]
    there = space.finished_parts(names)
    spec = {
        "prior": prior.folder.uri,
        "vqvae": vqvae.folder.uri,
        "out": space.folder.uri,
        "work": space.work,
        "config": dataclasses.asdict(config),
        "labels": labels,
        "completion": None if completion is None else dataclasses.asdict(completion),
        "use_gpu": pipeline.resources.use_gpu,
    }
    parts = zip(names, starts, sizes, there, strict=True)
    jobs = ({**spec, "name": name, "first": first, "count": size} for name, first, size, done in parts if not done)
    clock = WorkClock()
    done = sum(size for size, is_done in zip(sizes, there, strict=True) if is_done)
    with Progress("sample", config.num_images, "images", done=done) as progress:
        for result in encode_shards(pipeline.session, _as_row, Drawer, jobs, pipeline.resources):
            clock.add(result)
            done += result["rows"]
            progress.advance_to(done)
    files, cells, nats, num_codes = [], [], 0.0, 0
    for record in space.records(names):
        pictures = [FileEntry(**entry) for entry in record["more_files"]]
        files += [FileEntry(**record["file"]), *pictures]
        nats += record["nll_nats"]
        num_codes += record["num_codes"]
        if len(cells) < _GRID_PICTURES:
            cells += _pictures(space.folder, [entry.path for entry in pictures])
    shown = np.stack(cells[:_GRID_PICTURES])
    columns = len(labels) if 1 < len(labels) <= _MOST_COLUMNS else 8  # a column a label, where they fit
    sheet = png(grid(shown, min(columns, len(shown)), scale=2))
    space.folder.write(GRID, sheet)
    files.append(FileEntry.of(GRID, sheet))
    facts = {
        "num_images": config.num_images,
        "mean_bits_per_token": nats / np.log(2) / num_codes if num_codes else 0.0,
        "device": ray_train.describe(pipeline.resources),
    }
    return Made(files, facts, clock.seconds)


def _pictures(folder: Folder, paths: list[str]) -> Iterator[np.ndarray]:
    for path in paths:
        data = folder.read(path)
        if path.endswith(".npz"):
            yield from np.load(io.BytesIO(data), allow_pickle=False)["arr_0"]
        else:
            yield decode(data)


def _as_row(job: dict[str, Any]) -> dict[str, Any]:
    return {"job": json.dumps(job), "begin": time.time()}


class Drawer:
    """An actor with both models: draws the samples of one part and writes their tokens and pictures, then its
    sidecar."""

    def __init__(self) -> None:
        self._models: tuple[Prior, VQVAE, Sampler] | None = None

    def _load(self, job: dict[str, Any], config: SampleConfig) -> tuple[Prior, VQVAE, Sampler]:
        """Once: all parts of an artifact have the same config."""
        if self._models is None:
            torch.set_num_threads(job["threads"])
            device = "cuda" if job["use_gpu"] else "cpu"
            prior, vqvae = Prior.load(job["prior"], device), VQVAE.load(job["vqvae"], device)
            dtype = torch.bfloat16 if config.precision == "bf16" else None
            self._models = prior, vqvae, Sampler(prior.network, config.batch_size, config.draw, dtype)
        return self._models

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        job = json.loads(row["job"])
        try:
            found = {"rows": self._write(job), "error": ""}
        except InputError as error:
            found = {"rows": 0, "error": str(error)}
        return {"name": job["name"], "begin": row["begin"], "end": time.time(), **found}

    def _write(self, job: dict[str, Any]) -> int:
        config, name, count = config_from_json(SampleConfig, job["config"]), job["name"], job["count"]
        prior, vqvae, sampler = self._load(job, config)
        # The last batch is filled up, since a batch of another size could round otherwise.
        numbers = job["first"] + np.minimum(np.arange(config.batch_size), count - 1)
        seeds = [config.seed + int(number) for number in numbers]
        # By seed, not by place: the same seed is the same image wherever a run begins.
        labels = [job["labels"][seed % len(job["labels"])] for seed in seeds] if job["labels"] else None
        told = NOTHING if labels is None else Condition(labels=torch.tensor(labels))
        drawn = sampler.sample(seeds, told, _given(job["completion"], seeds))
        pixels = _decoded(vqvae, drawn.tokens)[:count]
        tokens = drawn.tokens.cpu().numpy()[:count]
        nll_nats = drawn.nll_nats.double().cpu().flatten(1).sum(dim=1).numpy()[:count]
        keys = [f"sample-{seed:09d}" for seed in seeds[:count]]
        known = [label if label >= 0 else None for label in labels or [NO_LABEL] * count][:count]
        folder = Folder(job["out"])
        data = write_parquet(
            keys, known, tokens if tokens.ndim == 4 else tokens[..., None], prior.shape, prior.vqvae,
            seed=np.array(seeds[:count]), nll_nats=nll_nats,
        )  # fmt: skip
        pictures = (
            {f"pictures/{key}.png": png(picture) for key, picture in zip(keys, pixels, strict=True)}
            if config.output == "png"
            else {f"pictures/{name}.npz": _npz(pixels, None if labels is None else labels[:count])}
        )
        for path, picture in pictures.items():
            folder.write(path, picture)
        folder.write(f"{name}.parquet", data)
        kept = 0 if job["completion"] is None else job["completion"]["rows"]
        write_sidecar(
            folder,
            job["work"],
            name,
            FileEntry.of(f"{name}.parquet", data, rows=count),
            [FileEntry.of(path, picture) for path, picture in pictures.items()],
            nll_nats=float(nll_nats.sum()),
            num_codes=count * prior.shape.num_tokens * (prior.shape.height - kept) // prior.shape.height,
        )
        return count


def _decoded(vqvae: VQVAE, tokens: torch.Tensor) -> np.ndarray:
    """Pixels of tokens, so many at once, the last ones filled up, that how many there are rounds no pixel otherwise."""
    size = 1 if vqvae.device.type == "cpu" else _DECODED_ON_GPU
    found = [vqvae.decode(filled(part, size))[: len(part)].cpu().numpy() for part in tokens.split(size)]
    return np.concatenate(found)


def _given(completion: dict[str, Any] | None, seeds: list[int]) -> Given | None:
    if completion is None:
        return None
    tokens = torch.tensor(completion["tokens"])
    return Given.rows(tokens[torch.tensor(seeds) % len(tokens)], completion["rows"])


def _npz(pixels: np.ndarray, labels: list[int] | None) -> bytes:
    """Pixels and labels, as arr_0 and arr_1: the names that tools for many samples look for."""
    buffer = io.BytesIO()
    np.savez(buffer, pixels) if labels is None else np.savez(buffer, pixels, np.array(labels))
    return buffer.getvalue()


def main(arguments: list[str]) -> None:
    options = _parser().parse_args(arguments)
    config = _config(options)
    prior = Artifact.open(Folder.of(options.model), PRIOR_KIND)
    home = Folder(prior.folder.uri.rpartition("/")[0])
    vqvae = _vqvae(prior, home, options.vqvae)
    root = Folder.of(options.root) if options.root else home
    check_place(root)
    completion = _completion(options.complete, options.keep, vqvae) if options.complete else None
    session = Session()
    resources = Resources(num_workers=max(1, options.gpus), use_gpu=options.gpus > 0)
    # As far as it goes, what full.py can run again: the config that the prior was made with, and these samples.
    whole = {**(prior.manifest.provenance.get("config") or {}), "sample": dataclasses.asdict(config)}
    tracker = Tracker(root, "sample", whole, hash_json([prior.manifest.fingerprint, whole]), enabled=options.track)
    session.once_connected = lambda: check_cluster(session, root, tracker)
    pipeline, status = Pipeline(root, resources, session, tracker, whole), "FAILED"
    try:
        tracker.start()
        made = sample(pipeline, config, prior, vqvae, completion)
        status = "FINISHED"
    except ResourceError as error:  # whose advice names options of the pipeline
        raise ResourceError(f"{str(error).partition(';')[0]}; lower --gpus, or leave it out") from error
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        session.close()
        tracker.finish(status)
    print(f"{config.num_images} samples, {made.facts['mean_bits_per_token']:.3f} bits/token: {made.folder.uri}")
    print(f"grid: {made.folder.path(GRID)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sample.py",
        description="Draw samples from a trained prior. Without --model: the pipeline up to its samples, with the "
        "options of full.py.",
    )
    parser.add_argument("--model", required=True, help="folder of the prior's artifact, local or s3://")
    parser.add_argument("--vqvae", help="folder of the VQ-VAE's artifact; found beside the prior where left out")
    parser.add_argument("--class", dest="label", help="a label's name or number, -1 for none; left out: all in turn")
    parser.add_argument("--num", type=int, default=16, help="samples (16)")
    parser.add_argument("--temperature", type=float, default=1.0, help="divides the logits (1.0)")
    parser.add_argument("--top-k", type=int, help="draw from the k likeliest codes only")
    parser.add_argument("--top-p", type=float, help="draw from the codes that have this much probability together")
    parser.add_argument("--guidance", type=float, default=1.0, help="how far to go towards the label (1.0)")
    parser.add_argument("--seed", type=int, default=0, help="of the first sample (0)")
    parser.add_argument("--complete", nargs="+", help="pictures, local or s3://, whose upper part is kept, in turn")
    parser.add_argument("--keep", type=float, default=0.5, help="how much of them is kept, from above (0.5)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of weights and caches (fp32)")
    parser.add_argument("--output", choices=("png", "npz"), default="png", help="a PNG each, or an array a part (png)")
    parser.add_argument("--batch-size", type=int, help="samples drawn together, and in a part (16; 512 on GPUs)")
    parser.add_argument("--root", help="where the samples' artifact goes; left out: beside the prior")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs to draw on (0: CPUs)")
    parser.add_argument("--no-track", dest="track", action="store_false", help="without MLflow")
    return parser


def _config(options: argparse.Namespace) -> SampleConfig:
    """Raises `InputError` that names the option."""
    named = {"num_images": "--num", "label": "--class"}
    try:
        if options.gpus < 0:
            raise ValueError(f"gpus must be 0 or more, was {options.gpus}")
        draw = Draw(
            temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, guidance=options.guidance
        )
        return SampleConfig(
            num_images=options.num, label=options.label, seed=options.seed, draw=draw, precision=options.precision,
            output=options.output,
            batch_size=(512 if options.gpus else 16) if options.batch_size is None else options.batch_size,
        )  # fmt: skip
    except ValueError as error:
        field = str(error).split()[0]
        raise InputError(f"{named.get(field, '--' + field.replace('_', '-'))}: {error}") from error


def _vqvae(prior: Artifact, home: Folder, named: str | None) -> Artifact:
    """The VQ-VAE whose tokens a prior knows: named, or beside it by its fingerprint."""
    name = f"train_vqvae-{Prior.of(prior).vqvae[:12]}"
    if named is None and not (home / name).exists(MANIFEST):
        raise InputError(f"expected the prior's VQ-VAE at {home.path(name)}, found none; name its folder with --vqvae")
    return Artifact.open(Folder.of(named) if named is not None else home / name, VQVAE_KIND)


def _completion(paths: list[str], keep: float, vqvae: Artifact) -> Completion:
    """Tokens of pictures, cut and scaled to the model's size, and how many of their rows are kept."""
    if not 0 < keep < 1:
        raise InputError(f"expected --keep to lie between 0 and 1, found {keep}")
    size, pictures = vqvae.facts["image_size"], []
    for path in paths:
        place, _, name = Folder.of(path).uri.rpartition("/")
        try:
            data = Folder(place).read(name)
        except FileNotFoundError:
            raise InputError(f"expected a picture at {path}, found no such file") from None
        except OSError as error:
            raise InputError(f"expected a picture at {path}, it cannot be read: {error}") from error
        try:
            pictures.append(resize_and_crop(decode(data), size))
        except InputError as error:
            raise InputError(f"expected a picture at {path}, but it {error}") from error
    tokens = encoded(VQVAE.of(vqvae), torch.from_numpy(np.stack(pictures)))
    rows = min(tokens.shape[1] - 1, max(1, round(keep * tokens.shape[1])))
    return Completion(tokens=tokens.reshape(*tokens.shape[:3], -1).tolist(), rows=rows)


def _of_the_pipeline(arguments: list[str]) -> bool:
    """Whether they are full.py's: there is no option of a model's samples, and no question what this program takes.
    Raises `InputError` for such options without --model."""
    names = {argument.partition("=")[0] for argument in arguments if argument.startswith("-")}
    if "--model" in names or (names and names <= {"--help", "-h"}):
        return False
    ours = {option for action in _parser()._actions for option in action.option_strings} & names
    only_ours = sorted(ours - {"--help", "-h", "--root", "--no-track"})
    if only_ours:
        raise InputError(f"expected --model, the folder of a trained prior, beside {', '.join(only_ours)}, found none")
    return True


if __name__ == "__main__":
    from pipelines import cli, full

    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    cli.run(lambda arguments: full.main(arguments, until="sample") if _of_the_pipeline(arguments) else main(arguments))
