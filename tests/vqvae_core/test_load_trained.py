"""Trained models out of artifacts: each kind comes back, and what is no such model is refused, whatever it is."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import nn

from vqvae_core.artifacts import Artifact, ArtifactError, FileEntry, commit
from vqvae_core.checkpoint import save_model
from vqvae_core.contender import KIND as BASELINE
from vqvae_core.contender import baseline_config, load_contender, make_model
from vqvae_core.likelihood import LikelihoodConfig
from vqvae_core.pixelcnn import PixelCNN, PixelCNNConfig
from vqvae_core.prior import KIND as PRIOR
from vqvae_core.prior import Prior
from vqvae_core.quantizer import QuantizerConfig
from vqvae_core.second_stage import KIND as SECOND
from vqvae_core.second_stage import SecondStage, SecondStageConfig, SecondStageNetwork
from vqvae_core.storage import Folder
from vqvae_core.token_shards import TokenShape
from vqvae_core.vqvae import KIND, VQVAE, VQVAEConfig

CONFIG = VQVAEConfig(hidden_channels=8, residual_channels=4, num_residual_blocks=1,
                     likelihood=LikelihoodConfig(kind="logistic"),
                     quantizer=QuantizerConfig(num_codes=16, code_dim=4))  # fmt: skip
SHAPE = TokenShape(height=4, width=4, num_groups=1, num_codes=16)
LAYERS = PixelCNNConfig(channels=8, num_layers=1, first_kernel_size=3, head_channels=8)
STAGE = SecondStageConfig(channels=8, residual_channels=8, num_strided=1, num_residual_blocks=1, decoder=LAYERS,
                          quantizer=QuantizerConfig(num_codes=8, code_dim=2, num_groups=3))  # fmt: skip


def put(folder: Folder, kind: str, files: dict[str, bytes]) -> Artifact:
    for name, data in files.items():
        folder.write(name, data)
    entries = [FileEntry.of(name, data) for name, data in files.items()]
    return commit(folder, kind=kind, stage="s", stage_version=1, fingerprint="cd" * 32, recipe={}, inputs={},
                  files=entries, facts={}, provenance={})  # fmt: skip


def vqvae_files(config: VQVAEConfig = CONFIG) -> dict[str, bytes]:
    return {
        "config.json": json.dumps(dataclasses.asdict(config)).encode(),
        "model.safetensors": save_model(VQVAE(config)),
    }


def a_vqvae(folder: Folder, **quantizer: Any) -> tuple[nn.Module, nn.Module]:
    config = dataclasses.replace(CONFIG, quantizer=QuantizerConfig(**quantizer)) if quantizer else CONFIG
    files = vqvae_files(config)
    found = VQVAE.of(put(folder, KIND, files))
    made = VQVAE(config)
    made.load_state_dict(found.state_dict())
    assert save_model(made) == files["model.safetensors"]
    return made, found


def a_prior(folder: Folder) -> tuple[nn.Module, nn.Module]:
    network = PixelCNN(LAYERS, SHAPE, 2)
    files = Prior(network, {"a": 0, "b": 1}, "ab" * 32).files(dataclasses.asdict(LAYERS))
    found = Prior.of(put(folder, PRIOR, files))
    assert (found.label_map, found.vqvae) == ({"a": 0, "b": 1}, "ab" * 32)
    return network, found.network


def a_second_stage(folder: Folder, latents: Any) -> tuple[nn.Module, nn.Module]:
    config = STAGE.with_latents(latents)
    network = SecondStageNetwork(config, SHAPE)
    found = SecondStage.of(put(folder, SECOND, SecondStage(network, "ef" * 32).files(dataclasses.asdict(config))))
    assert found.vqvae == "ef" * 32
    return network, found.network


def a_baseline(folder: Folder, name: str) -> tuple[nn.Module, nn.Module]:
    model = make_model(name, CONFIG)
    files = {
        "config.json": baseline_config(name, dataclasses.asdict(CONFIG), 3),
        "model.safetensors": save_model(model),
    }
    return model, load_contender(name, put(folder, BASELINE, files))


MAKERS: dict[str, Callable[[Folder], tuple[nn.Module, nn.Module]]] = {
    "vqvae": a_vqvae,
    "moving averages": lambda folder: a_vqvae(folder, num_codes=8, code_dim=2, num_groups=2, learn_by="moving_average"),
    "levels": lambda folder: a_vqvae(folder, levels=(4, 4)),
    "prior": a_prior,
    **{
        f"second stage, {kind}": lambda folder, kind=kind: a_second_stage(folder, kind)
        for kind in ("codes", "none", "gaussian")
    },
    **{name: lambda folder, name=name: a_baseline(folder, name) for name in ("vae", "vimco", "vimco_gaussian")},
}


@pytest.mark.parametrize("name", MAKERS)
def test_what_is_loaded_is_what_was_kept(tmp_path: Path, name: str) -> None:
    made, found = MAKERS[name](Folder.of(tmp_path))
    assert not found.training and all(tensor.device.type == "cpu" for tensor in found.state_dict().values())
    assert found.state_dict().keys() == made.state_dict().keys()
    assert all(torch.equal(tensor, found.state_dict()[key]) for key, tensor in made.state_dict().items())


def changed(**fields: Any) -> dict[str, bytes]:
    config = {**dataclasses.asdict(CONFIG), **fields}
    return {**vqvae_files(), "config.json": json.dumps(config).encode()}


def without_a_tensor() -> dict[str, bytes]:
    state = VQVAE(CONFIG).state_dict()
    del state["decoder.conv_out.bias"]
    return {**vqvae_files(), "model.safetensors": save(state)}


BAD = {
    "asks for a terabyte": (
        lambda: changed(hidden_channels=300_000), r"asks for decoder\..* of shape \(.*300000.*, the weights have \(",
    ),
    "a field of a later version": (lambda: changed(attention=True), "unexpected keyword argument 'attention'"),
    "a value that is none": (lambda: changed(hidden_channels=0), "hidden_channels must be at least 1, was 0"),
    "a field of another type": (lambda: changed(quantizer="none"), "but: "),
    "fewer weights": (without_a_tensor, r"asks for decoder.conv_out.bias of shape \(6,\), the weights have none"),
    "weights that are cut": (
        lambda: {**vqvae_files(), "model.safetensors": vqvae_files()["model.safetensors"][:-8]}, "but: ",
    ),
    "weights that are none": (lambda: {**vqvae_files(), "model.safetensors": b"pickled"}, "but: "),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_such_model_is_refused(tmp_path: Path, name: str) -> None:
    files, words = BAD[name]
    put(Folder.of(tmp_path), KIND, files())
    with pytest.raises(ArtifactError, match="expected a model that this version can load at .*; load it with") as found:
        VQVAE.load(str(tmp_path))
    found.match(words)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("text", [b"[]", b"{", b"[" * 100_000])
def test_a_config_that_is_none(tmp_path: Path, text: bytes) -> None:
    for kind, load in ((KIND, VQVAE.load), (PRIOR, Prior.load), (SECOND, SecondStage.load)):
        place = Folder.of(tmp_path / kind)
        put(place, kind, {**vqvae_files(), "config.json": text})
        with pytest.raises(ArtifactError, match="expected a JSON object in .*config.json, found something else"):
            load(place.uri)


@pytest.mark.slow
def test_the_compiler_is_not_imported_for_it(tmp_path: Path) -> None:
    """Programs that only look at a model would wait seconds for it."""
    a_vqvae(Folder.of(tmp_path / "vqvae"))
    a_prior(Folder.of(tmp_path / "prior"))
    a_second_stage(Folder.of(tmp_path / "second"), "codes")
    program = f"""
import sys
from vqvae_core.prior import Prior
from vqvae_core.second_stage import SecondStage
from vqvae_core.vqvae import VQVAE
VQVAE.load({str(tmp_path / "vqvae")!r})
Prior.load({str(tmp_path / "prior")!r})
SecondStage.load({str(tmp_path / "second")!r})
sys.exit("torch._dynamo" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])
