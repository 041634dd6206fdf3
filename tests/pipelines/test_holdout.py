"""Train images held back as the validation split: what becomes of them in each stage and program that knows splits."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cluster.session import Session
from pipelines import order, report, shard, tokenize_images, verify
from pipelines.config import Resources, ShardConfig
from pipelines.plan import make_plan
from pipelines.sources import SOURCES, AnySource, Cifar10Source, ClassFoldersSource, HuggingFaceSource
from pipelines.stage import Workspace
from tests.pipelines.data import write_cifar10, write_class_folders, write_huggingface
from tests.pipelines.test_golden import vqvae
from tests.pipelines.test_index import built
from tests.pipelines.test_shard import contents
from vqvae_core import image_shards, token_shards
from vqvae_core.artifacts import Artifact, commit
from vqvae_core.errors import InputError
from vqvae_core.image_shards import ImageShards
from vqvae_core.storage import Folder
from vqvae_core.token_shards import TokenShards

CONFIG = ShardConfig(image_size=32, images_per_shard=10)
HOLDOUT = replace(CONFIG, holdout_images=12)
PIPELINE: Any = SimpleNamespace(session=Session(), resources=Resources())


@pytest.fixture(scope="module", autouse=True)
def here() -> Iterator[pytest.MonkeyPatch]:
    """The stages' tasks run in this process, one after the other."""

    def fan_out(_: Any, task: Callable, jobs: Any) -> Iterator[dict]:
        return (task(json.loads(json.dumps(job))) | {"begin": 0, "end": 0} for job in jobs)

    def encode_shards(_: Any, read: Callable, encoder: type, jobs: Any, resources: Resources) -> Iterator[dict]:
        one = encoder()
        return (one(read({**job, "threads": 1})) for job in jobs)

    with pytest.MonkeyPatch.context() as patch:
        for module in (shard, verify):
            patch.setattr(module, "fan_out", fan_out)
        patch.setattr(tokenize_images, "encode_shards", encode_shards)
        yield patch


def shards_of(source: AnySource, place: Path, config: ShardConfig, patch: pytest.MonkeyPatch) -> ImageShards:
    """Image shards without a pipeline around them."""
    found = built(source, place / "index", patch)
    folder = Folder.of(place / "shards")
    made = shard._Build(PIPELINE, source, config, found, Workspace(folder, "work")).made()
    return ImageShards(committed(folder, image_shards.KIND, made))


def committed(folder: Folder, kind: str, made: Any) -> Artifact:
    return commit(folder, kind=kind, stage="s", stage_version=1, fingerprint="f", recipe={}, inputs={},
                  files=made.files, facts=made.facts, provenance={})  # fmt: skip


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory: pytest.TempPathFactory, here: pytest.MonkeyPatch) -> dict[str, ImageShards]:
    """45 train and 9 test images: with the source's own test images as validation, and with some held back."""
    place = tmp_path_factory.mktemp("cifar10")
    write_cifar10(place / "source")
    source = Cifar10Source(path=str(place / "source"))
    configs = {"plain": CONFIG, "held": HOLDOUT}
    return {name: shards_of(source, place / name, config, here) for name, config in configs.items()}


def samples(images: ImageShards, split: str) -> dict[str, tuple[str, bytes]]:
    """Facts and picture of each key of a split, in order."""
    found = [sample for path in images.shards(split) for sample in images.read(path)]
    assert len({sample.key for sample in found}) == len(found)
    return {sample.key: (json.dumps(sample.facts), sample.pixels().tobytes()) for sample in found}


def check_splits(plain: ImageShards, held: ImageShards, holdout: int) -> None:
    """The laws of a holdout, on shards that were made without and with one."""
    train, validation, test = (samples(held, split) for split in ("train", "validation", "test"))
    assert not train.keys() & validation.keys()
    assert len(validation) == holdout
    assert train | validation == samples(plain, "train")
    assert list(test.items()) == list(samples(plain, "validation").items())
    assert held.artifact.facts["splits"] == {
        split: {"shards": len(held.shards(split)), "images": len(found)}
        for split, found in (("train", train), ("validation", validation), ("test", test))
    }
    assert held.artifact.facts["source_images"] == plain.artifact.facts["source_images"]


def test_cifar10_has_three_splits(cifar10: dict[str, ImageShards]) -> None:
    plain, held = cifar10["plain"], cifar10["held"]
    check_splits(plain, held, 12)
    names = [path for path in sorted(held.artifact.files) if path.endswith(".tar")]
    assert names == ["test-000000.tar", *(f"train-{n:06d}.tar" for n in range(4)),
                     "validation-000000.tar", "validation-000001.tar"]  # fmt: skip
    assert {json.loads(facts)["source"].split("#")[0] for facts, _ in samples(held, "test").values()} == {
        "cifar-10-binary.tar.gz/test_batch.bin"
    }
    drawn = Counter(key.rpartition("-")[0] for key in samples(held, "validation"))
    assert len(drawn) > 2, "of few batches"
    assert plain.artifact.folder.read("validation-000000.tar") == held.artifact.folder.read("test-000000.tar")


def test_without_a_holdout_shards_are_as_before(cifar10: dict[str, ImageShards]) -> None:
    assert contents(cifar10["plain"])[:12] == "64226379245b"
    assert set(cifar10["plain"].artifact.facts["splits"]) == {"train", "validation"}


def test_a_staged_source_in_several_groups(tmp_path: Path, here: pytest.MonkeyPatch) -> None:
    """Its rows are read by row groups, and the shards made of what was staged."""
    write_huggingface(tmp_path / "s")
    source = HuggingFaceSource(path=str(tmp_path / "s"))
    config = ShardConfig(image_size=16, images_per_shard=4, mix_images=12)
    plain, held = (
        shards_of(source, tmp_path / str(holdout), replace(config, holdout_images=holdout), here) for holdout in (0, 9)
    )
    plan = make_plan(built(source, tmp_path / "i", here).counts(), replace(config, holdout_images=9))
    assert np.count_nonzero(plan.taken[:, 1]) > 1
    check_splits(plain, held, 9)


def test_rejects_are_counted_where_they_were_drawn(tmp_path: Path, here: pytest.MonkeyPatch) -> None:
    write_cifar10(tmp_path / "s", broken=tuple(range(0, 54, 3)))
    config = replace(HOLDOUT, max_rejected_fraction=0.5)
    facts = shards_of(Cifar10Source(path=str(tmp_path / "s")), tmp_path, config, here).artifact.facts
    assert sum(split["images"] for split in facts["splits"].values()) == 36
    assert facts["splits"]["test"]["images"] == 6
    assert facts["rejects"] == {"label out of range": 18}


def test_a_source_without_held_out_images_has_no_test_split(tmp_path: Path, here: pytest.MonkeyPatch) -> None:
    write_class_folders(tmp_path / "s")
    source = ClassFoldersSource(path=str(tmp_path / "s"), validation_fraction=0.0)
    config = ShardConfig(image_size=16, images_per_shard=4, holdout_images=5)
    assert shards_of(source, tmp_path, config, here).artifact.facts["splits"] == {
        "train": {"shards": 2, "images": 7},
        "validation": {"shards": 2, "images": 5},
    }


def test_the_data_report_knows_the_test_split(cifar10: dict[str, ImageShards]) -> None:
    held = cifar10["held"]
    data = json.loads(held.artifact.read("data.json"))
    assert data["splits"] == held.artifact.facts["splits"]
    for split, counts in data["splits"].items():
        assert sum(level[split] for level in data["levels"].values()) == counts["images"]
    pixels = np.stack([np.frombuffer(pixels, np.uint8) for _, pixels in samples(held, "train").values()])
    assert data["mean"] == pytest.approx(pixels.reshape(-1, 3).mean(axis=0).tolist()), "of the train split alone"


def test_the_report_names_the_splits(cifar10: dict[str, ImageShards]) -> None:
    for name, numbers, splits in (("plain", "45 + 9", "train + validation"),
                                  ("held", "33 + 12 + 9", "train + validation + test")):  # fmt: skip
        page = report._data(cifar10[name].artifact)
        assert f"<tr><th>Images</th><td class=number>{numbers}</td>" in page
        assert f"<small>{splits}, out of 54 taken of the source</small>" in page


def test_the_test_split_gets_tokens(cifar10: dict[str, ImageShards], tmp_path: Path) -> None:
    held, folder = cifar10["held"], Folder.of(tmp_path / "t")
    made = tokenize_images._build(PIPELINE, held, vqvae(Folder.of(tmp_path)), Workspace(folder, "work"))
    tokens = TokenShards(committed(folder, token_shards.KIND, made))
    assert tokens.artifact.facts["splits"] == held.artifact.facts["splits"]
    assert tokens.shards("test") == ["test-000000.parquet"]
    for split in ("train", "validation", "test"):
        assert [key for path in tokens.shards(split) for key in tokens.read(path).keys] == list(samples(held, split))
    assert verify.verify(Session(), Artifact.open(folder)) == []


def test_verify_knows_the_test_split(cifar10: dict[str, ImageShards]) -> None:
    assert [verify.verify(Session(), images.artifact) for images in cifar10.values()] == [[], []]


def test_no_step_has_held_back_samples(cifar10: dict[str, ImageShards], capsys: pytest.CaptureFixture[str]) -> None:
    order.main([cifar10["held"].artifact.folder.uri, "--batch-size", "8", "--world-sizes", "1", "2"])
    said = capsys.readouterr().out
    assert said.startswith("33 samples, 4 steps an epoch, 1 left out\nin no step: 12 of validation + 9 of test\n")


def test_episodes_are_not_split_by_image() -> None:
    """Refused before anything is read: these sources are nowhere."""
    refused = set()
    for kind, source in SOURCES.items():
        try:
            shard._check_holdout(source(), HOLDOUT)
        except InputError:
            refused.add(kind)
        shard._check_holdout(source(), CONFIG)
    assert refused == {"vizdoom", "dmlab", "recorded_frames"}
    with pytest.raises(
        InputError,
        match=r"^expected a source of single images to hold some back, found RecordedFramesSource, whose episodes are "
        r"never split, and --shard.holdout-images 12; set it to 0: whole episodes are the validation split$",
    ):
        shard.shard(PIPELINE, SOURCES["recorded_frames"](), HOLDOUT)
