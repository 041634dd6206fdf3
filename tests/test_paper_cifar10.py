"""The benchmark of the paper's table: visits go on, and their last line says what was done."""

import json
import re
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
from vqvae_core.train import NonFiniteLossError


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


@pytest.mark.slow
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


def test_a_visit_that_is_killed_loses_a_minute(
    cifar: Path, small: None, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It wrote states before its end, and the next visit leaves the figures of one that was not killed."""
    base = ["--data", str(cifar), "--preset", "cifar10-small", "--steps", "7", "--measure", "10", "--models", "vimco"]
    paper_cifar10.main([*base, "--states", str(tmp_path / "one"), "--seconds", "600"])
    whole = last_line(capsys)["figures"]["models"]["vimco"]
    calls = iter([0.0, 0.0, *(70.0 * step for step in range(1, 6))])  # 70 s a step

    def clock() -> float:
        for now in calls:
            return now
        raise RuntimeError("killed")

    monkeypatch.setattr(bare.time, "monotonic", clock)
    with pytest.raises(RuntimeError, match="killed"):
        paper_cifar10.main([*base, "--states", str(tmp_path / "two"), "--seconds", "1000"])
    later = iter(range(10**6))
    monkeypatch.setattr(bare.time, "monotonic", lambda: next(later) / 1000)
    capsys.readouterr()
    assert paper_cifar10.main([*base, "--states", str(tmp_path / "two"), "--seconds", "0"]) in (0, 1)
    assert last_line(capsys)["figures"]["models"]["vimco"]["steps"] == 5
    paper_cifar10.main([*base, "--states", str(tmp_path / "two"), "--seconds", "600"])
    again = last_line(capsys)["figures"]["models"]["vimco"]
    for key in ("total_bits_per_dim", "curve", "steps"):
        assert again[key] == whole[key], key


def test_time_that_is_not_needed_goes_to_the_next(
    cifar: Path, small: None, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []

    def measured(name, *parts, seconds, compiled):
        given.append(seconds)
        return {"steps": 1}, {"vae": 10.0, "vqvae": 45.0}.get(name, 45.0)

    monkeypatch.setattr(paper_cifar10, "measured", measured)
    base = ["--data", str(cifar), "--preset", "cifar10-small", "--states", str(tmp_path)]
    assert paper_cifar10.main([*base, "--seconds", "90"]) == 0
    assert given == [30.0, 40.0, 35.0]


def test_a_model_that_diverges_does_not_cost_the_others(
    cifar: Path, small: None, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(name, *parts, seconds, compiled):
        if name == "vqvae":
            raise NonFiniteLossError("expected finite numbers, found loss = nan")
        return {"steps": 1}, 1.0

    monkeypatch.setattr(paper_cifar10, "measured", measured)
    assert paper_cifar10.main(["--data", str(cifar), "--preset", "cifar10-small", "--states", str(tmp_path)]) == 1
    rows = last_line(capsys)["figures"]["models"]
    assert "found loss = nan" in rows["vqvae"]["error"] and rows["vimco"] == {"steps": 1}


def test_a_vqvae_is_measured_by_the_codes_of_its_training(
    cifar: Path, small: None, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bf16 ones where it was trained in bf16, though all else is in fp32."""
    seen = []

    def measured(name, model, *parts):
        seen.append((model.encodes_in_bf16, parts[2]))
        return {"total_bits_per_dim": 1.0}

    monkeypatch.setattr(paper_cifar10, "figures", measured)
    base = ["--data", str(cifar), "--preset", "cifar10-small", "--steps", "1", "--models", "vqvae"]
    for precision in ("fp32", "bf16"):
        paper_cifar10.main([*base, "--states", str(tmp_path), "--set", f"train.precision={precision}"])
        assert last_line(capsys)["settings"]["precision"] == precision
    assert seen == [(False, "fp32"), (True, "fp32")]


def refused(capsys: pytest.CaptureFixture[str], data: Path, *more: str) -> str:
    """What it says where it exits with 2."""
    assert paper_cifar10.main(["--data", str(data), "--states", str(data), *more]) == 2
    return capsys.readouterr().err


def test_a_folder_without_data_says_what_it_wants(tmp_path: Path, capsys) -> None:
    assert "expected train*.parquet in " in refused(capsys, tmp_path)


def test_a_density_has_no_bits(tmp_path: Path, capsys) -> None:
    said = refused(capsys, tmp_path, "--set", "vqvae.likelihood.kind=density")
    assert "expected a likelihood with bits for the table, found a density; set vqvae" in said


def test_bad_values_say_what_is_wrong(cifar: Path, capsys) -> None:
    assert "expected 0 or more images after --measure, found -1" in refused(capsys, cifar, "--measure", "-1")
    assert "steps must be at least 1, was 0" in refused(capsys, cifar, "--steps", "0")
    assert "expected a field that this program reads" in refused(capsys, cifar, "--set", "prior.use-labels=true")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"label": [0]}, "expected a column img or image in .*, found label"),
        ({"img": [{"bytes": None, "path": "a.png"}]}, "expected an image as a struct with bytes in row 0 of "),
        ({"img": [{"bytes": b"no image", "path": None}]}, "expected an image in row 0 of .*, but: "),
        ({"img": [{"bytes": encode(frame(0, size), "png"), "path": None} for size in (32, 16)]},
         r"expected images of one size in train\*.parquet of .*, found \[\(16, 16, 3\), \(32, 32, 3\)\]"),
    ],
)  # fmt: skip
def test_bad_files_say_what_is_wrong(tmp_path: Path, capsys, table: dict, message: str) -> None:
    pq.write_table(pa.table(table), tmp_path / "train-0.parquet")
    assert re.search(message, refused(capsys, tmp_path))


def test_a_file_that_is_no_parquet(tmp_path: Path, capsys) -> None:
    (tmp_path / "train-0.parquet").write_bytes(b"no Parquet")
    assert "expected a Parquet file at " in refused(capsys, tmp_path)


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
