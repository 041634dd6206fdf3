"""The second stage as a program: its table and pictures, reuse, and a kill in the middle. Its table, from figures."""

import csv
import io
import json
import math
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import show_second_stage, train_second_stage
from pipelines.show_second_stage import COLUMNS, figures_of, spread_of, table_csv, table_json, table_markdown, title
from tests.pipelines.test_cli import ROOT, assert_one_line
from vqvae_core.artifacts import MANIFEST, Artifact
from vqvae_core.errors import InputError
from vqvae_core.second_stage import SecondStage
from vqvae_core.storage import Folder
from vqvae_core.token_shards import TokenShards

FIRST = ("index", "shard", "train_vqvae", "tokenize")
TRAININGS = [f"train_second_stage_{kind}" for kind in ("codes", "none", "gaussian")]
STEPS = 60


def facts(shift: float) -> dict[str, dict[str, float]]:
    """Of the three models of a run."""
    codes = {"nll_nats": 100.0 + shift, "shuffled_nll_nats": 130.0, "total_nats": 105.0 + shift, "bits_per_token": 1.0}
    codes |= {f"{name}_{number}": 10.0 * number for name in ("perplexity", "usage") for number in (1, 2)}
    none = {"nll_nats": 112.0, "total_nats": 112.0, "bits_per_token": 1.0}
    return {"codes": codes, "none": none, "gaussian": {"nll_nats": 110.0, "kl_nats": 0.5, "total_nats": 110.5}}


def test_the_table_of_figures() -> None:
    rows, seeds = [figures_of(facts(shift)) for shift in (0.0, 1.5)], [4, 5]
    assert rows[1]["gain_over_shuffled_nats"] == 28.5
    assert rows[1]["gain_over_blank_nats"] == 10.5
    assert rows[1]["codes_nats"] == pytest.approx(math.log(10) + math.log(20))
    assert spread_of(rows)["nll_nats"] == {"mean": 100.75, "min": 100.0, "max": 101.5}
    text = table_markdown(rows, seeds)
    assert "| NLL with z | 100.00 | 101.50 | 100.75 (100.00 to 101.50) |\n" in text
    assert "| perplexity of latent 2 | 20.00 | 20.00 |" in text
    assert {line.count("|") for line in text.splitlines()} == {5}
    found = list(csv.DictReader(io.StringIO(table_csv(rows, seeds))))
    assert [row["seed"] for row in found] == ["4", "5", "mean", "min", "max"]
    assert [float(row["gain_over_blank_nats"]) for row in found] == [12.0, 10.5, 11.25, 10.5, 12.0]
    assert table_json(rows, seeds)["runs"][1] == {"seed": 5, **rows[1]}
    assert all(title(name) for name in rows[0])
    assert set(COLUMNS) == {name.rpartition("_")[0] if name[-1].isdigit() else name for name in rows[0]}


def program(root: Path, *arguments: str, **kwargs) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(root, *arguments), capture_output=True, text=True, timeout=500, **kwargs)


def command(root: Path, *arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "pipelines" / "train_second_stage.py"), "--preset", "smoke", "--root", str(root),
            "--second-stage-runs.seeds", "2", "--train-second-stage.steps", str(STEPS), *arguments]  # fmt: skip


def artifacts(root: Path) -> dict[tuple[str, int], Artifact]:
    """By stage and seed, 0 where it has none."""
    found = {}
    for path in root.glob(f"*/{MANIFEST}"):
        one = Artifact.open(Folder.of(path.parent))
        found[one.manifest.stage, one.facts.get("seed", 0)] = one
    return found


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    root, place = tmp_path_factory.mktemp("second"), tmp_path_factory.mktemp("place")
    result = program(root, cwd=place)
    assert result.returncode == 0, result.stdout + result.stderr
    assert not list(place.iterdir()), "it left something where it was started"
    return root, result.stdout


@pytest.mark.slow
def test_the_table_holds_the_numbers_of_the_manifests(done: tuple[Path, str]) -> None:
    root, said = done
    made = artifacts(root)
    assert set(made) == {(stage, 0) for stage in (*FIRST, "show_second_stage")} | {
        (stage, seed) for stage in TRAININGS for seed in (0, 1)
    }
    shown = made["show_second_stage", 0]
    table = json.loads(shown.read("table.json"))
    assert [run["seed"] for run in table["runs"]] == [0, 1]
    for run in table["runs"]:
        codes, none, vae = (made[stage, run["seed"]].facts for stage in TRAININGS)
        assert run["nll_nats"] == codes["nll_nats"]
        assert run["gain_over_shuffled_nats"] == codes["shuffled_nll_nats"] - codes["nll_nats"]
        assert run["gain_over_blank_nats"] == none["nll_nats"] - codes["nll_nats"]
        assert [run[f"perplexity_{number}"] for number in (1, 2, 3)] == [
            codes[f"perplexity_{number}"] for number in (1, 2, 3)
        ]
        assert (run["vae_kl_nats"], run["vae_total_nats"]) == (vae["kl_nats"], vae["total_nats"])
        assert {facts["num_decoder_parameters"] for facts in (codes, none, vae)} == {none["num_parameters"]}
        assert shown.facts[f"nll_nats_run_{run['seed']}"] == run["nll_nats"]
        histories = [json.loads(made[stage, run["seed"]].read("history.json")) for stage in TRAININGS]
        assert all([point["step"] for point in history] == list(range(4, STEPS + 4, 4)) for history in histories)
    values = [run["nll_nats"] for run in table["runs"]]
    assert values[0] != values[1], "two seeds, one result"
    assert table["spread"]["nll_nats"] == {"mean": sum(values) / 2, "min": min(values), "max": max(values)}
    assert shown.facts["nll_nats_mean"] == sum(values) / 2
    rows = list(csv.DictReader(io.StringIO(shown.read("table.csv").decode())))
    assert [float(row["nll_nats"]) for row in rows[:2]] == values
    assert f"| NLL with z | {values[0]:.2f} | {values[1]:.2f} |" in shown.read("table.md").decode()
    assert f"NLL with z {sum(values) / 2:.1f} ({min(values):.1f} to {max(values):.1f})" in said


@pytest.mark.slow
def test_pictures_and_page(done: tuple[Path, str]) -> None:
    """3 frames of 32x32, doubled: itself, its reconstruction, 2 draws; 3 latents with the frame and 3 values each."""
    root, said = done
    shown = artifacts(root)["show_second_stage", 0]
    for name, columns in (("decodings.png", 4), ("walk.png", 4)):
        picture = Image.open(io.BytesIO(shown.read(name)))
        assert picture.size == (columns * 66 - 2, 3 * 66 - 2)
        assert len(np.unique(np.asarray(picture).reshape(-1, 3), axis=0)) > 20
    page = (root / "second_stage.html").read_text()
    assert f"report: {root}/second_stage.html" in said
    assert page.count("data:image/png;base64,") == 3
    assert page.count("data:image/svg+xml;base64,") == 4
    assert not re.search(r"(src|href)=[\"']?https?:", page)
    for name, cells, spread in show_second_stage.cells_of(
        [{k: v for k, v in run.items() if k != "seed"} for run in json.loads(shown.read("table.json"))["runs"]]
    ):
        assert f"<th>{title(name)}</th><td class=number>{cells[0]}</td>" in page
        assert f"<td class=number>{spread}</td>" in page
    assert not (root / "report.html").exists()


@pytest.mark.slow
def test_the_runs_in_mlflow(done: tuple[Path, str]) -> None:
    with sqlite3.connect(done[0] / "mlflow.db") as store:
        runs = store.execute("select name, status from runs").fetchall()
        assert sorted(runs) == sorted(
            (name, "FINISHED") for name in ["smoke: second stage", *FIRST, *TRAININGS, *TRAININGS, "show_second_stage"]
        )
        names = {name for (name,) in store.execute("select distinct key from metrics").fetchall()}
        assert {"validation_shuffled_nll_nats", "kl_nats", "final.gain_over_blank_nats_mean"} <= names
        models = {name for (name,) in store.execute("select name from model_versions").fetchall()}
        assert models == {"VQVAEModel", *(f"SecondStageModel-{kind}" for kind in ("codes", "none", "gaussian"))}
    shown = {path.name for path in (done[0] / "mlartifacts").rglob("*")}
    assert {"decodings.png", "walk.png", "table.md", "report.html"} <= shown


@pytest.mark.slow
def test_a_trained_one_is_loaded(done: tuple[Path, str]) -> None:
    made = artifacts(done[0])
    tokens = TokenShards(made["tokenize", 0])
    found = SecondStage.load(made["train_second_stage_codes", 1].folder.uri)
    assert found.vqvae == made["train_vqvae", 0].manifest.fingerprint
    grid = torch.from_numpy(tokens.read("validation-000000.parquet").tokens[:5].astype("int64"))
    codes = found.encode(grid)
    assert codes.shape == (5, 3)
    assert found.sample(codes, range(5)).tokens.shape == (5, 8, 8)


@pytest.mark.slow
def test_a_second_run_does_no_work(done: tuple[Path, str]) -> None:
    root, _ = done
    before = {path: path.stat().st_mtime_ns for path in root.rglob(MANIFEST)}
    again = program(root, env={**os.environ, "RAY_ADDRESS": "127.0.0.1:1"})  # it would fail to connect
    assert again.returncode == 0, again.stderr
    assert re.findall(r"^(\w+): (\w+)", again.stdout, re.MULTILINE)[:11] == [
        (stage, "reused") for stage in (*FIRST, *TRAININGS, *TRAININGS, "show_second_stage")
    ]
    assert {path: path.stat().st_mtime_ns for path in root.rglob(MANIFEST)} == before


@pytest.mark.slow
def test_what_is_shown_is_made_again_alone(done: tuple[Path, str], tmp_path: Path) -> None:
    made = artifacts(done[0])["show_second_stage", 0]
    result = program(done[0], "--second-stage-runs.seed", "9", "--no-track")
    assert result.returncode == 0, result.stderr
    assert re.findall(r"^(\w+): made", result.stdout, re.MULTILINE) == ["show_second_stage"]
    shutil.move(made.folder.uri, tmp_path / "before")
    assert program(done[0], "--no-track").returncode == 0
    assert Artifact.open(made.folder).files == made.files, "its draws are of the seed"


@pytest.mark.slow
def test_a_driver_that_is_killed_in_each_training_goes_on_to_the_same_bytes(
    done: tuple[Path, str], tmp_path: Path
) -> None:
    """SIGKILL in each training of one seed: every file is that of an uninterrupted run."""
    root, made = tmp_path / "root", artifacts(done[0])
    for one in FIRST:
        shutil.copytree(made[one, 0].folder.uri, root / made[one, 0].folder.name)
    log, one_seed = tmp_path / "log", ("--second-stage-runs.seeds", "1", "--no-track")
    for stage in TRAININGS:
        with log.open("a") as out:
            process = subprocess.Popen(command(root, *one_seed), stdout=out, stderr=subprocess.STDOUT)
            begin = time.monotonic()
            while not any(root.glob(f"{stage}-*/training-*/step-*/state.json")):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() - begin < 300, log.read_text()
                time.sleep(0.02)
            process.kill()
            process.wait()
        assert not list(root.glob(f"{stage}-*/{MANIFEST}"))
        time.sleep(3)  # Ray's processes end some time after the driver
    result = program(root, *one_seed)
    assert result.returncode == 0, result.stdout + result.stderr
    said = log.read_text() + result.stdout
    for stage in TRAININGS:
        assert re.search(rf"^{stage}, seed 0: went on from step [1-9]\d*", said, re.MULTILINE), said
    other = artifacts(root)
    for stage in TRAININGS:
        assert other[stage, 0].folder.name == made[stage, 0].folder.name
        assert other[stage, 0].files == made[stage, 0].files, stage


def test_patience_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="as many steps each, found 2; give --train-second-stage.patience None"):
        train_second_stage.main(["--preset", "smoke", "--root", str(tmp_path), "--train-second-stage.patience", "2"])


@pytest.mark.slow
def test_one_validation_image_has_no_other(tmp_path: Path) -> None:
    """Said before anything is trained."""
    root = tmp_path / "root"
    result = program(root, "--shard.max-validation-images", "1", "--no-track")
    assert_one_line(result, "expected at least 2 validation images, of which each is also given the other's z, found 1")
    assert "; give a source that holds out more, or raise --shard.max-validation-images" in result.stderr
    assert not list(root.glob("train_*"))


@pytest.mark.slow
def test_workers_that_do_not_divide_the_lanes(tmp_path: Path) -> None:
    result = program(tmp_path / "root", "--train.num-lanes", "8", "--resources.num-workers", "8", "--no-track")
    assert_one_line(result, "divides --train-second-stage.num-lanes 4, found 8")
