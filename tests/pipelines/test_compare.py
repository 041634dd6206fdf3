"""The likelihood table: its arithmetic, and the whole program in small."""

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.session import Session
from pipelines import compare, compare_report, likelihood_table
from pipelines.config import CompareConfig
from pipelines.likelihood_table import csv_of, markdown, order, rows_of, summarize
from pipelines.presets import PRESETS
from pipelines.stage import Pipeline
from pipelines.tracking import Tracker
from tests.pipelines.data import write_cifar10
from tests.pipelines.test_cli import ROOT
from vqvae_core.artifacts import MANIFEST, Artifact, FileEntry, commit
from vqvae_core.errors import InputError
from vqvae_core.image_shards import ImageShards
from vqvae_core.storage import Folder

SETTINGS = {"likelihood": "logistic", "steps": 30, "train_samples": 3, "first_seed": 0, "notes": ["Images are JPEG."]}
MODELS = ("vae", "vqvae", "vimco", "vimco_gaussian")


def facts(name: str, seed: int) -> dict:
    """Figures as measure_bits has them."""
    total = 4.5 + 0.2 * MODELS.index(name) + 0.01 * seed
    found = {"split": "test", "images": 10, "samples": [1], "total_bits_per_dim": total}
    if name == "vqvae":
        learned = {"latents_learned_bits_per_dim": 1.5, "total_learned_bits_per_dim": total - 0.375}
        return {**found, "reconstruction_bits_per_dim": total - 1.875, "latents_bits_per_dim": 1.875, **learned}
    if name == "vae":
        return {**found, "reconstruction_bits_per_dim": total - 1, "latents_bits_per_dim": 1.0}
    return {**found, "samples": [3, 6], "bound_3_bits_per_dim": total, "bound_6_bits_per_dim": total - 0.1}


def rows(seeds: int = 2) -> list[dict]:
    return [
        row
        for seed in range(seeds)
        for name in MODELS
        for row in rows_of(f"{name}-{seed}", facts(name, seed), SETTINGS)
    ]


def test_a_row_a_model_seed_and_bound() -> None:
    found = rows()
    assert len(found) == 2 * (1 + 1 + 2 + 2)
    read = list(csv.DictReader(io.StringIO(csv_of(found))))
    assert [(row["model"], row["seed"], row["samples_of_bound"]) for row in read[:4]] == [
        ("vae", "0", ""), ("vqvae", "0", ""), ("vimco", "0", "3"), ("vimco", "0", "6"),
    ]  # fmt: skip
    assert float(read[1]["total"]) == pytest.approx(4.7) and float(read[1]["total_learned"]) == pytest.approx(4.325)
    assert (
        read[0]["total_learned"] == ""
        and read[0]["samples_in_training"] == ""
        and read[3]["samples_in_training"] == "3"
    )


def test_seeds_become_a_mean_and_a_spread() -> None:
    lines = {(line["model"], line["samples_of_bound"]): line for line in summarize(rows(3))}
    total = lines["vimco", 6]["total"]
    assert (total["mean"], total["least"], total["greatest"]) == pytest.approx((4.81, 4.8, 4.82))
    assert lines["vae", None]["latents_learned"] is None and lines["vae", None]["seeds"] == [0, 1, 2]
    text = markdown(summarize(rows(3)), SETTINGS)
    assert (
        "| VQ-VAE | 2.835 (2.825 to 2.845) | 1.875 | 4.710 (4.700 to 4.720) | 1.500 | 4.335 (4.325 to 4.345) |" in text
    )
    assert "the seeds 0, 1, 2" in text and "S = 3" in text and text.endswith("\n\nImages are JPEG.\n")


def test_a_table_without_vimco_says_nothing_of_it() -> None:
    text = markdown(summarize([row for row in rows(2) if not row["model"].startswith("vimco")]), SETTINGS)
    assert "| VAE |" in text and "VIMCO" not in text


def test_seeds_of_both_schedules_go_on_from_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second training of a VQ-VAE, and its prior's."""
    config = PRESETS["cifar10-small"][0]
    config = replace(config, train=replace(config.train, seed=4), train_prior=replace(config.train_prior, seed=9))
    assert compare.names(replace(config, compare=replace(config.compare, seeds=2)))[-1] == "vimco-5"
    seeds = []
    monkeypatch.setattr(compare, "train_vqvae", lambda pipeline, config, images: seeds.append(config.train.seed))
    monkeypatch.setattr(compare, "tokenize_images", lambda *parts: None)
    monkeypatch.setattr(compare, "train_prior", lambda pipeline, config, tokens: seeds.append(config.train_prior.seed))
    monkeypatch.setattr(compare, "measure_bits", lambda *parts: None)
    root = Folder.of(tmp_path)
    pipeline = Pipeline(root, config.resources, Session(), Tracker(root, "test", {}, "", enabled=False), {})
    compare._contender(pipeline, config, None, "vqvae-5")  # type: ignore[arg-type]
    assert seeds == [5, 10]


def test_the_papers_order_is_counted() -> None:
    assert order(rows(2)) == {"seeds": 2, "seeds_in_the_papers_order": 2, "seeds_where_a_learned_prior_gains": 2}
    other = rows(2)
    other[0]["total"] = 9.0  # the VAE of seed 0
    other[7]["total_learned"] = 9.0  # the VQ-VAE of seed 1
    assert order(other) == {"seeds": 2, "seeds_in_the_papers_order": 1, "seeds_where_a_learned_prior_gains": 1}
    assert order([row for row in rows(2) if row["model"] != "vae"]) == {
        "seeds": 2,
        "seeds_where_a_learned_prior_gains": 2,
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"models": ("vae", "gan")},
            "models must be different ones out of vae, vqvae, vimco, vimco_gaussian, were vae gan",
        ),
        ({"models": ("vae", "vae")}, "models must be different ones"),
        ({"seeds": 0}, "seeds must be at least 1, was 0"),
        ({"train_samples": 1}, "train_samples must be at least 2"),
        ({"report_samples": (0,)}, "report_samples must be different numbers of at least 1"),
        ({"report_samples": (10, 10)}, "report_samples must be different numbers of at least 1"),
    ],
)
def test_bad_values(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompareConfig(**fields)


def test_messages(tmp_path: Path) -> None:
    write_cifar10(tmp_path / "cifar")
    base = arguments(tmp_path / "cifar", tmp_path / "root")
    with pytest.raises(InputError, match=r"expected one of vae-0, vqvae-0, vimco-0 after --only, found 'vae-1'"):
        compare.main([*base, "--only", "vae-1"])
    with pytest.raises(InputError, match="expected a prior of the images alone.*; give --prior.no-use-labels"):
        compare.main([argument for argument in base if argument != "--prior.no-use-labels"])
    with pytest.raises(InputError, match="expected a likelihood with bits for the table, found a density"):
        compare.main([*base, "--vqvae.likelihood.kind", "density"])
    with pytest.raises(InputError, match="after as many steps each, found 3; give --train.patience None"):
        compare.main([*base, "--train.patience", "3"])


def test_the_page_says_what_the_table_says() -> None:
    facts = {"seeds": 3, "likelihood": "logistic", "notes": SETTINGS["notes"], "seeds_in_the_papers_order": 2}
    words = compare_report._words(summarize(rows(3)), facts)
    assert "the paper's order, in 2 of 3 seeds" in words and words.endswith(" Images are JPEG.")


def test_what_has_to_be_said_beside_bits(tmp_path: Path) -> None:
    """Of JPEG, and of images that chose the weights."""

    def notes(image_format: str, kinds: list[str], splits: tuple[str, ...]) -> list[str]:
        folder = Folder.of(tmp_path / f"{image_format}-{len(kinds)}-{len(splits)}")
        data = json.dumps({"kinds": dict.fromkeys(kinds, 1)}).encode()
        folder.write("data.json", data)
        facts = {"image_format": image_format, "splits": {split: {"images": 1} for split in splits}}
        files = [FileEntry.of("data.json", data), *(FileEntry(f"{split}-000000.tar", 1, 1, "") for split in splits)]
        made = commit(folder, kind="ImageShards", stage="shard", stage_version=1, fingerprint="f", recipe={}, inputs={},
                      files=files, facts=facts, provenance={})  # fmt: skip
        return likelihood_table._notes(ImageShards(made))

    assert notes("png", ["PNG RGB"], ("train", "validation", "test")) == []
    assert [note[:15] for note in notes("png", ["PNG RGB", "JPEG RGB"], ("train", "test"))] == ["Images are or w"]
    assert [note[:15] for note in notes("jpg", [], ("train", "validation"))] == ["These images al", "Images are or w"]


def arguments(source: Path, root: Path) -> list[str]:
    return ["--preset", "smoke", "--source-kind", "cifar10", "--source", str(source), "--root", str(root),
            "--shard.holdout-images", "9", "--vqvae.likelihood.kind", "logistic", "--vqvae.quantizer.num-groups", "2",
            "--prior.no-use-labels", "--compare.models", "vae", "vqvae", "vimco"]  # fmt: skip


def run(source: Path, root: Path, *more: str, **kwargs) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "pipelines/compare.py", *arguments(source, root), *more]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, **kwargs)


def contents(root: Path) -> dict[str, str]:
    """The content of each artifact, by its folder."""
    return {
        path.parent.name: Artifact.open(Folder.of(path.parent)).manifest.content for path in root.glob(f"*/{MANIFEST}")
    }


ONE_CPU = ("--resources.cpus-per-worker", "1")  # threads are part of what decides the last bits of a sum


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """A source, a root with two seeds of three models, and what the command printed that trained two of them at a time.
    It was begun with one of them alone, which was killed in the middle of its training."""
    place = tmp_path_factory.mktemp("compare")
    source, root, log = place / "cifar", place / "root", place / "log"
    write_cifar10(source, num_records=20)
    more = ("--compare.seeds", "2", *ONE_CPU)
    command = [sys.executable, "pipelines/compare.py", *arguments(source, root), *more, "--only", "vqvae-0"]
    with (
        log.open("w") as out,
        subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out, start_new_session=True) as process,
    ):
        deadline = time.monotonic() + 300
        while not list(root.glob("train_vqvae-*/training-*/step-*/state.json")):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)
    assert not list(root.glob("train_vqvae-*/manifest.json"))
    result = run(source, root, *more, "--resources.side-by-side", "2")
    assert result.returncode == 0, result.stdout + result.stderr
    return source, root, result.stdout


@pytest.mark.slow
def test_the_program(done: tuple[Path, Path, str]) -> None:
    """A table, and all of it reused."""
    source, root, said = done
    assert re.search(r"^\[vqvae-0\] train_vqvae: went on from step [1-9]", said, re.MULTILINE)
    assert {f"[{name}-{seed}]" for name in ("vae", "vqvae", "vimco") for seed in (0, 1)} <= set(said.split())
    tables = [path.parent for path in root.glob("likelihood_table-*/manifest.json")]
    table = Artifact.open(Folder.of(tables[0]))
    found = json.loads(table.read("table.json"))
    assert len(found["rows"]) == 2 * (1 + 1 + 2)
    by_model = {(row["model"], row["seed"], row["samples_of_bound"]): row for row in found["rows"]}
    for seed in (0, 1):
        row = by_model["vqvae", seed, None]
        assert row["total"] == pytest.approx(row["reconstruction"] + row["latents"])
        assert row["latents"] == pytest.approx(8 * 8 * 2 * 5 / 3072)
        assert row["total_learned"] == pytest.approx(row["reconstruction"] + row["latents_learned"])
        assert by_model["vimco", seed, 6]["total"] < by_model["vimco", seed, 3]["total"] < 12
        assert (row["split"], row["images"]) == ("test", 20)
    assert by_model["vae", 0, None]["total"] != by_model["vae", 1, None]["total"]
    assert table.facts["vqvae.total"] == pytest.approx(
        sum(by_model["vqvae", seed, None]["total"] for seed in (0, 1)) / 2
    )
    assert table.read("table.md").decode() in said
    manifests = [Artifact.open(Folder.of(path.parent)).manifest for path in root.glob("train_v*/manifest.json")]
    assert len(manifests) == 6
    for manifest in manifests:  # what --config replays
        assert manifest.provenance["config"]["train"]["seed"] == manifest.recipe["train"]["seed"]
    page = (root / "comparison.html").read_text()
    assert "VIMCO, categorical" in page and page.count("data:image/png") >= 4
    before = contents(root)
    again = run(source, root, "--compare.seeds", "2", *ONE_CPU)
    assert again.returncode == 0 and not re.search(r": made in", again.stdout)
    assert contents(root) == before


@pytest.mark.slow
@pytest.mark.exhaustive
def test_one_after_the_other(done: tuple[Path, Path, str], tmp_path: Path) -> None:
    """Without a kill and not side by side: the same."""
    source, two, _ = done
    root, models = tmp_path / "one", ("--compare.models", "vae", "vqvae")
    one = run(source, root, *models, *ONE_CPU)
    assert one.returncode == 0, one.stdout + one.stderr
    made = {name: content for name, content in contents(root).items() if not name.startswith("likelihood_table")}
    assert len(made) == 8 and made.items() <= contents(two).items()
    env = {**os.environ, "RAY_ADDRESS": "127.0.0.1:1"}  # it would fail to connect
    again = run(source, root, *models, "--resources.side-by-side", "2", env=env)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "[vae-0] " not in again.stdout
