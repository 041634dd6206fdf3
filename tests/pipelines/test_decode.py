"""Tokens back to pictures, by the model that made them."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines import decode
from tests.pipelines.test_golden import VQVAE_CONFIG, weights
from vqvae_core.artifacts import Artifact, FileEntry, commit
from vqvae_core.checkpoint import save_model
from vqvae_core.decoding import decode as pixels_of
from vqvae_core.errors import InputError
from vqvae_core.image_shards import KEY_PATTERN
from vqvae_core.images import grid
from vqvae_core.storage import Folder
from vqvae_core.token_shards import KIND, TokenShape, write_parquet
from vqvae_core.vqvae import VQVAE

PRINT = "ab" * 32


def put(
    folder: Folder,
    kind: str,
    files: dict[str, tuple[bytes, int]],
    fingerprint: str,
    facts: dict[str, Any] | None = None,
) -> Artifact:
    for name, (data, _) in files.items():
        folder.write(name, data)
    entries = [FileEntry.of(name, data, rows=rows) for name, (data, rows) in files.items()]
    return commit(folder, kind=kind, stage="s", stage_version=1, fingerprint=fingerprint, recipe={}, inputs={},
                  files=entries, facts=facts or {}, provenance={})  # fmt: skip


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with a model and the tokens that it made of 5 pictures, in two shards."""
    import dataclasses

    model = weights(VQVAE(VQVAE_CONFIG))
    config = json.dumps(dataclasses.asdict(VQVAE_CONFIG)).encode()
    put(Folder.of(tmp_path / f"train_vqvae-{PRINT[:12]}"), "VQVAEModel",
        {"model.safetensors": (save_model(model), 0), "config.json": (config, 0)}, PRINT)  # fmt: skip
    shape = TokenShape(height=4, width=4, num_groups=1, num_codes=16)
    tokens = np.arange(5 * 16).reshape(5, 4, 4, 1) % 16
    shards = {
        f"train-00000{number}.parquet": (write_parquet(keys, [None] * len(keys), tokens[part], shape, PRINT), len(keys))
        for number, (keys, part) in enumerate([(["a", "b", "c"], slice(0, 3)), (["d", "e"], slice(3, 5))])
    }
    put(Folder.of(tmp_path / "tokenize-1"), KIND, shards, "t")
    return tmp_path


def test_an_artifact_is_decoded(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    decode.main([str(root / "tokenize-1"), "--out", str(root / "out"), "--limit", "4"])
    names = sorted(path.name for path in (root / "out").iterdir())
    assert names == ["a.png", "all.grid.png", "b.png", "c.png", "d.png"]
    model = weights(VQVAE(VQVAE_CONFIG))
    with torch.no_grad():
        expected = model.decode(torch.arange(64).view(4, 4, 4) % 16).numpy()
    for name, picture in zip("abcd", expected, strict=True):
        assert np.array_equal(pixels_of((root / "out" / f"{name}.png").read_bytes()), picture)
    assert re.search(r"^4 pictures: .*/out, there are more \(--limit\)$", capsys.readouterr().out, re.MULTILINE)
    decode.main([str(root / "tokenize-1"), "--out", str(root / "out"), "--limit", "5"])
    assert re.search(r"^5 pictures: .*/out$", capsys.readouterr().out, re.MULTILINE)


def test_the_grid_has_the_first_pictures(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many are decoded, no more are held."""
    monkeypatch.setattr(decode, "_GRID_PICTURES", 2)
    decode.main([str(root / "tokenize-1"), "--out", str(root / "out")])
    pictures = [pixels_of((root / "out" / f"{name}.png").read_bytes()) for name in "ab"]
    expected = grid(np.stack(pictures), 2)
    assert np.array_equal(pixels_of((root / "out" / decode.GRID).read_bytes()), expected)
    assert len(list((root / "out").iterdir())) == 6


def test_one_shard_is_decoded(root: Path) -> None:
    decode.main([str(root / "tokenize-1" / "train-000001.parquet"), "--out", str(root / "out")])
    assert sorted(path.name for path in (root / "out").iterdir()) == ["all.grid.png", "d.png", "e.png"]


def test_without_the_model(root: Path) -> None:
    (root / f"train_vqvae-{PRINT[:12]}").rename(root / "elsewhere")
    with pytest.raises(InputError, match=f"expected the model of these tokens at .*{PRINT[:12]}, found none"):
        decode.main([str(root / "tokenize-1"), "--out", str(root / "out")])
    decode.main([str(root / "tokenize-1"), "--out", str(root / "out"), "--model", str(root / "elsewhere")])
    put(Folder.of(root / "other"), "VQVAEModel", {}, "cd" * 32)
    with pytest.raises(InputError, match="expected the model abababababab, .* found cdcdcdcdcdcd"):
        decode.main([str(root / "tokenize-1"), "--out", str(root / "out"), "--model", str(root / "other")])


def test_what_is_no_token_shard(root: Path) -> None:
    with pytest.raises(InputError, match="expected a token shard at .*x.parquet, found no such file"):
        decode.main([str(root / "x.parquet"), "--out", str(root / "out")])
    with pytest.raises(InputError, match="expected a finished artifact"):
        decode.main([str(root), "--out", str(root / "out")])
    with pytest.raises(InputError, match="expected --limit to be at least 1, found 0"):
        decode.main([str(root / "tokenize-1"), "--limit", "0"])


def test_the_grid_takes_no_pictures_name() -> None:
    assert not KEY_PATTERN.fullmatch(decode.GRID.removesuffix(".png"))
