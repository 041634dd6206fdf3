import io

import duckdb
import numpy as np
import pandas
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
    with pytest.raises(ArtifactError, match="expected tokens below 500 in here, found 560"):
        read_parquet(wide, "here")
