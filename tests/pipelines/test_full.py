"""The whole pipeline on the smoke preset: what it makes, that it is reused, and that kills change nothing."""

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import webdataset

from tests.conftest import ONE_CPU, SmokeRun
from tests.pipelines.test_cli import ROOT, assert_one_line, full
from tests.pipelines.test_extractor import extractor
from vqvae_core.artifacts import MANIFEST, Artifact
from vqvae_core.image_shards import ImageShards
from vqvae_core.storage import Folder
from vqvae_core.token_shards import TokenShards

pytestmark = pytest.mark.slow
STAGES = ("index", "shard", "train_vqvae", "tokenize", "train_prior", "sample", "evaluate")


def smoke(root: Path, *arguments: str, **kwargs) -> subprocess.CompletedProcess[str]:
    return full("--preset", "smoke", "--root", str(root), *arguments, **kwargs)


def artifacts(root: Path) -> dict[str, Artifact]:
    found = {path.parent.name.rsplit("-", 1)[0]: path.parent for path in root.glob(f"*/{MANIFEST}")}
    return {stage: Artifact.open(Folder.of(path)) for stage, path in found.items()}


@pytest.fixture(scope="module")
def done(smoke_run: SmokeRun) -> tuple[Path, str]:
    """A root with one finished run, and what it printed."""
    return smoke_run.root, smoke_run.said


def test_it_says_what_it_did(done: tuple[Path, str]) -> None:
    root, said = done
    for stage in STAGES:
        assert re.search(rf"^{stage}: made in [\d.]+ s  {root}/{stage}-\w{{12}}$", said, re.MULTILINE)
    assert f"report: {root}/report.html" in said
    assert "alarm at step" not in said, "half of the codes are in use"
    assert re.search(r"^done in [\d.]+ s, \d+ % of it inside stage work$", said, re.MULTILINE)


def test_every_file_is_what_its_manifest_says(done: tuple[Path, str]) -> None:
    for artifact in artifacts(done[0]).values():
        for path in artifact.files:
            artifact.read(path)


def test_shards(done: tuple[Path, str]) -> None:
    images = ImageShards(artifacts(done[0])["shard"])
    assert images.artifact.facts["splits"] == {
        "train": {"shards": 3, "images": 96},
        "validation": {"shards": 2, "images": 48},
    }
    assert images.label_map == {"E1M3": 0, "MAP04": 1}
    samples = [sample for split in ("train", "validation") for path in images.shards(split)
               for sample in images.read(path)]  # fmt: skip
    assert len({sample.key for sample in samples}) == 144
    assert all(sample.pixels().shape == (32, 32, 3) for sample in samples)
    episodes = {split: {(s.facts["level"], s.facts["episode"]) for p in images.shards(split) for s in images.read(p)}
                for split in ("train", "validation")}  # fmt: skip
    assert not episodes["train"] & episodes["validation"]
    for path in images.shards("train"):  # episodes are mixed across shards
        assert len({sample.facts["episode"] for sample in images.read(path)}) == 4


@pytest.mark.filterwarnings("ignore")
def test_the_webdataset_library_reads_the_shards(done: tuple[Path, str]) -> None:
    images = ImageShards(artifacts(done[0])["shard"])
    for path in images.shards("train"):
        dataset = webdataset.WebDataset(images.artifact.folder.path(path), shardshuffle=False)
        assert [sample["__key__"] for sample in dataset] == [sample.key for sample in images.read(path)]


def test_tokens_stand_beside_their_images(done: tuple[Path, str]) -> None:
    made = artifacts(done[0])
    images, tokens = ImageShards(made["shard"]), TokenShards(made["tokenize"])
    assert tokens.shape.height == tokens.shape.width == 8
    for split in ("train", "validation"):
        for picture, code in zip(images.shards(split), tokens.shards(split), strict=True):
            samples, table = images.read(picture), tokens.read(code)
            assert table.keys == [sample.key for sample in samples]
            assert table.labels.tolist() == [sample.label for sample in samples]
            assert table.model == made["train_vqvae"].manifest.fingerprint


def test_a_second_run_does_no_work(done: tuple[Path, str]) -> None:
    root, _ = done
    before = {path: path.stat().st_mtime_ns for path in root.rglob(MANIFEST)}
    begin = time.monotonic()
    again = smoke(root, env={**os.environ, "RAY_ADDRESS": "127.0.0.1:1"})  # it would fail to connect
    seconds = time.monotonic() - begin
    assert again.returncode == 0, again.stderr
    for stage in STAGES:
        assert re.search(rf"^{stage}: reused", again.stdout, re.MULTILINE)
    assert {path: path.stat().st_mtime_ns for path in root.rglob(MANIFEST)} == before
    assert seconds < 60, "reuse must not start Ray"


@pytest.mark.parametrize(("script", "count"), [("shard", 2), ("tokenize_images", 4), ("sample", 6), ("evaluate", 7)])
def test_each_stage_is_a_script(done: tuple[Path, str], script: str, count: int) -> None:
    """It runs the stages up to itself."""
    command = [sys.executable, str(ROOT / "pipelines" / f"{script}.py"), "--preset", "smoke", "--root", str(done[0])]
    result = subprocess.run([*command, "--no-track"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert re.findall(r"^(\w+): reused", result.stdout, re.MULTILINE) == list(STAGES[:count])


def program(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "pipelines" / f"{script}.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_verify_program_is_content_or_names_the_fault(done: tuple[Path, str], tmp_path: Path) -> None:
    places = [artifact.folder.uri for artifact in artifacts(done[0]).values()]
    good = program("verify", *places)
    assert good.returncode == 0, good.stdout + good.stderr
    assert len(re.findall(r"^/.* files, \d+ rows, all well$", good.stdout, re.MULTILINE)) == len(STAGES)
    shards = tmp_path / "shards"
    shutil.copytree(next(place for place in places if "/shard-" in place), shards)
    data = bytearray((shards / "train-000001.tar").read_bytes())
    data[700] ^= 1
    (shards / "train-000001.tar").write_bytes(data)
    (shards / "validation-000000.tar").unlink()
    bad = program("verify", str(shards))
    assert bad.returncode == 1, bad.stderr
    assert "shards/train-000001.tar: expected sha256 " in bad.stdout
    assert "shards/validation-000000.tar: expected the file, it is missing" in bad.stdout
    assert re.search(r"\d+ files, \d+ rows, 2 faults$", bad.stdout, re.MULTILINE)
    assert_one_line(program("verify", str(tmp_path)), "expected a finished artifact")


def test_the_decode_program_makes_pictures(done: tuple[Path, str], tmp_path: Path) -> None:
    tokens = artifacts(done[0])["tokenize"].folder.uri
    result = program("decode", tokens, "--out", str(tmp_path), "--limit", "5")
    assert result.returncode == 0, result.stderr
    assert len(list(tmp_path.glob("*.png"))) == 6


def test_a_changed_field_remakes_what_depends_on_it(done: tuple[Path, str]) -> None:
    result = smoke(done[0], "--sample.seed", "7", "--no-track")
    assert result.returncode == 0, result.stderr
    assert re.findall(r"^(\w+): (reused|made)", result.stdout, re.MULTILINE) == [
        *((stage, "reused") for stage in STAGES[:-2]),
        ("sample", "made"),
        ("evaluate", "reused"),  # samples are measured where an extractor is given, and only there
    ]


def test_the_runs_in_mlflow(done: tuple[Path, str]) -> None:
    """One parent and a child for each stage, finished, with params, curves, datasets, pictures and models."""
    root, _ = done
    with sqlite3.connect(root / "mlflow.db") as store:
        runs = store.execute("select run_uuid, name, status from runs").fetchall()
        assert sorted(name for _, name, _ in runs) == sorted(["smoke", *STAGES])
        assert {status for *_, status in runs} == {"FINISHED"}
        ids = {name: run for run, name, _ in runs}
        parents = store.execute("select value from tags where key = 'mlflow.parentRunId'").fetchall()
        assert parents == [(ids["smoke"],)] * len(STAGES)
        query = "select count(*) from metrics where run_uuid = ? and key = ?"
        assert store.execute(query, (ids["train_vqvae"], "mse")).fetchone() == (6,)
        assert store.execute(query, (ids["train_vqvae"], "epoch_usage")).fetchone() == (2,)
        assert store.execute(query, (ids["train_vqvae"], "usage_alarm")).fetchone() == (2,)
        assert store.execute(query, (ids["train_prior"], "validation_bits_per_token")).fetchone() == (2,)
        for name in ("psnr_db", "ssim", "ms_ssim", "ms_ssim_scales", "bits_per_token", "perplexity"):
            assert store.execute(query, (ids["evaluate"], f"final.{name}")).fetchone() == (1,)
        params = dict(store.execute("select key, value from params where run_uuid = ?", (ids["smoke"],)).fetchall())
        assert params["train.batch_size"] == "8"
        digests = {row[0] for row in store.execute("select digest from datasets").fetchall()}
        assert artifacts(root)["shard"].manifest.content[:36] in digests
        models = store.execute("select name, current_stage from model_versions").fetchall()
        assert {name for name, _ in models} == {"VQVAEModel", "PriorModel"}
    names = {path.name for path in (root / "mlartifacts").rglob("*")}
    assert {
        "contact_sheet.png",
        "data.json",
        "reconstructions.png",
        "reconstructions-000012.png",  # a grid at each validation
        "reconstructions-000024.png",
        "samples.png",
        "evaluation.png",
        "evaluation.json",
        "report.html",
        "model.safetensors",
    } <= names


def test_the_report_is_self_contained(done: tuple[Path, str]) -> None:
    page = (done[0] / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert page.count("data:image/svg+xml;base64,") == 4
    assert not re.search(r"(src|href)=[\"']?https?:", page)
    for word in ("Reconstructions", "Samples of the prior", "PSNR", "bits/token", "train_vqvae"):
        assert word in page
    data = json.loads(artifacts(done[0])["shard"].read("data.json"))
    means, deviations = (" / ".join(f"{value:.1f}" for value in data[name]) for name in ("mean", "deviation"))
    cells = {"Images": "96 + 48", "Rejected": "0", "Exact duplicates": f"{data['exact_duplicates']:,}",
             "Source size": "320 x 240", "Labels": "2", "Mean": means, "Deviation": deviations}  # fmt: skip
    for name, value in cells.items():
        assert f"<tr><th>{name}</th><td class=number>{value}</td>" in page
    assert "pixels RGB: 144" in page
    found = artifacts(done[0])["evaluate"].facts
    assert "48 images of the validation split, 32 x 32." in page
    for name, value in {"SSIM": f"{found['ssim']:.4f}", "MS-SSIM": f"{found['ms_ssim']:.4f}", "rFID": "-"}.items():
        assert f"<tr><th>{name}</th><td class=number>{value}</td>" in page


def test_the_figures_of_the_evaluation(done: tuple[Path, str]) -> None:
    """On the validation split they are those that training ended with, but for bf16."""
    made = artifacts(done[0])
    figures, model, prior = (made[stage].facts for stage in ("evaluate", "train_vqvae", "train_prior"))
    assert figures["psnr_db"] == pytest.approx(model["psnr_db"], abs=0.05)
    assert figures["perplexity"] == pytest.approx(model["perplexity"], rel=0.05)
    assert figures["bits_per_token"] == pytest.approx(prior["bits_per_token"], abs=0.02)
    assert figures["unigram_bits_per_token"] == pytest.approx(prior["unigram_bits_per_token"], abs=0.02)
    assert (figures["split"], figures["num_images"], figures["ms_ssim_scales"]) == ("validation", 48, 2)
    assert f"validation, 48 images: SSIM {figures['ssim']:.4f}, MS-SSIM {figures['ms_ssim']:.4f}\n" in done[1]


@pytest.mark.parametrize("script", ["full", pytest.param("evaluate", marks=pytest.mark.exhaustive)])
def test_an_extractor_and_its_card(done: tuple[Path, str], tmp_path: Path, script: str) -> None:
    """By Ray, out of a file; what is there is reused, and a file that is not there ends the run before it begins."""
    (tmp_path / "net.onnx").write_bytes(extractor())
    options = ["--preset", "smoke", "--root", str(done[0]), "--no-track", "--evaluate.extractor"]
    result = program(script, *options, str(tmp_path / "net.onnx"))
    assert result.returncode == 0, result.stderr
    assert re.search(r"^sample: reused", result.stdout, re.MULTILINE)
    card = "FID card: split validation, num images 48, num samples 4, resize none, crop none, extractor net.onnx, "
    assert f"\n{card}extractor sha256 " in result.stdout
    assert re.search(r"rFID \d+\.\d+, FID of samples \d+\.\d+", result.stdout)
    missing = program(script, *options, str(tmp_path / "none.onnx"))
    assert_one_line(missing, "expected a file at", "(--evaluate.extractor), found no such file; nothing is downloaded")


def test_a_config_is_replayed_from_a_manifest(done: tuple[Path, str]) -> None:
    manifest = artifacts(done[0])["sample"].folder.path(MANIFEST)
    result = full("--preset", "smoke", "--root", str(done[0]), "--config", manifest, "--no-track")
    assert result.returncode == 0, result.stderr
    assert len(re.findall(r": reused", result.stdout)) == len(STAGES)


@pytest.mark.parametrize(
    ("harm", "parts"),
    [
        (lambda folder, path: (folder / path).unlink(), ["expected", "found nothing; restore the file"]),
        (lambda folder, path: (folder / path).write_bytes(b"short"), ["expected", "found 5 bytes"]),
        (
            lambda folder, path: (folder / MANIFEST).write_text(
                json.dumps({**json.loads((folder / MANIFEST).read_text()), "version": 2})
            ),
            ["expected manifest version 1", "found 2; use the release that wrote it, or another --root"],
        ),
    ],
    ids=["missing", "short", "version"],
)
def test_a_damaged_artifact_is_named_and_kept(done: tuple[Path, str], tmp_path: Path, harm, parts: list[str]) -> None:
    copy = tmp_path / "root"
    subprocess.run(["cp", "-r", str(done[0]), str(copy)], check=True)
    folder = next(copy.glob("shard-*"))
    harm(folder, "train-000001.tar")
    before = sorted(path.name for path in copy.rglob("*"))
    assert_one_line(smoke(copy, "--no-track"), *parts)
    assert [name for name in sorted(path.name for path in copy.rglob("*")) if "mlflow" not in name] == [
        name for name in before if "mlflow" not in name
    ]


def test_a_flipped_byte_is_found_when_the_file_is_read(done: tuple[Path, str], tmp_path: Path) -> None:
    copy = tmp_path / "root"
    subprocess.run(["cp", "-r", str(done[0]), str(copy)], check=True)
    path = next(copy.glob("shard-*")) / "validation-000000.tar"
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    result = smoke(copy, "--no-track", "--train.seed", "5")
    assert_one_line(result, "expected sha256", "for validation-000000.tar", "restore the file")


def kill_when(root: Path, ready, *arguments: str, timeout: float = 120) -> str:
    """Start the pipeline, SIGKILL its driver as soon as ready(root), and return what it had printed."""
    command = [sys.executable, str(ROOT / "pipelines" / "full.py"), "--preset", "smoke", "--root", str(root),
               *arguments]  # fmt: skip
    log = root.with_suffix(".log")
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        begin = time.monotonic()
        while not ready(root):
            assert process.poll() is None, f"it ended before it could be killed: {log.read_text()}"
            assert time.monotonic() - begin < timeout
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    return log.read_text()


def has(pattern: str):
    return lambda root: any(root.glob(pattern))


def has_checkpoint(stage: str):
    """There is a whole state of the stage."""
    return has(f"{stage}-*/training-*/step-*/state.json")


KILLS = {
    "reading": has("shard-*/staging/sidecars/g*.json"),
    "shard": has("shard-*/sidecars/train-000000.json"),
    "train_vqvae": has_checkpoint("train_vqvae"),
    "tokenize": has("tokenize-*/sidecars/*.json"),
    "train_prior": has_checkpoint("train_prior"),
    "sample": has("sample-*/sidecars/part-000000.json"),
    "evaluate": has("evaluate-*/sidecars/validation-*.json"),
}


@pytest.mark.parametrize(
    "places",
    [
        pytest.param(("reading", "train_vqvae", "tokenize"), id="three"),  # one of each kind of work
        pytest.param(tuple(KILLS), id="seven", marks=pytest.mark.exhaustive),
    ],
)
def test_a_driver_that_is_killed_goes_on(smoke_run: SmokeRun, tmp_path: Path, places: tuple[str, ...]) -> None:
    """The same command after each kill does nothing finished again, and what it makes in the end is byte for byte what
    an uninterrupted run makes in another root."""
    root = tmp_path / "root"
    options = ["--no-track", "--resources.checkpoint-every", "2", *ONE_CPU]
    kept: dict[Path, int] = {}
    lines: list[str] = []
    for where in places:
        lines += kill_when(root, KILLS[where], *options, timeout=240).splitlines()
        stage = "shard" if where == "reading" else where
        assert not list(root.glob(f"{stage}-*/{MANIFEST}")), f"{stage} was over before its driver was killed"
        assert {path: path.stat().st_mtime_ns for path in kept} == kept
        kept = {path: path.stat().st_mtime_ns for pattern in (f"*/{MANIFEST}", "*/sidecars/*.json")
                for path in root.glob(pattern)}  # fmt: skip
        time.sleep(3)  # Ray's processes end some time after the driver
    result = smoke(root, *options)
    assert result.returncode == 0, result.stdout + result.stderr
    lines += result.stdout.splitlines()
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert set(re.findall(r"^(\w+): reused", result.stdout, re.MULTILINE)) == set(STAGES[: STAGES.index(places[-1])])
    for stage in STAGES:
        assert len([line for line in lines if line.startswith(f"{stage}: made in ")]) == 1, stage
    for stage in {"train_vqvae", "train_prior"} & set(places):
        assert any(re.match(rf"{stage}: went on from step [1-9]\d*", line) for line in lines), stage
    assert {made.folder.name: made.manifest.content for made in artifacts(root).values()} == smoke_run.contents


def test_a_torn_and_an_altered_checkpoint(tmp_path: Path) -> None:
    """Training goes on from the one before, names both, and comes to the same weights."""
    root = tmp_path / "root"
    steps = ["--train.steps", "300", "--no-track", "--resources.keep-checkpoints", "4"]

    def ready(root: Path) -> bool:
        return len(list(root.glob("train_vqvae-*/training-*/step-*/state.json"))) >= 4

    kill_when(root, ready, *steps)
    time.sleep(5)  # Ray's processes end some time after the driver
    places = sorted(path.parent for path in root.glob("train_vqvae-*/training-*/step-*/state.json"))
    (places[-1] / "state.json").unlink()
    data = bytearray((places[-2] / "state.safetensors").read_bytes())
    data[-1] ^= 1
    (places[-2] / "state.safetensors").write_bytes(data)
    result = program("train_vqvae", "--preset", "smoke", "--root", str(root), *steps)
    assert result.returncode == 0, result.stderr
    line = next(line for line in result.stdout.splitlines() if "going on from" in line)
    assert f"expected a whole training state at {places[-1]}, found no state.json" in line
    assert f"for {places[-2]}/state.safetensors" in line
    assert line.endswith(f"going on from {places[-3]}")
    assert f"train_vqvae: went on from step {int(places[-3].name.removeprefix('step-'))}" in result.stdout
    made = artifacts(root)["train_vqvae"]
    other = tmp_path / "other"
    shutil.copytree(artifacts(root)["shard"].folder.uri, other / Path(artifacts(root)["shard"].folder.uri).name)
    shutil.copytree(artifacts(root)["index"].folder.uri, other / Path(artifacts(root)["index"].folder.uri).name)
    assert program("train_vqvae", "--preset", "smoke", "--root", str(other), *steps).returncode == 0
    assert artifacts(other)["train_vqvae"].files == made.files


@pytest.mark.parametrize(
    "stage", ["tokenize", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("sample", "evaluate"))]
)
def test_a_flipped_byte_that_a_task_finds(done: tuple[Path, str], tmp_path: Path, stage: str) -> None:
    copy = tmp_path / "root"
    subprocess.run(["cp", "-r", str(done[0]), str(copy)], check=True)
    for path in copy.glob(f"{stage}-*"):
        shutil.rmtree(path)
    path = next(copy.glob("train_vqvae-*")) / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert_one_line(smoke(copy, "--no-track"), "expected sha256", "for model.safetensors", "restore the file")


@pytest.mark.exhaustive
def test_two_workers(done: tuple[Path, str], tmp_path: Path) -> None:
    """Two ranks with one CPU each, in fp32, come to what one rank comes to, up to the order of sums."""
    figures = []
    for number in (1, 2):
        copy = tmp_path / str(number)
        copy.mkdir()
        shutil.copytree(
            artifacts(done[0])["shard"].folder.uri, copy / Path(artifacts(done[0])["shard"].folder.uri).name
        )
        command = [sys.executable, str(ROOT / "pipelines" / "train_vqvae.py"), "--preset", "smoke", "--root", str(copy)]
        options = ["--no-track", "--train.precision", "fp32", "--resources.num-workers", str(number)]
        result = subprocess.run([*command, *options], capture_output=True, text=True, timeout=200)
        assert result.returncode == 0, result.stdout + result.stderr
        figures.append(artifacts(copy)["train_vqvae"])
    assert figures[0].manifest.fingerprint == figures[1].manifest.fingerprint
    assert figures[0].facts["psnr_db"] == pytest.approx(figures[1].facts["psnr_db"], abs=0.05)
