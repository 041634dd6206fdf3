"""Samples: the same from one seed however they are drawn, and the program that draws them."""

import dataclasses
import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from cluster.session import Session
from pipelines import sample, stage
from pipelines.config import Resources, SampleConfig
from pipelines.stage import Pipeline
from pipelines.tracking import Tracker
from tests.pipelines.test_cli import ROOT, assert_one_line
from tests.pipelines.test_decode import put
from tests.pipelines.test_golden import PRIOR_CONFIG, VQVAE_CONFIG, weights
from vqvae_core.artifacts import Artifact
from vqvae_core.checkpoint import save_model
from vqvae_core.decoding import decode
from vqvae_core.errors import InputError
from vqvae_core.pixelcnn import PixelCNN, PixelCNNConfig
from vqvae_core.prior import Prior
from vqvae_core.storage import Folder
from vqvae_core.token_shards import TokenShape, read_parquet
from vqvae_core.vqvae import VQVAE

PRINT, PICTURE = "ab" * 32, "frame.png"
SHAPE = TokenShape(height=4, width=4, num_groups=1, num_codes=16)


def models(root: Path, config: PixelCNNConfig = PRIOR_CONFIG, *, knows_no_label: bool = True) -> tuple[Path, Path]:
    """Folders of a prior with two labels and of its VQ-VAE, for pictures of 16x16."""
    description = json.dumps(dataclasses.asdict(VQVAE_CONFIG)).encode()
    files = {"model.safetensors": (save_model(weights(VQVAE(VQVAE_CONFIG))), 0), "config.json": (description, 0)}
    vqvae = root / f"train_vqvae-{PRINT[:12]}"
    put(Folder.of(vqvae), "VQVAEModel", files, PRINT, {"image_size": 16, "K": 16, "precision": "fp32"})
    network: Any = weights(PixelCNN(config, SHAPE, 2))
    if not knows_no_label:
        for layer in network.layers:
            layer.bias.label.weight.data[-1] = 0
    prior = Prior(network, {"day": 0, "night": 1}, PRINT)
    folder = root / "train_prior-1"
    put(
        Folder.of(folder),
        "PriorModel",
        {k: (v, 0) for k, v in prior.files(dataclasses.asdict(config)).items()},
        "cd" * 32,
        {},
    )
    return folder, vqvae


def drawn(root: Path, out: str, config: SampleConfig, **more: Any) -> dict[str, Any]:
    """Labels, tokens and pictures by key, as an actor draws all parts."""
    prior, vqvae = models(root)
    drawer, found = sample.Drawer(), {}
    for number, first in enumerate(range(0, config.num_images, config.batch_size)):
        name, count = f"part-{number:06d}", min(config.batch_size, config.num_images - first)
        job = {"prior": str(prior), "vqvae": str(vqvae), "out": str(root / out), "work": "w", "name": name,
               "first": first, "count": count, "config": dataclasses.asdict(config), "labels": [0, 1],
               "completion": None, "threads": 1, "use_gpu": False, **more}  # fmt: skip
        result = drawer(sample._as_row(job))
        assert (result["error"], result["rows"]) == ("", count)
        table = read_parquet((root / out / f"{name}.parquet").read_bytes(), "here")
        for row, key in enumerate(table.keys):
            picture = (root / out / "pictures" / f"{key}.png").read_bytes()
            found[key] = (int(table.labels[row]), table.tokens[row].tolist(), picture)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_a_sample_depends_on_its_seed_only(tmp_path: Path, batch_size: int) -> None:
    """In batches of 1, 7 and 64: the same labels, tokens and pictures, byte for byte."""
    whole = drawn(tmp_path, "whole", SampleConfig(num_images=70))
    assert drawn(tmp_path, "parts", SampleConfig(num_images=70, batch_size=batch_size)) == whole
    assert len({str(tokens) for _, tokens, _ in whole.values()}) == 70
    assert [label for label, _, _ in whole.values()] == [0, 1] * 35


def test_a_seed_is_the_same_sample_wherever_a_run_begins(tmp_path: Path) -> None:
    whole, later = (
        drawn(tmp_path, f"from{seed}", SampleConfig(num_images=9 - seed, seed=seed, batch_size=4)) for seed in (0, 5)
    )
    assert later == {key: whole[key] for key in list(whole)[5:]}


def test_what_is_kept_of_a_picture(tmp_path: Path) -> None:
    tokens = torch.randint(16, (3, 4, 4, 1)).tolist()
    found = drawn(tmp_path, "out", SampleConfig(num_images=7, batch_size=4), labels=[-1],
                  completion={"tokens": tokens, "rows": 2})  # fmt: skip
    for number, (label, drawn_tokens, _) in enumerate(found.values()):
        assert drawn_tokens[:2] == tokens[number % 3][:2]
        assert label == -1
    assert len({str(drawn_tokens[2:]) for _, drawn_tokens, _ in found.values()}) == 7
    assert pq.read_table(tmp_path / "out" / "part-000000.parquet")["label"].null_count == 4


@pytest.mark.parametrize("lost", ["part-000001.parquet", "pictures/sample-000000005.png"])
def test_a_part_without_one_of_its_files_is_drawn_again(tmp_path: Path, lost: str) -> None:
    drawn(tmp_path, "out", SampleConfig(num_images=8, batch_size=4))
    space = stage.Workspace(Folder.of(tmp_path / "out"), "w")
    assert space.finished_parts(["part-000000", "part-000001"]).tolist() == [True, True]
    (tmp_path / "out" / lost).unlink()
    assert space.finished_parts(["part-000000", "part-000001"]).tolist() == [True, False]


@pytest.mark.slow
def test_on_one_actor_and_on_two(tmp_path: Path) -> None:
    """The same files, byte for byte."""
    found, config = [], SampleConfig(num_images=70, batch_size=9)
    for actors in (1, 2):
        root, session = tmp_path / str(actors), Session(num_cpus=actors)
        prior, vqvae = (Artifact.open(Folder.of(folder)) for folder in models(root))
        tracker = Tracker(Folder.of(root), "t", {}, "", enabled=False)
        try:
            made = sample.sample(Pipeline(Folder.of(root), Resources(), session, tracker), config, prior, vqvae)
            assert stage._encoders(session, Resources(), 8) == (actors, 1)
        finally:
            session.close()
        found.append({path: sha256 for path, _, _, sha256 in made.files.rows()})
    assert found[0] == found[1]
    assert sum(path.endswith(".png") for path in found[0]) == 71


def program(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "pipelines" / "sample.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=180)


@pytest.mark.slow
def test_the_program(tmp_path: Path) -> None:
    """A class, a completion, arrays; the same command again does nothing."""
    prior, vqvae = models(tmp_path)
    picture = tmp_path / "frame.png"
    pixels = np.random.default_rng(0).integers(0, 256, (24, 16, 3), np.uint8)
    Image.fromarray(pixels).save(picture)
    command = ["--model", str(prior), "--class", "night", "--num", "5", "--temperature", "0.95", "--output", "npz",
               "--complete", str(picture), "--keep", "0.5", "--top-k", "9", "--batch-size", "8"]  # fmt: skip
    result = program(*command)
    assert result.returncode == 0, result.stdout + result.stderr
    place = next(tmp_path.glob("sample-*"))
    assert f"{place}\n" in result.stdout and f"grid: {place}/samples.png" in result.stdout
    assert (tmp_path / "mlflow.db").exists()
    artifact = Artifact.open(Folder.of(place), "Samples")
    table = read_parquet(artifact.read("part-000000.parquet"), "here")
    assert table.labels.tolist() == [1] * 5
    with torch.no_grad():
        expected = VQVAE.load(str(vqvae)).encode(torch.from_numpy(pixels[None, 4:20]))[0, :2].numpy()
    assert all((tokens[:2, :, 0] == expected).all() for tokens in table.tokens)
    arrays = np.load(io.BytesIO(artifact.read("pictures/part-000000.npz")), allow_pickle=False)
    assert arrays["arr_0"].shape == (5, 16, 16, 3) and arrays["arr_1"].tolist() == [1] * 5
    assert decode(artifact.read("samples.png")).shape[2] == 3
    again = program(*command)
    assert again.returncode == 0 and "sample: reused" in again.stdout


@pytest.mark.slow
def test_models_pictures_and_samples_on_s3(tmp_path: Path, s3_bucket: str) -> None:
    prior, vqvae = models(tmp_path)
    root, pixels = Folder.of(f"{s3_bucket}/samples"), io.BytesIO()
    for path in [*prior.rglob("*"), *vqvae.rglob("*")]:
        if path.is_file():
            root.write(str(path.relative_to(tmp_path)), path.read_bytes())
    Image.new("RGB", (20, 20), (200, 30, 30)).save(pixels, "PNG")
    root.write("frame.png", pixels.getvalue())
    result = program("--model", root.path(prior.name), "--complete", root.path("frame.png"), "--num", "5", "--no-track")
    assert result.returncode == 0, result.stdout + result.stderr
    name = next(name for name in root.folders() if name.startswith("sample-"))
    made = Artifact.open(root / name, "Samples")
    assert made.facts["num_images"] == 5
    assert len(read_parquet(made.read("part-000000.parquet"), "here").keys) == 5


@pytest.mark.slow
def test_killed_while_it_draws(tmp_path: Path) -> None:
    """The same command goes on: no image twice, none missing, the same bytes."""
    config = dataclasses.replace(PRIOR_CONFIG, channels=64, num_layers=12)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = ["--num", "1500", "--batch-size", "8"]
    for root in (whole, killed):
        models(root, config)
    assert program("--model", str(whole / "train_prior-1"), *options).returncode == 0
    command = [
        sys.executable,
        str(ROOT / "pipelines" / "sample.py"),
        "--model",
        str(killed / "train_prior-1"),
        *options,
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    begin = time.monotonic()
    while len(list(killed.glob("sample-*/sidecars/*.json"))) < 3:
        assert process.poll() is None and time.monotonic() - begin < 120
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(5)  # Ray's processes end some time after the driver
    done = {path: path.stat().st_mtime_ns for path in killed.glob("sample-*/sidecars/*.json")}
    assert 3 <= len(done) < 24, "it was not killed in the middle"
    result = program("--model", str(killed / "train_prior-1"), *options)
    assert result.returncode == 0, result.stdout + result.stderr
    assert {path: path.stat().st_mtime_ns for path in done} == done
    one, other = (Artifact.open(Folder.of(next(root.glob("sample-*")))) for root in (whole, killed))
    assert one.files == other.files
    assert len([path for path in one.files if path.startswith("pictures/")]) == 1500


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--class", "dusk"], ["expected a label out of day, night", "found 'dusk'"]),
        (["--class", "2"], ["its number from 0 to 1", "found '2'"]),
        (["--temperature", "0"], ["temperature must be a number above 0, was 0.0"]),
        (["--class", "-1"], ["expected a label, found none (-1)", "--prior.label-dropout"]),
        (["--num", "0"], ["--num: num_images must be at least 1, was 0"]),
        (["--seed", str(2**63 - 1), "--num", "3"], ["--seed: seed must be 0 or more, and seed + num_images at most"]),
        (["--top-p", "1.5"], ["top_p must be above 0 and at most 1"]),
        (["--guidance", "2"], ["a prior that was trained with label_dropout for guidance"]),
        (["--complete", "nowhere.png"], ["expected a picture at nowhere.png, found no such file"]),
        (["--complete", PICTURE], ["the label of the pictures that are completed (--class)"]),
        (["--complete", __file__], ["expected a picture at", "cannot be decoded"]),
        (["--vqvae", "."], ["expected", "manifest.json"]),
    ],
)
def test_messages(tmp_path: Path, options: list[str], parts: list[str]) -> None:
    prior, _ = models(tmp_path, knows_no_label=False)
    Image.new("RGB", (20, 20)).save(tmp_path / PICTURE)
    options = [str(tmp_path / option) if option == PICTURE else option for option in options]
    with pytest.raises(InputError) as caught:
        sample.main(["--model", str(prior), "--no-track", *options])
    for part in parts:
        assert part in str(caught.value)
    assert not list(tmp_path.glob("sample-*/part-*"))


@pytest.mark.slow
def test_a_message_of_the_program(tmp_path: Path) -> None:
    prior, _ = models(tmp_path)
    assert_one_line(program("--model", str(prior), "--class", "dusk"), "expected a label out of day, night")
    assert_one_line(program("--class", "207", "--num=64"), "expected --model, the folder of a trained prior, beside")
