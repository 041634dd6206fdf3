"""What a model of the likelihood table costs: the parts of a VQ-VAE's bits, over shards of several sizes."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.session import Session
from pipelines import measure_bits
from pipelines.config import Resources
from pipelines.stage import Pipeline
from pipelines.tokenize_images import Encoder, read_shard
from pipelines.tracking import Tracker
from tests.pipelines.data import frame
from tests.pipelines.test_golden import PRIOR_CONFIG, VQVAE_CONFIG, artifact, weights
from vqvae_core.artifacts import Artifact
from vqvae_core.checkpoint import save_model
from vqvae_core.contender import baseline_config, figures, make_model
from vqvae_core.image_shards import ImageShards, Sample, write_tar
from vqvae_core.images import encode, pixels_to_images
from vqvae_core.likelihood import LikelihoodConfig
from vqvae_core.pixelcnn import Condition, PixelCNN
from vqvae_core.prior import Prior
from vqvae_core.storage import Folder
from vqvae_core.token_shards import TokenShape, TokenShards
from vqvae_core.vqvae import VQVAE

CONFIG = dataclasses.replace(
    VQVAE_CONFIG,
    likelihood=LikelihoodConfig(kind="logistic"),
    quantizer=dataclasses.replace(VQVAE_CONFIG.quantizer, num_groups=2),
)
SHARDS = {"train-000000": range(8), "test-000000": range(8, 13), "test-000001": range(13, 14)}
TEST = range(8, 14)
DIMS = 3 * 16 * 16


def label(number: int) -> int:
    return number % 2


@pytest.fixture
def parts(tmp_path: Path) -> tuple[ImageShards, Artifact, TokenShards, Artifact]:
    """Images, a VQ-VAE with two tables, tokens and a prior that is told labels: nothing is trained, all of it differs
    from image to image."""
    root = Folder.of(tmp_path)
    files = {}
    for name, numbers in SHARDS.items():
        samples = [
            Sample(key=f"k{number:02}", image_format="png", data=encode(frame(number), "png"),
                   facts={"label": label(number)})
            for number in numbers
        ]  # fmt: skip
        files[f"{name}.tar"] = write_tar(samples), len(samples)
    splits = {"train": {"shards": 1, "images": 8}, "test": {"shards": 2, "images": 6}}
    facts = {"size": 16, "label_map": {"a": 0, "b": 1}, "splits": splits}
    images = artifact(root / "i", "ImageShards", files, facts)
    torch.manual_seed(0)
    model_files = {
        "model.safetensors": (save_model(VQVAE(CONFIG).eval()), 0),
        "config.json": (json.dumps(dataclasses.asdict(CONFIG)).encode(), 0),
    }
    model = artifact(root / "m", "VQVAEModel", model_files, {"K": 16, "G": 2, "precision": "fp32", "image_size": 16})
    encoder, tokens = Encoder(), {}
    for name in SHARDS:
        job = {"images": images.folder.uri, "model": model.folder.uri, "out": (root / "t").uri, "work": "w",
               "name": name, "threads": 1, "use_gpu": False}  # fmt: skip
        rows = encoder(read_shard(job))["rows"]
        tokens[f"{name}.parquet"] = (root / "t").read(f"{name}.parquet"), rows
    shape = {"H": 4, "W": 4, "G": 2, "K": 16}
    facts = {"shape": shape, "model": model.manifest.fingerprint, "splits": splits, "label_map": {"a": 0, "b": 1}}
    tokenized = artifact(root / "t", "TokenShards", tokens, facts)
    network = weights(PixelCNN(PRIOR_CONFIG, TokenShape(height=4, width=4, num_groups=2, num_codes=16), 2))
    prior = Prior(network, {"a": 0, "b": 1}, model.manifest.fingerprint)  # type: ignore[arg-type]
    prior_files = {name: (data, 0) for name, data in prior.files(dataclasses.asdict(PRIOR_CONFIG)).items()}
    return ImageShards(images), model, TokenShards(tokenized), artifact(root / "p", "PriorModel", prior_files, {})


@torch.no_grad()
def expected(model: VQVAE, prior: Prior) -> dict[str, float]:
    """The same, image by image, from the networks alone: categoricals of a PixelCNN and the likelihood's sums."""
    reconstruction, learned = [], []
    for number in TEST:
        image = pixels_to_images(torch.from_numpy(frame(number))[None])
        tokens = model.encode(torch.from_numpy(frame(number))[None])
        output = model.decoder(model.quantizer.lookup(tokens))
        reconstruction.append(float(model.likelihood.nll_nats(output, image)))
        logits = prior.network(tokens, Condition(labels=torch.tensor([label(number)]))).double()  # (1, K, H, W, G)
        shares = logits.log_softmax(dim=1).gather(1, tokens[:, None])
        learned.append(-float(shares.sum()))
    return {
        "reconstruction_bits_per_dim": float(np.mean(reconstruction)) / math.log(2) / DIMS,
        "latents_bits_per_dim": 4 * 4 * 2 * 4 / DIMS,
        "latents_learned_bits_per_dim": float(np.mean(learned)) / math.log(2) / DIMS,
    }


@pytest.fixture
def pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    """One without Ray."""

    def one_after_the_other(session, read, encoder, jobs, resources):
        actor = encoder()
        for job in jobs:
            row = actor(read({**job, "threads": 1}))
            assert not row["error"], row["error"]
            yield row

    monkeypatch.setattr(measure_bits, "encode_shards", one_after_the_other)
    monkeypatch.setattr(Pipeline, "cpus_per_worker", lambda self: 1)
    root = Folder.of(tmp_path / "root")
    return Pipeline(root, Resources(), Session(), Tracker(root, "test", {}, "", enabled=False))


def test_the_parts_of_a_vqvaes_bits(parts, pipeline: Pipeline) -> None:
    images, model, tokens, prior = parts
    found = measure_bits.measure_bits(pipeline, images, "vqvae", model, (1,), tokens, prior).facts
    assert (found["split"], found["images"]) == ("test", 6)
    wanted = expected(VQVAE.of(model), Prior.of(prior))
    assert abs(wanted["latents_learned_bits_per_dim"] - wanted["latents_bits_per_dim"]) > 1e-3
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=1e-6), name
    both = wanted["reconstruction_bits_per_dim"] + wanted["latents_learned_bits_per_dim"]
    assert found["total_learned_bits_per_dim"] == pytest.approx(both, rel=1e-6)
    assert found["total_bits_per_dim"] == pytest.approx(
        wanted["reconstruction_bits_per_dim"] + wanted["latents_bits_per_dim"], rel=1e-6
    )


@pytest.mark.parametrize("name", ["vae", "vimco"])
def test_draws_go_on_from_shard_to_shard(parts, pipeline: Pipeline, tmp_path: Path, name: str) -> None:
    """The bound of a split is that of its images in one, each with the draws of its own place."""
    images = parts[0]
    torch.manual_seed(0)
    model = make_model(name, CONFIG).eval()
    files = {
        "model.safetensors": (save_model(model), 0),
        "config.json": (baseline_config(name, dataclasses.asdict(CONFIG), 3), 0),
    }
    trained = artifact(Folder.of(tmp_path) / "b", "BaselineModel", files, {"precision": "fp32", "image_size": 16})
    found = measure_bits.measure_bits(pipeline, images, name, trained, (3,)).facts
    pixels = torch.from_numpy(np.stack([frame(number) for number in TEST]))
    samples = (3,) if name == "vimco" else (1,)
    wanted = figures(name, model, pixels, samples, "fp32", "cpu", 512)
    for figure, value in wanted.items():
        assert found[figure] == pytest.approx(value, rel=1e-6), figure
