"""The benchmark of first stage and prior in visits: what it trains goes on, is judged and is shown."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import bare, paper_frames
from pipelines.presets import PRESETS
from tests.test_paper_cifar10 import check_bare
from tests.vqvae_core.shards import make_images
from vqvae_core.errors import InputError
from vqvae_core.storage import Folder
from vqvae_core.train_config import best_precision

SMALL = ("train.steps=7", "train.batch-size=8", "train.validate-every=3", "train-prior.steps=6",
         "train-prior.batch-size=8", "vqvae.quantizer.num-codes=8")  # fmt: skip


def run(capsys: pytest.CaptureFixture[str], shards: Path, to: Path, *more: str) -> tuple[int, dict]:
    where = ["--shards", str(shards), "--states", str(to / "states"), "--out", str(to / "out")]
    code = paper_frames.main([*where, "--preset", "smoke", *more, "--set", *SMALL])
    return code, json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def refused(capsys: pytest.CaptureFixture[str], shards: Path, to: Path, *more: str) -> str:
    """What it says where it exits with 2."""
    where = ["--shards", str(shards), "--states", str(to / "states"), "--out", str(to / "out")]
    assert paper_frames.main([*where, "--preset", "smoke", *more]) == 2
    return capsys.readouterr().err


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    make_images(Folder(str(tmp_path / "shards")), [20, 12], size=16, validation=6)
    return tmp_path / "shards"


@pytest.mark.slow
def test_visits_go_on(shards: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two visits, the first of which ends in the middle, leave the figures and pictures of one."""
    every = ("--seconds", "600", "--prior-seconds", "600")
    code, whole = run(capsys, shards, tmp_path / "one", *every)
    assert code == 1, "noise cannot be reconstructed: the bars must say so"
    assert [bar["name"] for bar in whole["bars"]] == [
        "db_above_shrunken_pictures_of_as_many_bits", "bits_per_token_below_unigram"
    ]  # fmt: skip
    clock = iter(range(10**6))
    monkeypatch.setattr(bare.time, "monotonic", lambda: float(next(clock)))
    code, first = run(capsys, shards, tmp_path / "two", "--seconds", "4")
    assert 0 < first["figures"]["vqvae"]["steps"] < 7 and not first["bars"] and code == 0
    monkeypatch.setattr(bare.time, "monotonic", lambda: next(clock) / 1000)
    _, again = run(capsys, shards, tmp_path / "two", *every)
    for row in (*whole["figures"].values(), *again["figures"].values()):
        del row["images_per_second"]
    assert again["figures"] == whole["figures"] and again["bars"] == whole["bars"]
    for name, size in (("reconstructions.png", 2), ("samples.png", 8)):
        one, two = ((tmp_path / run / "out" / name).read_bytes() for run in ("one", "two"))
        assert one == two, name
        with Image.open(tmp_path / "one" / "out" / name) as picture:
            assert picture.height >= size * 16 and np.asarray(picture).std() > 0


def test_without_a_state_or_time_it_says_so(shards: Path, tmp_path: Path, capsys) -> None:
    assert "expected a state of the VQ-VAE in " in refused(capsys, shards, tmp_path, "--seconds", "0")


def test_a_folder_without_shards_says_so(tmp_path: Path, capsys) -> None:
    assert "expected a finished artifact at " in refused(capsys, tmp_path / "nowhere", tmp_path)


def test_a_field_that_is_none_says_so() -> None:
    with pytest.raises(InputError, match="train.stepps"):
        bare.preset("smoke", ["train.stepps=3"], ["train."], "cpu")


@pytest.mark.parametrize("field", ["augment.flip=true", "shard.image-size=64", "compare.seeds=2"])
def test_a_field_that_is_not_read_says_so(field: str) -> None:
    """It would stand in the result as if it had been."""
    with pytest.raises(InputError, match=r"expected a field that this program reads \(train\., .*\), found "):
        bare.preset("smoke", [field], paper_frames._READS, "cpu")


@pytest.mark.parametrize("schedule", ["train", "train-prior"])
def test_patience_is_refused(schedule: str) -> None:
    """A schedule that ends early never has all its steps."""
    with pytest.raises(InputError, match=f"found 2; give --{schedule}.patience None"):
        bare.preset("smoke", [f"{schedule}.patience=2"], paper_frames._READS, "cpu")


def test_fields_take_other_values() -> None:
    config = bare.preset("cifar10", ["train.learning-rate=1e-3", "train.precision=fp32"], ["train."], "cpu")
    assert config.train.learning_rate == 1e-3 and config.train.precision == "fp32"
    assert config.train_prior.precision == best_precision("cpu")
    whole = PRESETS["cifar10"][0]
    assert replace(bare.preset("cifar10", [], [], "cpu"), train=whole.train, train_prior=whole.train_prior) == whole
    with pytest.raises(InputError, match="expected FIELD=VALUE, .* found 'train.steps'"):
        bare.preset("smoke", ["train.steps"], ["train."], "cpu")


@pytest.mark.slow
def test_it_needs_no_other_packages() -> None:
    check_bare("benchmarks.paper_frames")
