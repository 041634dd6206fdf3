"""Tokens back to pictures: one PNG a sample, and a grid of them.

    python pipelines/decode.py runs/doom84/tokenize-2cf63a77867a --out pictures
    python pipelines/decode.py runs/doom84/tokenize-2cf63a77867a/train-000000.parquet --out pictures --limit 100

The model is found beside the tokens by the fingerprint that they carry, or named with --model.
"""

import argparse
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from pipelines import cli
from pipelines.progress import Progress
from pipelines.train_vqvae import png
from vqvae_core.artifacts import MANIFEST, Artifact
from vqvae_core.errors import InputError
from vqvae_core.image_shards import KEY_PATTERN
from vqvae_core.images import grid
from vqvae_core.storage import Folder
from vqvae_core.token_shards import TokenTable, as_taken, read_parquet
from vqvae_core.vqvae import VQVAE

_BATCH = 64
_GRID_PICTURES = 256
_MODEL_STAGE = "train_vqvae"
GRID = "all.grid.png"  # no key has a dot, so it takes no picture's place


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="decode.py", description="Decode token shards to pictures.")
    parser.add_argument("tokens", help="a token shard (.parquet), or the folder of an artifact with some")
    parser.add_argument("--model", help="folder of the VQ-VAE's artifact; found beside the tokens where left out")
    parser.add_argument("--out", default="decoded", help="folder to write to, local or s3:// (decoded)")
    parser.add_argument("--limit", type=int, default=64, help="pictures at most (64)")
    options = parser.parse_args(arguments)
    if options.limit < 1:
        raise InputError(f"expected --limit to be at least 1, found {options.limit}")
    out = Folder.of(options.out)
    tables = _tables(options.tokens)
    first = next(tables, None)
    if first is None:
        raise InputError(f"expected token shards at {options.tokens}, the artifact has none")
    home, table = first
    model = VQVAE.of(_model(options.model, home, table))
    shown: list[np.ndarray] = []
    count = 0
    with Progress("decode", options.limit, "pictures") as progress:
        while table is not None and count < options.limit:
            decoded = decode_tokens(model, table.tokens[: options.limit - count])
            for key, picture in zip(table.keys, decoded, strict=False):
                if not KEY_PATTERN.fullmatch(key):
                    raise InputError(f"expected keys of letters, digits, - and _, found {key!r}")
                out.write(f"{key}.png", png(picture))
            shown += list(decoded[: _GRID_PICTURES - len(shown)])
            count += len(decoded)
            progress.advance_to(count)
            is_rest = len(decoded) < len(table.keys)
            table = table if is_rest else next((table for _, table in tables), None)
    if not count:
        raise InputError(f"expected tokens in {options.tokens}, found no row")
    out.write(GRID, png(grid(np.stack(shown), min(16, len(shown)))))
    print(f"{count} pictures: {out.uri}" + (", there are more (--limit)" if table is not None else ""))
    print(f"grid: {out.path(GRID)}")


def _tables(location: str) -> Iterator[tuple[Folder, TokenTable]]:
    """The token shards at a place, each with the folder in which its artifact and others lie."""
    folder = Folder.of(location)
    if folder.name.endswith(".parquet"):
        place, _, name = folder.uri.rpartition("/")
        try:
            data = Folder(place).read(name)
        except FileNotFoundError:
            raise InputError(f"expected a token shard at {folder.uri}, found no such file") from None
        yield _parent(Folder(place)), read_parquet(data, folder.uri)
        return
    artifact = Artifact.open(folder)
    for path in artifact.files:
        if path.endswith(".parquet"):
            yield _parent(folder), read_parquet(artifact.read(path), folder.path(path))


def _parent(folder: Folder) -> Folder:
    return Folder(folder.uri.rpartition("/")[0])


def _model(named: str | None, home: Folder, table: TokenTable) -> Artifact:
    """The model that made the tokens. Raises `InputError` where it is another one or not there."""
    name = f"{_MODEL_STAGE}-{table.model[:12]}"
    if named is None and not (home / name).exists(MANIFEST):
        raise InputError(
            f"expected the model of these tokens at {home.path(name)}, found none; name its folder with --model"
        )
    artifact = Artifact.open(Folder.of(named) if named is not None else home / name, "VQVAEModel")
    if artifact.manifest.fingerprint != table.model:
        raise InputError(
            f"expected the model {table.model[:12]}, which made these tokens, found "
            f"{artifact.manifest.fingerprint[:12]} at {artifact.folder.uri}; name another with --model"
        )
    return artifact


@torch.no_grad()
def decode_tokens(model: VQVAE, tokens: np.ndarray) -> np.ndarray:
    """uint8 (N, H, W, 3) pictures of tokens (N, H, W, G)."""
    values: Any = torch.from_numpy(as_taken(tokens).astype(np.int64))
    return torch.cat([model.decode(batch) for batch in values.split(_BATCH)]).numpy()


if __name__ == "__main__":
    cli.run(main)
