"""The figures of a model on held-out images: what they are, how far they depend on how work is cut, what is printed."""

import dataclasses
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pipelines import evaluate as stage
from pipelines import meter
from pipelines.config import EvaluateConfig, Resources, recipe_of
from pipelines.evaluate import FIGURES, NO_JUDGES, PICTURE, STATISTICS, TABLE, Judges, evaluate
from pipelines.stage import Pipeline
from pipelines.tokenize_images import Encoder, read_shard
from pipelines.tracking import Tracker
from tests.pipelines.test_decode import put
from tests.pipelines.test_extractor import distance, extractor
from tests.pipelines.test_golden import PRIOR_CONFIG, VQVAE_CONFIG, weights
from vqvae_core.artifacts import Artifact, hash_bytes
from vqvae_core.checkpoint import save_model
from vqvae_core.decoding import decode
from vqvae_core.errors import InputError
from vqvae_core.frechet import Gaussian, RunningGaussian, frechet_distance
from vqvae_core.image_shards import ImageShards, Sample, write_tar
from vqvae_core.images import encode, grid, pixels_to_images
from vqvae_core.likelihood import LikelihoodConfig
from vqvae_core.metrics import PooledPSNR
from vqvae_core.pixelcnn import PixelCNN
from vqvae_core.prior import Prior
from vqvae_core.prior_training import bits_per_token, unigram_bits_per_token
from vqvae_core.storage import Folder
from vqvae_core.token_shards import TokenShape, TokenShards, write_parquet
from vqvae_core.vqvae import VQVAE, VQVAEConfig
from vqvae_core.vqvae_training import reconstruct

COUNT = 14


def picture(seed: int, size: int) -> np.ndarray:
    """Smooth, so that some are coded better than others."""
    rough = np.random.default_rng(seed).uniform(0, 255, (1, 3, 3, 3)) * (0.2 + seed % 5 / 5)
    smooth = torch.nn.functional.interpolate(torch.from_numpy(rough), (size, size), mode="bilinear")
    return smooth[0].movedim(0, -1).clamp(0, 255).to(torch.uint8).numpy()


@dataclasses.dataclass
class World:
    """Artifacts of a small model, and where they lie."""

    root: Folder
    images: ImageShards
    vqvae: Artifact
    tokens: TokenShards
    prior: Artifact
    samples: Artifact

    def evaluate(self, judges: Judges = NO_JUDGES) -> Artifact:
        tracker = Tracker(self.root, "t", {}, "", enabled=False)
        pipeline = Pipeline(self.root, Resources(), _Session(), tracker)  # type: ignore[arg-type]
        return evaluate(pipeline, self.images, self.vqvae, self.tokens, self.prior, self.samples, judges)


class _Session:
    def check(self, **_: Any) -> int:
        return 1


def world(
    root: Path, cuts: tuple[int, ...] = (COUNT,), *, size: int = 32, split: str = "validation", stored: int = 0,
    config: VQVAEConfig = VQVAE_CONFIG,
) -> World:  # fmt: skip
    """cuts: images of each shard of the split. stored: size of the images in the shards, where it is another."""
    folder, stored = Folder.of(root), stored or size
    first, files, splits = 0, {}, {split: {"shards": len(cuts), "images": sum(cuts)}}
    for number, count in enumerate(cuts):
        samples = [Sample(key=f"k{seed:02d}", image_format="png", data=encode(picture(seed, stored), "png"),
                          facts={"label": seed % 2}) for seed in range(first, first + count)]  # fmt: skip
        files[f"{split}-{number:06d}.tar"] = write_tar(samples), count
        first += count
    labels = {"day": 0, "night": 1}
    images = put(folder / "i", "ImageShards", files, "11" * 32, {"size": stored, "label_map": labels, "splits": splits,
                                                                 "image_format": "png"})  # fmt: skip
    model = weights(VQVAE(config))
    description = json.dumps(dataclasses.asdict(config)).encode()
    vqvae = put(folder / "m", "VQVAEModel", {"model.safetensors": (save_model(model), 0),
                "config.json": (description, 0)}, "ab" * 32,
                {"K": 16, "G": config.quantizer.num_groups, "precision": "fp32", "image_size": size})  # fmt: skip
    made = {}
    for name in [path.removesuffix(".tar") for path in files if split != "test"]:
        job = {"images": images.folder.uri, "model": vqvae.folder.uri, "out": (folder / "t").uri, "work": str(root),
               "name": name, "threads": 1, "use_gpu": False}  # fmt: skip
        rows = Encoder()(read_shard(job))["rows"]
        made[f"{name}.parquet"] = (folder / "t").read(f"{name}.parquet"), rows
    shape = TokenShape(height=size // 4, width=size // 4, num_groups=config.quantizer.num_groups, num_codes=16)
    facts = {"shape": {"H": shape.height, "W": shape.width, "G": shape.num_groups, "K": 16}, "model": "ab" * 32}
    tokens = put(folder / "t", "TokenShards", made, "22" * 32, facts | {"label_map": labels})
    network: Any = weights(PixelCNN(PRIOR_CONFIG, shape, 2))
    parts = Prior(network, labels, "ab" * 32).files(dataclasses.asdict(PRIOR_CONFIG))
    prior = put(folder / "p", "PriorModel", {k: (v, 0) for k, v in parts.items()}, "cd" * 32, {"precision": "fp32"})
    drawn = {}
    for number, seeds in enumerate((range(100, 105), range(105, 109))):
        keys = [f"sample-{seed}" for seed in seeds]
        codes = np.zeros((len(keys), shape.height, shape.width, shape.num_groups), np.int64)
        drawn[f"part-{number:06d}.parquet"] = (
            write_parquet(keys, [None] * len(keys), codes, shape, "ab" * 32),
            len(keys),
        )
        drawn |= {f"pictures/{key}.png": (encode(picture(seed, size), "png"), 0)
                  for key, seed in zip(keys, seeds, strict=True)}  # fmt: skip
    samples = put(folder / "s", "Samples", drawn, "ef" * 32, {})
    return World(folder, ImageShards(images), vqvae, TokenShards(tokens), prior, samples)


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Shards are measured in this process, by one actor. The names of those that were."""
    done: list[str] = []

    def run(session: Any, read: Any, actor: type, jobs: Any, resources: Any) -> Iterator[dict[str, Any]]:
        measure = actor()
        for job in jobs:
            result = measure(read({**json.loads(json.dumps(job)), "threads": 1}))
            if result["error"]:
                raise InputError(result["error"])
            done.append(job["name"])
            yield result

    monkeypatch.setattr(stage, "encode_shards", run)
    return done


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Where an extractor and a distance lie."""
    places = {"extractor": tmp_path / "net.onnx", "lpips": tmp_path / "lpips.onnx"}
    places["extractor"].write_bytes(extractor())
    places["lpips"].write_bytes(distance())
    return {name: str(place) for name, place in places.items()}


def pixels_of(found: World, size: int = 32) -> torch.Tensor:
    return torch.from_numpy(np.stack([picture(seed, size) for seed in range(COUNT)]))


def page(made: Artifact) -> dict[str, Any]:
    return json.loads(made.read(FIGURES))


def test_figures_are_those_of_their_definitions(tmp_path: Path) -> None:
    found = world(tmp_path, (9, 5))
    made = found.evaluate()
    facts, pixels = made.facts, pixels_of(found)
    pictures, tokens = reconstruct(VQVAE.of(found.vqvae), pixels, "fp32")
    psnr = PooledPSNR()
    psnr.add(pictures, pixels)
    assert (facts["split"], facts["num_images"], facts["image_size"]) == ("validation", COUNT, 32)
    assert facts["psnr_db"] == pytest.approx(psnr.decibels, abs=0.01)
    counts = np.bincount(tokens.flatten().numpy(), minlength=16)
    share = counts[counts > 0] / counts.sum()
    entropy = -(share * np.log2(share)).sum()
    assert facts["perplexity"] == pytest.approx(2**entropy)
    assert facts["usage"] == (counts > 0).mean()
    assert facts["unigram_bits_per_token"] == pytest.approx(unigram_bits_per_token(tokens[..., None], 16))
    prior, labels = Prior.of(found.prior), torch.arange(COUNT) % 2
    bits = bits_per_token(prior.network, tokens[..., None], labels, "fp32")
    assert facts["bits_per_token"] == pytest.approx(bits, rel=1e-6)
    assert facts["bits_per_token"] == pytest.approx(
        float(-prior.log_prob(tokens, labels.tolist()).sum()) / math.log(2) / tokens.numel(), rel=1e-5
    )
    assert facts["latent_bits_per_dim_uniform"] == pytest.approx(4 * 64 / (3 * 32 * 32))
    assert facts["latent_bits_per_dim"] == pytest.approx(bits * 64 / (3 * 32 * 32))
    assert 0 < facts["ssim"] < 1 and 0 < facts["ms_ssim"] < 1 and facts["ms_ssim_scales"] == 2
    for name in ("lpips", "rfid", "fid", "reconstruction_bits_per_dim", "total_bits_per_dim", "card", "lpips_card"):
        assert facts[name] is None
    figures = page(made)["figures"]
    assert "a density has no bits" in figures["total_bits_per_dim"]["reason"]
    assert "--evaluate.extractor FILE.onnx" in figures["rfid"]["reason"]
    assert {name for name, figure in figures.items() if figure["value"] is None} == {
        name for name, figure in figures.items() if figure["reason"] is not None
    }
    table = pq.read_table(io.BytesIO(made.read("validation-000001.parquet")))
    assert table["key"].to_pylist() == [f"k{seed:02d}" for seed in range(9, 14)]
    errors = (pictures[9:].double() - pixels[9:].double()).square().sum(dim=(1, 2, 3))
    np.testing.assert_allclose(table["squared_error"].to_numpy(), errors.numpy(), rtol=0.01)
    assert set(made.files) == {FIGURES, TABLE, PICTURE, "validation-000000.parquet", "validation-000001.parquet"}
    assert not list(tmp_path.glob("evaluate-*/staging"))


@pytest.mark.parametrize("kind", ["gaussian", "logistic", "categorical"])
def test_bits_of_the_protocol(tmp_path: Path, kind: Any) -> None:
    config = dataclasses.replace(VQVAE_CONFIG, likelihood=LikelihoodConfig(kind=kind))
    found = world(tmp_path, config=config)
    facts = found.evaluate().facts
    model = VQVAE.of(found.vqvae)
    nats = float(model.nll_nats(pixels_to_images(pixels_of(found))).double().mean())
    assert facts["reconstruction_bits_per_dim"] == pytest.approx(nats / math.log(2) / (3 * 32 * 32), rel=1e-5)
    for end in ("_uniform", ""):
        parts = facts["reconstruction_bits_per_dim"] + facts[f"latent_bits_per_dim{end}"]
        assert facts[f"total_bits_per_dim{end}"] == pytest.approx(parts)


def test_several_codes_a_site(tmp_path: Path) -> None:
    quantizer = dataclasses.replace(VQVAE_CONFIG.quantizer, num_groups=3)
    found = world(tmp_path, config=dataclasses.replace(VQVAE_CONFIG, quantizer=quantizer))
    facts = found.evaluate().facts
    tokens = VQVAE.of(found.vqvae).encode(pixels_of(found))
    assert facts["latent_bits_per_dim_uniform"] == pytest.approx(3 * 4 * 64 / (3 * 32 * 32))
    assert facts["unigram_bits_per_token"] == pytest.approx(unigram_bits_per_token(tokens, 16))
    each = [2 ** unigram_bits_per_token(tokens[..., group : group + 1], 16) for group in range(3)]
    assert facts["perplexity"] == pytest.approx(np.mean(each))


def test_the_test_split_comes_first_and_need_not_be_tokenized(tmp_path: Path) -> None:
    held, other = world(tmp_path / "a", split="test"), world(tmp_path / "b")
    figures, others = held.evaluate().facts, other.evaluate().facts
    assert (figures["split"], others["split"]) == ("test", "validation")
    assert {name: value for name, value in figures.items() if name != "split"} == {
        name: value for name, value in others.items() if name != "split"
    }


def test_images_that_are_stored_larger(tmp_path: Path, files: dict[str, str]) -> None:
    made = world(tmp_path, stored=40).evaluate(Judges.read(EvaluateConfig(extractor=files["extractor"])))
    assert made.facts["image_size"] == 32
    assert made.facts["card"]["crop"] == "centre of 40 x 40"


@pytest.mark.slow
def test_small_pictures_leave_figures_out(tmp_path: Path) -> None:
    made = world(tmp_path, size=16).evaluate()
    figures = page(made)["figures"]
    assert figures["ssim"]["value"] is not None
    assert figures["ms_ssim"]["value"] is figures["ms_ssim_scales"]["value"] is None
    assert figures["ms_ssim"]["reason"] == "pictures of 16 x 16 have no room for its window at two scales"
    tiny = page(world(tmp_path / "t", size=8).evaluate())["figures"]
    assert tiny["ssim"]["reason"] == "pictures of 8 x 8 have no room for its window of 11 pixels"


def features(pixels: torch.Tensor) -> Gaussian:
    from pipelines.extractor import Extractor, NamedFile

    running = RunningGaussian(6)
    running.add(torch.from_numpy(Extractor(NamedFile("net", extractor())).features(pixels)))
    return running.gaussian()


@pytest.mark.slow
def test_frechet_distances_and_their_card(tmp_path: Path, files: dict[str, str]) -> None:
    found = world(tmp_path, (3, 11))
    made = found.evaluate(Judges.read(EvaluateConfig(**files)))
    pixels = pixels_of(found)
    pictures, _ = reconstruct(VQVAE.of(found.vqvae), pixels, "fp32")
    drawn = torch.from_numpy(np.stack([picture(seed, 32) for seed in range(100, 109)]))
    own = features(pixels)
    assert made.facts["rfid"] == pytest.approx(frechet_distance(features(pictures), own), rel=1e-2)
    assert made.facts["fid"] == pytest.approx(frechet_distance(features(drawn), own), rel=1e-6)
    assert made.facts["lpips"] == pytest.approx(
        float(((pictures.double() - pixels.double()) / 127.5).square().mean()), rel=1e-2
    )
    statistics = made.read(STATISTICS)
    torch.testing.assert_close(Gaussian.load(statistics, "here").covariance, own.covariance)
    card = {"split": "validation", "num_images": 14, "num_samples": 9, "extractor": "net.onnx",
            "extractor_sha256": hash_bytes(extractor()), "resize": "none", "crop": "none", "num_features": 6,
            "reference": "originals of the validation split", "reference_sha256": hash_bytes(statistics)}  # fmt: skip
    assert made.facts["card"] == page(made)["card"] == card
    assert set(card) <= set(stage._CARD)
    assert stage.card_text(card).startswith(
        "split validation, num images 14, num samples 9, resize none, crop none, extr"
    )
    assert made.facts["lpips_card"]["network_sha256"] == hash_bytes(distance())
    text = made.read(TABLE).decode()
    for value in card.values():
        assert str(value) in text
    # What was written can be the reference of another run; the originals' distance to it is that of before.
    (tmp_path / "ref.npz").write_bytes(statistics)
    given = Judges.read(EvaluateConfig(extractor=files["extractor"], reference=str(tmp_path / "ref.npz")))
    again = found.evaluate(given)
    assert again.facts["fid"] == pytest.approx(made.facts["fid"], rel=1e-9)
    assert (again.facts["card"]["reference"], again.facts["card"]["reference_sha256"]) == (
        "ref.npz", hash_bytes(statistics),
    )  # fmt: skip
    assert again.folder != made.folder


@pytest.mark.slow
def test_how_work_is_cut_changes_nothing(tmp_path: Path, files: dict[str, str]) -> None:
    """Shards, batches of the extractor, and a run that was stopped in the middle."""
    found = []
    for number, (cuts, batch) in enumerate([((COUNT,), "n"), ((3, 10, 1), 1), ((6, 8), 5)]):
        (tmp_path / "net.onnx").write_bytes(extractor(batch))
        judges = Judges.read(EvaluateConfig(**files))
        found.append(world(tmp_path / str(number), cuts).evaluate(judges).facts)
    for other in found[1:]:
        for name, value in found[0].items():
            if isinstance(value, float):
                assert other[name] == pytest.approx(value, rel=1e-6, abs=1e-9), name


def test_reconstructions_that_are_the_originals(
    tmp_path: Path, files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meter, "decoded", lambda model, tokens, pixels: (pixels, None))
    made = world(tmp_path, (3, 11)).evaluate(Judges.read(EvaluateConfig(**files)))
    scale = float(Gaussian.load(made.read(STATISTICS), "here").covariance.trace())
    assert made.facts["rfid"] <= 1e-9 * scale
    assert made.facts["lpips"] == 0
    assert made.facts["ssim"] == pytest.approx(1, abs=1e-6) and made.facts["ms_ssim"] == pytest.approx(1, abs=1e-5)
    assert made.facts["psnr_db"] is None
    assert "every reconstruction equals its original" in page(made)["figures"]["psnr_db"]["reason"]


def test_a_picture_of_the_worst_the_middle_and_the_best(tmp_path: Path) -> None:
    found = world(tmp_path, (9, 5))
    made, pixels = found.evaluate(), pixels_of(found)
    tables = [pq.read_table(io.BytesIO(made.read(f"validation-{n:06d}.parquet"))) for n in range(2)]
    decibels = np.concatenate([table["psnr_db"].to_numpy() for table in tables])
    order = np.argsort(decibels, kind="stable")
    rows = [order[:4], order[5:9], order[10:]]
    sheet = decode(made.read(PICTURE))
    for number, chosen in enumerate(rows):
        expected = grid(pixels[chosen].numpy(), 4)
        top = 2 * number * 34
        assert (sheet[top : top + 32] == expected).all()


@pytest.mark.slow
def test_nothing_is_done_again(tmp_path: Path, files: dict[str, str], here: list[str]) -> None:
    """Reused from another path of the same file; made again for another file; goes on after a stop."""
    found = world(tmp_path, (4, 10))
    judges = Judges.read(EvaluateConfig(**files))
    made = found.evaluate(judges)
    assert here == ["validation-000000", "validation-000001", "part-000000", "part-000001"]
    (tmp_path / "renamed.onnx").write_bytes(extractor())
    renamed = Judges.read(EvaluateConfig(extractor=str(tmp_path / "renamed.onnx"), lpips=files["lpips"]))
    assert found.evaluate(renamed).folder == made.folder
    assert len(here) == 4
    (tmp_path / "net.onnx").write_bytes(extractor(num_features=5))
    assert found.evaluate(Judges.read(EvaluateConfig(**files))).folder != made.folder
    plain = found.evaluate()
    assert plain.manifest.recipe == {"lpips": None, "extractor": None, "reference": None}
    assert "samples" not in plain.manifest.inputs and "samples" in made.manifest.inputs


@pytest.mark.slow
def test_a_stopped_run_goes_on(tmp_path: Path, here: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = world(tmp_path, (4, 4, 6))
    whole = found.evaluate()
    (tmp_path / whole.folder.name / "manifest.json").rename(tmp_path / "kept.json")
    for path in (tmp_path / whole.folder.name).glob("sidecars/*"):
        path.unlink()
    here.clear()
    with monkeypatch.context() as patch:
        patch.setattr(stage._Build, "_sum", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            found.evaluate()
    (tmp_path / whole.folder.name / "sidecars" / "validation-000001.json").unlink()
    here.clear()
    again = found.evaluate()
    assert here == ["validation-000001"]
    assert again.files == whole.files


def test_the_table(tmp_path: Path) -> None:
    lines = world(tmp_path).evaluate().read(TABLE).decode().splitlines()
    assert lines[0] == "# 14 images of the validation split, 32 x 32"
    rows = [line.split(" | ") for line in lines[4:] if line.startswith("|")]
    assert all(len(row) == 3 for row in rows) and len(rows) == len(stage._DEFINITIONS)
    assert rows[0][0] == "| PSNR" and rows[0][1].endswith(" dB")


def test_the_recipe_has_hashes_and_no_paths() -> None:
    assert recipe_of(EvaluateConfig(extractor="/x/net.onnx", lpips="/x/l.onnx", reference="/x/r.npz")) == {}
    with pytest.raises(ValueError, match="reference belongs to an extractor"):
        EvaluateConfig(reference="/x/r.npz")


def test_messages(tmp_path: Path, files: dict[str, str]) -> None:
    found = world(tmp_path)
    with pytest.raises(InputError, match="expected a test or validation split in .*, found no image of either"):
        dataclasses.replace(found, images=world(tmp_path / "n", split="train").images).evaluate()
    other = put(Folder.of(tmp_path / "other"), "VQVAEModel", {}, "99" * 32, {"image_size": 32})
    with pytest.raises(InputError, match="expected tokens and prior of the VQ-VAE 999999999999, found those of abab"):
        dataclasses.replace(found, vqvae=other).evaluate()
    (tmp_path / "bad.npz").write_bytes(b"x")
    with pytest.raises(InputError, match="expected a .npz with mu and sigma at .*bad.npz"):
        Judges.read(EvaluateConfig(extractor=files["extractor"], reference=str(tmp_path / "bad.npz")))
    (tmp_path / "three.npz").write_bytes(Gaussian(torch.zeros(3).double(), torch.eye(3).double()).dump())
    with pytest.raises(InputError, match="expected statistics of the 6 features of the extractor in .*, found 3; were"):
        Judges.read(EvaluateConfig(extractor=files["extractor"], reference=str(tmp_path / "three.npz")))
    judges = Judges.read(EvaluateConfig(extractor=files["extractor"]))
    (tmp_path / "net.onnx").write_bytes(extractor(num_features=5))
    moved = world(tmp_path / "m")
    with pytest.raises(InputError, match="found .*; did it change meanwhile"):
        moved.evaluate(judges)
    with pytest.raises(InputError, match="expected an ONNX file"):
        Judges.read(EvaluateConfig(extractor=__file__))
