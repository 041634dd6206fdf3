from pathlib import Path

import pytest
import torch

from vqvae_core.checkpoint import CheckpointError, TrainingState, config_from_json, load_state, save_state
from vqvae_core.vqvae import VQVAEConfig

STATE = TrainingState(
    step=7, identity="run", tensors={"model.x": torch.arange(6.0).view(2, 3)}, history=[{"step": 7, "loss": 0.5}]
)


def test_round_trip(tmp_path: Path) -> None:
    save_state(tmp_path, STATE)
    state = load_state(tmp_path, "run")
    assert (state.step, state.history) == (7, STATE.history)
    assert torch.equal(state.tensors["model.x"], STATE.tensors["model.x"])
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors"]


def test_a_changed_byte(tmp_path: Path) -> None:
    save_state(tmp_path, STATE)
    path = tmp_path / "state.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="expected sha256"):
        load_state(tmp_path, "run")


def test_a_torn_state(tmp_path: Path) -> None:
    save_state(tmp_path, STATE)
    (tmp_path / "state.json").unlink()
    with pytest.raises(CheckpointError, match="it is incomplete"):
        load_state(tmp_path, "run")


def test_another_run(tmp_path: Path) -> None:
    save_state(tmp_path, STATE)
    with pytest.raises(CheckpointError, match="expected the training state of run other at .*, found one of run run"):
        load_state(tmp_path, "other")


def test_configs_from_json() -> None:
    import dataclasses

    config = VQVAEConfig(hidden_channels=3)
    assert config_from_json(VQVAEConfig, dataclasses.asdict(config)) == config
    with pytest.raises(TypeError, match="unknown"):
        config_from_json(VQVAEConfig, {"unknown": 1})
