"""What stages make of fixed inputs, as it was on another day. A change here needs a new VERSION of the stage, and then
new values. Floating-point results may differ in the last digits between machines: tokens agree in 99 %, not all."""

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pipelines import (
    evaluate,
    index,
    likelihood_table,
    measure_bits,
    meter,
    sample,
    shard,
    show_second_stage,
    tokenize_images,
    train_baseline,
    train_prior,
    train_second_stage,
    train_vqvae,
)
from pipelines.config import SampleConfig
from pipelines.sources import ImageNetSource
from pipelines.tokenize_images import Encoder, read_shard
from tests.pipelines.data import frame, write_imagenet
from vqvae_core.artifacts import Artifact, FileEntry, commit, hash_json
from vqvae_core.checkpoint import save_model
from vqvae_core.contender import NAMES
from vqvae_core.image_shards import Sample, write_tar
from vqvae_core.images import encode
from vqvae_core.likelihood import LikelihoodConfig
from vqvae_core.pixelcnn import PixelCNN, PixelCNNConfig
from vqvae_core.prior import Prior
from vqvae_core.quantizer import QuantizerConfig
from vqvae_core.sampler import Draw
from vqvae_core.second_stage import KINDS, SecondStageConfig
from vqvae_core.storage import Folder
from vqvae_core.token_shards import TokenShape, read_parquet
from vqvae_core.train import Worker
from vqvae_core.train_config import TrainConfig
from vqvae_core.vqvae import VQVAE, VQVAEConfig

GOLDEN = Path(__file__).with_name("golden.json")
VQVAE_CONFIG = VQVAEConfig(
    hidden_channels=8,
    residual_channels=4,
    num_residual_blocks=1,
    quantizer=QuantizerConfig(num_codes=16, code_dim=4, learn_by="moving_average"),
)
TRAIN = TrainConfig(
    steps=6, batch_size=4, num_lanes=2, learning_rate=1e-3, precision="fp32", log_every=2, validate_every=6
)
PRIOR_CONFIG = PixelCNNConfig(channels=8, num_layers=2, first_kernel_size=3, head_channels=8)

SECOND_STAGE_CONFIG = SecondStageConfig(
    channels=8,
    residual_channels=8,
    num_residual_blocks=1,
    quantizer=QuantizerConfig(num_codes=4, code_dim=2, num_groups=3, learn_by="moving_average", revive_every=2),
    decoder=PRIOR_CONFIG,
)


def weights(model: torch.nn.Module) -> torch.nn.Module:
    """Weights that are a function of their index alone."""
    for number, parameter in enumerate(model.parameters()):
        values = torch.sin(torch.arange(parameter.numel(), dtype=torch.float64) * (0.37 + number))
        parameter.data.copy_((values * 0.4).view(parameter.shape).float())
    return model.eval()


def artifact(folder: Folder, kind: str, files: dict[str, tuple[bytes, int]], facts: dict) -> Artifact:
    for name, (data, _) in files.items():
        folder.write(name, data)
    entries = [FileEntry.of(name, data, rows=rows) for name, (data, rows) in files.items()]
    return commit(
        folder, kind=kind, stage="s", stage_version=1, fingerprint=kind, recipe={}, inputs={}, files=entries,
        facts=facts, provenance={},
    )  # fmt: skip


def images(root: Folder) -> Artifact:
    samples = [
        Sample(key=f"k{number}", image_format="png", data=encode(frame(number), "png"), facts={"label": number % 2})
        for number in range(12)
    ]
    files = {"train-000000.tar": (write_tar(samples[:8]), 8), "validation-000000.tar": (write_tar(samples[8:]), 4)}
    splits = {"train": {"shards": 1, "images": 8}, "validation": {"shards": 1, "images": 4}}
    return artifact(root / "i", "ImageShards", files, {"size": 16, "label_map": {"a": 0, "b": 1}, "splits": splits})


def vqvae(root: Folder) -> Artifact:
    config = json.dumps(dataclasses.asdict(VQVAE_CONFIG)).encode()
    files = {"model.safetensors": (save_model(weights(VQVAE(VQVAE_CONFIG))), 0), "config.json": (config, 0)}
    return artifact(root / "m", "VQVAEModel", files, {"K": 16, "precision": "fp32", "image_size": 16})


def prior_of(root: Folder, model: Artifact) -> Artifact:
    network = weights(PixelCNN(PRIOR_CONFIG, TokenShape(height=4, width=4, num_groups=1, num_codes=16), 2))
    prior = Prior(network, {"a": 0, "b": 1}, model.manifest.fingerprint)  # type: ignore[arg-type]
    files = {name: (data, 0) for name, data in prior.files(dataclasses.asdict(PRIOR_CONFIG)).items()}
    return artifact(root / "pm", "PriorModel", files, {})


def tokens_of(root: Folder) -> dict[str, tuple[bytes, int]]:
    """The tokenize stage's own parts, run here."""
    made = {}
    encoder = Encoder()
    for name in ("train-000000", "validation-000000"):
        job = {"images": images(root).folder.uri, "model": vqvae(root).folder.uri, "out": (root / "t").uri, "work": "w",
               "name": name, "threads": 1, "use_gpu": False}  # fmt: skip
        rows = encoder(read_shard(job))["rows"]
        made[f"{name}.parquet"] = ((root / "t").read(f"{name}.parquet"), rows)
    return made


@pytest.fixture
def golden() -> dict:
    return json.loads(GOLDEN.read_text())


def test_versions(golden: dict) -> None:
    modules = (index, shard, train_vqvae, tokenize_images, train_prior, sample, train_baseline, measure_bits,
               likelihood_table, train_second_stage, show_second_stage, evaluate)  # fmt: skip
    assert {module.__name__.split(".")[1]: module.VERSION for module in modules} == golden["versions"]


def test_index(tmp_path: Path, golden: dict) -> None:
    write_imagenet(tmp_path / "s")
    source = ImageNetSource(path=str(tmp_path / "s"))
    parts = [dataclasses.asdict(part) for part in source.parts()]
    job = {"folder": str(tmp_path / "i"), "work": "w", "name": "index-000000", "parts": parts,
           "source": index.source_to_json(source)}  # fmt: skip
    record = index.index_parts(job)
    rows = pq.read_table(tmp_path / "i" / "index-000000.parquet").to_pylist()
    values = [[row["name"].decode(), *[row[name] for name in list(row) if name != "name"]] for row in rows]
    assert hash_json([values, record["runs"], record["levels"], record["ignored"]])[:12] == golden["index"]


def test_tokenize(tmp_path: Path, golden: dict) -> None:
    made = tokens_of(Folder.of(tmp_path))
    table = read_parquet(made["validation-000000.parquet"][0], "here")
    assert len(np.unique(table.tokens)) > 4
    assert (table.tokens.flatten() == golden["tokens"]).mean() >= 0.99
    assert made == tokens_of(Folder.of(tmp_path / "again"))


def test_train_vqvae(tmp_path: Path, golden: dict) -> None:
    root = Folder.of(tmp_path)
    settings = {
        "images": images(root).folder.uri, "model": dataclasses.asdict(VQVAE_CONFIG), "out": (root / "v").uri,
        "train": dataclasses.asdict(TRAIN), "identity": "w", "augment": {}, "loader_workers": 0,
    }  # fmt: skip
    value = train_vqvae.loop(settings, Worker(), None)
    assert value["facts"]["psnr_db"] == pytest.approx(golden["psnr_db"], abs=0.02)
    assert value["facts"]["shrunken_psnr_db"] == pytest.approx(golden["shrunken_psnr_db"], abs=0.02)


def test_likelihoods(tmp_path: Path, golden: dict) -> None:
    """Bits/dim of each model on the validation split, after training and as the measuring actor finds them again."""
    root = Folder.of(tmp_path)
    quantizer = dataclasses.replace(VQVAE_CONFIG.quantizer, num_groups=2)
    config = dataclasses.replace(VQVAE_CONFIG, likelihood=LikelihoodConfig(kind="logistic"), quantizer=quantizer)
    found = {}
    for name in NAMES:
        out = root / name
        settings = {
            "name": name, "images": images(root).folder.uri, "model": dataclasses.asdict(config), "out": out.uri,
            "train": dataclasses.asdict(TRAIN), "identity": "w", "augment": {}, "loader_workers": 0,
            "num_samples": 3 if name.startswith("vimco") else 1, "decode_mebibytes": 64,
        }  # fmt: skip
        loop = train_vqvae.loop if name == "vqvae" else train_baseline._loop
        value = loop(settings, Worker(), None)
        entries = {file["path"]: (out.read(file["path"]), 0) for file in value["files"]}
        kind = "VQVAEModel" if name == "vqvae" else "BaselineModel"
        model = artifact(out, kind, entries, value["facts"])
        job = {"images": images(root).folder.uri, "model": model.folder.uri, "contender": name, "first": 0,
               "samples": [3], "tokens": None, "prior": None, "mebibytes": 64, "out": (root / f"{name}-bits").uri,
               "work": "w", "use_gpu": False, "name": "validation-000000", "threads": 1}  # fmt: skip
        assert measure_bits.Measurer()(read_shard(job))["error"] == ""
        measured = json.loads((root / f"{name}-bits").read("validation-000000.json"))
        key = "reconstruction_bits_per_dim" if name == "vqvae" else "total_bits_per_dim"
        assert measured[key] == pytest.approx(value["facts"][key], abs=1e-6)
        found[name] = measured["total_bits_per_dim"]
    print(found)
    assert found == pytest.approx(golden["bits_per_dim"], abs=0.02)


def test_the_likelihood_table(golden: dict) -> None:
    settings = {"likelihood": "logistic", "steps": 3, "train_samples": 2, "first_seed": 0, "notes": []}
    facts = {"split": "test", "images": 4, "samples": [2], "total_bits_per_dim": 4.0, "bound_2_bits_per_dim": 4.0}
    rows = [row for name in ("vae-0", "vimco-0") for row in likelihood_table.rows_of(name, facts, settings)]
    text = likelihood_table.markdown(likelihood_table.summarize(rows), settings)
    assert hash_json([likelihood_table.csv_of(rows), text])[:12] == golden["likelihood_table"]


def tokens(root: Folder) -> Artifact:
    facts = {"shape": {"H": 4, "W": 4, "G": 1, "K": 16}, "label_map": {"a": 0, "b": 1}, "model": "VQVAEModel"}
    return artifact(root / "ts", "TokenShards", tokens_of(root), facts)


def test_train_second_stage_and_show(tmp_path: Path, golden: dict) -> None:
    """The figures of one run, and so the numbers of the table."""
    root = Folder.of(tmp_path)
    place, facts = tokens(root).folder.uri, {}
    for kind in KINDS:
        model = dataclasses.asdict(SECOND_STAGE_CONFIG.with_latents(kind))
        settings = {"tokens": place, "model": model, "out": (root / kind).uri, "train": dataclasses.asdict(TRAIN),
                    "identity": "w"}  # fmt: skip
        facts[kind] = train_second_stage._loop(settings, Worker(), None)["facts"]
    row = show_second_stage.figures_of(facts)
    print({name: round(value, 4) for name, value in row.items()})
    assert {name: row[name] for name in golden["second_stage"]} == pytest.approx(golden["second_stage"], abs=0.02)


def test_train_prior_and_sample(tmp_path: Path, golden: dict) -> None:
    root = Folder.of(tmp_path)
    tokens(root)
    settings = {
        "tokens": (root / "ts").uri, "model": dataclasses.asdict(PRIOR_CONFIG), "out": (root / "p").uri,
        "train": dataclasses.asdict(TRAIN), "identity": "w",
    }  # fmt: skip
    value = train_prior.loop(settings, Worker(), None)
    assert value["facts"]["bits_per_token"] == pytest.approx(golden["bits_per_token"], abs=0.01)
    model = vqvae(root)
    made = prior_of(root, model)
    config = SampleConfig(num_images=3, seed=5, batch_size=4, draw=Draw(temperature=0.9))
    job = {"prior": made.folder.uri, "vqvae": model.folder.uri, "out": (root / "s").uri, "work": "w",
           "name": "part-000000", "first": 0, "count": 3, "config": dataclasses.asdict(config), "labels": [0, 1],
           "completion": None, "threads": 1, "use_gpu": False}  # fmt: skip
    assert sample.Drawer()(sample._as_row(job))["error"] == ""
    table = read_parquet((root / "s").read("part-000000.parquet"), "here")
    assert table.labels.tolist() == [1, 0, 1]  # by seed: 5, 6, 7
    assert (table.tokens.flatten() == golden["samples"]).mean() >= 0.99


def test_evaluate(tmp_path: Path, golden: dict) -> None:
    root = Folder.of(tmp_path)
    facts = {"shape": {"H": 4, "W": 4, "G": 1, "K": 16}, "label_map": {"a": 0, "b": 1}, "model": "VQVAEModel"}
    tokens, model = artifact(root / "ts", "TokenShards", tokens_of(root), facts), vqvae(root)
    inputs = {"images": images(root), "vqvae": model, "tokens": tokens, "prior": prior_of(root, model)}
    job = {**{name: each.folder.uri for name, each in inputs.items()}, "samples": None, "judges": {}, "work": "w",
           "out": (root / "e").uri, "name": "validation-000000", "threads": 1, "use_gpu": False}  # fmt: skip
    assert meter.Meter()(meter.read_part(job))["error"] == ""
    table = pq.read_table(io.BytesIO((root / "e").read("validation-000000.parquet"))).to_pydict()
    for name, tolerance in {"psnr_db": 0.02, "ssim": 0.001, "latent_nats": 0.05}.items():
        assert table[name] == pytest.approx(golden["evaluate"][name], abs=tolerance), name
