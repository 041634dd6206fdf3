import io
from typing import Any

import duckdb
import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vqvae_core.artifacts import ArtifactError
from vqvae_core.token_shards import TokenShape, read_parquet, write_parquet

SHAPE = TokenShape(height=3, width=2, num_groups=1, num_codes=500)
TOKENS = np.arange(24).reshape(4, 3, 2, 1) * 20
KEYS = ["a", "b", "c", "d"]
LABELS = [1, None, 0, 2]


def data() -> bytes:
    return write_parquet(KEYS, LABELS, TOKENS, SHAPE, "model-fingerprint")


def test_round_trip() -> None:
    table = read_parquet(data(), "here")
    assert table.keys == KEYS
    assert table.labels.tolist() == [1, -1, 0, 2]
    assert np.array_equal(table.tokens, TOKENS)
    assert (table.shape, table.model) == (SHAPE, "model-fingerprint")


def test_same_tokens_same_bytes() -> None:
    assert data() == data()


def test_pandas_reads_them() -> None:
    frame = pandas.read_parquet(io.BytesIO(data()))
    assert frame["key"].tolist() == KEYS
    assert np.array_equal(np.stack(frame["tokens"]), TOKENS.reshape(4, 6))


def test_duckdb_reads_them(tmp_path) -> None:
    path = tmp_path / "train-000000.parquet"
    path.write_bytes(data())
    rows = duckdb.sql(f"select key, label, tokens from '{path}'").fetchall()
    expected = zip(KEYS, LABELS, TOKENS.reshape(4, 6).tolist(), strict=True)
    assert [(key, label, list(tokens)) for key, label, tokens in rows] == list(expected)


def test_what_is_no_token_shard() -> None:
    with pytest.raises(ArtifactError, match="expected a token shard at here"):
        read_parquet(b"nothing", "here")
    wide = write_parquet(KEYS, LABELS, TOKENS + 100, SHAPE, "m")
    with pytest.raises(ArtifactError, match="expected tokens from 0, below 500, in here, found 560"):
        read_parquet(wide, "here")


def other(**changes: Any) -> bytes:
    """A token shard with other columns, or without some, and other metadata."""
    table = pq.read_table(io.BytesIO(data()))
    facts = {**table.schema.metadata, **changes.pop("facts", {})}
    for name, column in changes.items():
        place = table.schema.get_field_index(name)
        table = table.remove_column(place) if column is None else table.set_column(place, name, column)
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({k: v for k, v in facts.items() if v}), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokens": pa.array(range(4))}, "expected a token shard at here"),
        ({"tokens": pa.array([[-1] * 6] * 4)}, "expected tokens from 0, below 500, in here, found -1"),
        ({"tokens": pa.array([[1] * 5] * 4)}, "expected a token shard at here"),
        ({"tokens": pa.array([["a"] * 6] * 4)}, "expected a token shard at here"),
        ({"label": pa.array(["a"] * 4)}, "expected a token shard at here"),
        ({"key": None}, "expected a token shard at here"),
        ({"facts": {b"H": b"7"}}, "expected a token shard at here"),
        ({"facts": {b"model": b""}}, "expected a token shard at here"),
    ],
)
def test_token_files_of_somebody_else(changes: dict, words: str) -> None:
    with pytest.raises(ArtifactError, match=words) as found:
        read_parquet(other(**changes), "here")
    assert "\n" not in str(found.value)
