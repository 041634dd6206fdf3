"""Which train samples are in which global step, for several numbers of ranks: are they the same?

    python pipelines/order.py runs/doom84/shard-0123456789ab --world-sizes 1 2 4 8 --steps 200 --batch-size 64

Prints a hash over the sets of sample keys of each step, for each number of ranks and for a run that goes from one to
the next, and exits 1 where they differ. --decode compares the pictures too, as loaders with 0 to 3 processes give them.
"""

import argparse
import hashlib
import sys
from collections.abc import Iterator

from pipelines import cli
from pipelines.plan import SPLITS
from pipelines.progress import Progress
from vqvae_core.artifacts import Artifact
from vqvae_core.augment import AugmentConfig
from vqvae_core.errors import InputError
from vqvae_core.image_shards import KIND, ImageShards, index_tar
from vqvae_core.loader import ImageLoader
from vqvae_core.order import Order, OrderConfig, lanes_of
from vqvae_core.storage import Folder


def main(arguments: list[str]) -> None:
    options = _parse(arguments)
    try:
        config = OrderConfig(
            batch_size=options.batch_size, num_lanes=options.num_lanes, shuffle_window=options.window, seed=options.seed
        )
    except ValueError as error:
        raise InputError(f"expected an order of samples, but: {error}") from error
    for world_size in options.world_sizes:
        lanes_of(0, world_size, config)
    images = ImageShards(Artifact.open(Folder.of(options.artifact), KIND))
    order = Order([(path, images.artifact.files[path].rows) for path in images.shards("train")], config)
    steps = options.steps or order.steps_per_epoch
    print(f"{order.num_samples} samples, {order.steps_per_epoch} steps an epoch, {order.left_out} left out")
    others = {split: images.num_images(split) for split in SPLITS if split != "train"}
    print("in no step:", " + ".join(f"{count} of {split}" for split, count in others.items() if count) or "none")
    plans = {f"{size} ranks": [size] * steps for size in options.world_sizes}
    plans["changing ranks"] = [options.world_sizes[step * len(options.world_sizes) // steps] for step in range(steps)]
    found = _keys(images, order, plans)
    if options.decode:
        found |= {f"{name}, pictures": value for name, value in _pictures(images, config, plans)}
    for name, digest in found.items():
        print(f"{name}: {digest}")
    kinds = [{value for name, value in found.items() if name.endswith("pictures") == pictures}
             for pictures in (False, True)]  # fmt: skip
    if any(len(values) > 1 for values in kinds):
        sys.exit("expected the same samples in each step for every number of ranks, found others")
    print(f"the same samples in each of {steps} steps")


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="order.py", description=str(__doc__).splitlines()[0])
    parser.add_argument("artifact", help="folder of image shards, local or s3://")
    parser.add_argument("--world-sizes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--steps", type=int, default=0, help="0: one epoch")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--num-lanes", type=int, default=8)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--decode", action="store_true")
    options = parser.parse_args(arguments)
    if min(options.world_sizes) < 1 or options.steps < 0:
        raise InputError("expected numbers of ranks of at least 1 and steps of at least 0")
    return options


def _keys(images: ImageShards, order: Order, plans: dict[str, list[int]]) -> dict[str, str]:
    """The hash of each plan over the sets of keys of its steps."""
    keys: dict[str, list[str]] = {}
    with Progress("order", len(order.files), "shards") as progress:
        for number, (path, _) in enumerate(order.files, 1):
            keys[path] = index_tar(images.artifact.read(path), path).keys
            progress.advance_to(number)
    digests = {}
    for name, sizes in plans.items():
        digest = hashlib.sha256()
        for step, world_size in enumerate(sizes):
            members = []
            for rank in range(world_size):
                places = order.batch(step, lanes_of(rank, world_size, order.config))
                members += [
                    keys[order.files[file][0]][row] for file, row in zip(places.files, places.rows, strict=True)
                ]
            if len(set(members)) != order.config.batch_size:
                raise InputError(f"expected {order.config.batch_size} different samples in step {step}")
            digest.update("\n".join(sorted(members)).encode() + b"\0")
        digests[name] = digest.hexdigest()[:16]
    return digests


def _pictures(images: ImageShards, config: OrderConfig, plans: dict[str, list[int]]) -> Iterator[tuple[str, str]]:
    """The same over the pixels that loaders give, where each stretch of a plan is a run of its own."""
    for number, (name, sizes) in enumerate(plans.items()):
        digest = hashlib.sha256()
        start = 0
        while start < len(sizes):
            stop = start + next((n for n, size in enumerate(sizes[start:]) if size != sizes[start]), len(sizes) - start)
            loaders = [
                ImageLoader(images, config, AugmentConfig(flip=True), rank=rank, world_size=sizes[start],
                            num_workers=number % 4)
                for rank in range(sizes[start])
            ]  # fmt: skip
            streams = [loader.batches(start, stop) for loader in loaders]
            for parts in zip(*streams, strict=True):
                hashes = [hashlib.sha256(picture.numpy().tobytes()).digest() for part in parts for picture in part]
                digest.update(b"".join(sorted(hashes)))
            start = stop
        yield name, digest.hexdigest()[:16]


if __name__ == "__main__":
    cli.run(main)
