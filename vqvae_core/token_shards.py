"""Token shards: Parquet, one file per image shard, in the same order. Ordinary columns: any reader can read them."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vqvae_core.artifacts import Artifact, ArtifactError
from vqvae_core.storage import Folder

KIND = "TokenShards"
Tokens = TypeVar("Tokens", bound=Any)


@dataclass(frozen=True, kw_only=True)
class TokenShape:
    """height x width sites with G codes each, out of a table of K."""

    height: int
    width: int
    num_groups: int
    num_codes: int

    @property
    def num_tokens(self) -> int:
        return self.height * self.width * self.num_groups


def write_parquet(
    keys: Sequence[str],
    labels: Sequence[int | None],
    tokens: np.ndarray,
    shape: TokenShape,
    model: str,
    **columns: np.ndarray,
) -> bytes:
    """tokens: integers (N, H, W, G) in [0, K). model: fingerprint of the model that made them. columns: more values by
    name, (N,) each."""
    flat = np.ascontiguousarray(tokens.reshape(len(keys), shape.num_tokens).astype(np.uint16))
    facts = {"K": shape.num_codes, "H": shape.height, "W": shape.width, "G": shape.num_groups, "model": model}
    more = {name: pa.array(column) for name, column in columns.items()}
    schema = pa.schema(
        [
            pa.field("key", pa.string(), nullable=False),
            pa.field("label", pa.int32()),
            pa.field("tokens", pa.list_(pa.field("element", pa.uint16(), nullable=False), shape.num_tokens)),
            *[pa.field(name, column.type, nullable=False) for name, column in more.items()],
        ],
        metadata={name: str(value) for name, value in facts.items()},
    )
    values = pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), type=schema.field("tokens").type)
    table = pa.Table.from_arrays(
        [pa.array(keys, pa.string()), pa.array(labels, pa.int32()), values, *more.values()],
        schema=schema,
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", row_group_size=4096)
    return buffer.getvalue()


def as_taken(tokens: Tokens) -> Tokens:
    """Tokens (N, H, W, G) as a VQ-VAE takes them: (N, H, W) for one group. An array or a tensor."""
    return tokens[..., 0] if tokens.shape[-1] == 1 else tokens


@dataclass(frozen=True)
class TokenTable:
    """keys: N strings; labels: int32 (N,), -1 where there is none; tokens: uint16 (N, H, W, G)."""

    keys: list[str]
    labels: np.ndarray
    tokens: np.ndarray
    shape: TokenShape
    model: str


def read_parquet(data: bytes, where: str) -> TokenTable:
    """Raises `ArtifactError` where the file is no token shard or holds tokens outside [0, K)."""
    try:
        table = pq.read_table(io.BytesIO(data))
        facts = {name.decode(): value.decode() for name, value in (table.schema.metadata or {}).items()}
        shape = TokenShape(
            height=int(facts["H"]), width=int(facts["W"]), num_groups=int(facts["G"]), num_codes=int(facts["K"])
        )
        flat = table["tokens"].combine_chunks().flatten().to_numpy()
        labels = table["label"].fill_null(-1).to_numpy().astype(np.int32)
        keys, model = table["key"].to_pylist(), facts["model"]
        tokens = flat.reshape(len(keys), shape.height, shape.width, shape.num_groups)
        least, greatest = (int(tokens.min()), int(tokens.max())) if tokens.size else (0, 0)
    except (KeyError, ValueError, TypeError, AttributeError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise ArtifactError(f"expected a token shard at {where}, found something else ({reason})") from error
    if least < 0 or greatest >= shape.num_codes:
        found = least if least < 0 else greatest
        raise ArtifactError(f"expected tokens from 0, below {shape.num_codes}, in {where}, found {found}")
    return TokenTable(keys, labels, tokens, shape, model)


@dataclass(frozen=True)
class TokenShards:
    """The artifact of the tokenize stage. Facts: shape {H, W, G, K}, model, splits, label_map."""

    artifact: Artifact

    @classmethod
    def open(cls, folder: Folder) -> "TokenShards":
        return cls(Artifact.open(folder, KIND))

    @property
    def shape(self) -> TokenShape:
        facts = self.artifact.facts["shape"]
        return TokenShape(height=facts["H"], width=facts["W"], num_groups=facts["G"], num_codes=facts["K"])

    @property
    def label_map(self) -> dict[str, int] | None:
        return self.artifact.facts["label_map"]

    def shards(self, split: str) -> list[str]:
        return sorted(path for path in self.artifact.files if path.startswith(f"{split}-"))

    def num_images(self, split: str) -> int:
        return sum(
            file.rows
            for file in self.artifact.files.values()
            if file.path.startswith(f"{split}-") and file.path.endswith(".parquet")
        )

    def read(self, path: str) -> TokenTable:
        """One shard, checked against the manifest's hash and count."""
        table = read_parquet(self.artifact.read(path), self.artifact.folder.path(path))
        expected = self.artifact.files[path].rows
        if len(table.keys) != expected:
            raise ArtifactError(f"expected {expected} rows in {path}, found {len(table.keys)}")
        return table
