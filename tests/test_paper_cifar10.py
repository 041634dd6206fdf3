"""The benchmark of the paper's table: visits go on, and their last line says what was done."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from benchmarks import bare, paper_cifar10
from pipelines.presets import PRESETS
from tests.pipelines.data import frame
from tests.pipelines.test_cli import ROOT
from vqvae_core.images import encode


@pytest.fixture
def cifar(tmp_path: Path) -> Path:
    folder = tmp_path / "cifar"
    folder.mkdir()
    for split, count in (("train", 96), ("test", 10)):
        images = [{"bytes": encode(frame(number, 32), "png"), "path": None} for number in range(count)]
        pq.write_table(pa.table({"img": images, "label": [0] * count}), folder / f"{split}-00000.parquet")
    return folder


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    config, words = PRESETS["cifar10-small"]
    replace = paper_cifar10.replace
    quantizer = replace(config.vqvae.quantizer, num_codes=8, num_groups=2, code_dim=2)
    vqvae = replace(config.vqvae, hidden_channels=8, residual_channels=4, num_residual_blocks=1, quantizer=quantizer)
    train = replace(config.train, batch_size=8, log_every=2, validate_every=3, warmup_steps=0)
    compare = replace(config.compare, train_samples=2, report_samples=(2, 4))
    monkeypatch.setitem(PRESETS, "cifar10-small", (replace(config, vqvae=vqvae, train=train, compare=compare), words))


def last_line(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_visits_go_on(cifar: Path, small: None, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two visits, the first of which ends in the middle, leave the weights of one."""
    base = ["--data", str(cifar), "--preset", "cifar10-small", "--steps", "7", "--measure", "10"]
    assert paper_cifar10.main([*base, "--states", str(tmp_path / "one"), "--seconds", "600"]) in (0, 1)
    whole = last_line(capsys)
    assert whole["settings"]["schedule_done"] and [bar["name"] for bar in whole["bars"]]
    clock = iter(range(10**6))
    monkeypatch.setattr(bare.time, "monotonic", lambda: float(next(clock)))
    assert paper_cifar10.main([*base, "--states", str(tmp_path / "two"), "--seconds", "9"]) == 0
    first = last_line(capsys)
    steps = {name: row["steps"] for name, row in first["figures"]["models"].items()}
    assert all(0 < count < 7 for count in steps.values()), steps
    assert not first["settings"]["schedule_done"] and not first["bars"]
    monkeypatch.setattr(bare.time, "monotonic", lambda: next(clock) / 1000)
    assert paper_cifar10.main([*base, "--states", str(tmp_path / "two"), "--seconds", "600"]) in (0, 1)
    again = last_line(capsys)
    for name, row in whole["figures"]["models"].items():
        for key in ("total_bits_per_dim", "curve", "steps"):
            assert again["figures"]["models"][name][key] == row[key], (name, key)


def test_a_folder_without_data_says_what_it_wants(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"expected train\*.parquet in .*, found none"):
        paper_cifar10.main(["--data", str(tmp_path), "--states", str(tmp_path)])


def test_a_density_has_no_bits(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="expected a likelihood with bits for the table, found a density; set vqvae"):
        paper_cifar10.main(
            ["--data", str(tmp_path), "--states", str(tmp_path), "--set", "vqvae.likelihood.kind=density"]
        )


def test_splits_are_disjoint_and_whole(cifar: Path) -> None:
    train, validation, test = paper_cifar10.read_splits(cifar, 3)
    assert (len(train), len(validation), len(test)) == (48, 48, 10)
    rows = {bytes(picture.numpy().tobytes()) for picture in torch.cat([train, validation])}
    assert rows == {np.ascontiguousarray(frame(number, 32)).tobytes() for number in range(96)}


def check_bare(module: str) -> None:
    """A module needs no more than a bare machine has: torch, numpy, pyarrow, pillow and safetensors."""
    missing = ["ray", "mlflow", "tyro", "vizdoom", "simplejpeg", "webdataset", "boto3", "matplotlib", "xxhash",
               "torchmetrics", "jaxtyping", "beartype", "pandas", "scipy", "onnxruntime"]  # fmt: skip
    code = f"import sys; sys.modules.update(dict.fromkeys({missing})); import {module}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_it_needs_no_other_packages() -> None:
    check_bare("benchmarks.paper_cifar10")
