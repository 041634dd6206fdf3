"""Which weights a finished training leaves."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from pipelines.train_vqvae import load_best
from vqvae_core.checkpoint import CheckpointError, History, StateFolder, TrainingState
from vqvae_core.storage import Folder
from vqvae_core.train import Worker

HISTORY: History = [{"step": step, "validation_loss": loss} for step, loss in ((10, 0.5), (20, 0.1), (30, 0.2))]


@dataclass
class Task:
    """As much of a `Trainable` as the choice needs."""

    model: torch.nn.Module

    def score(self, metrics: Mapping[str, int | float]) -> float:
        return metrics["validation_loss"]


def states(place: Path, said: list[str]) -> StateFolder:
    folder = StateFolder(Folder.of(place), "run", warn=said.append)
    for step in (20, 30):
        folder.write(TrainingState(step=step, identity="run", tensors={"model.weight": torch.full((1, 1), step / 1)}))
    return folder


def chosen(folder: StateFolder, said: list[str]) -> tuple[int, float]:
    model = torch.nn.Linear(1, 1, bias=False)
    step = load_best(Task(model), HISTORY, Worker(load=folder.load, warn=said.append))  # type: ignore[arg-type]
    return step, float(model.weight.detach())


def test_the_best_validation_gives_the_weights(tmp_path: Path) -> None:
    said: list[str] = []
    assert chosen(states(tmp_path, said), said) == (20, 20.0)
    assert said == []


def test_a_best_state_that_is_torn_gives_its_place_to_the_next_best(tmp_path: Path) -> None:
    """A finished training must not fail for ever."""
    said: list[str] = []
    folder = states(tmp_path, said)
    (tmp_path / "step-000000020" / "state.safetensors").write_bytes(b"torn")
    assert chosen(folder, said) == (30, 30.0)
    (line,) = said
    assert "step-000000020/state.safetensors, found" in line
    assert line.endswith("the weights of step 30 are used, the best that are whole")


def test_where_no_state_is_whole_it_says_so(tmp_path: Path) -> None:
    said: list[str] = []
    folder = states(tmp_path, said)
    for step in (20, 30):
        (tmp_path / f"step-{step:09d}" / "state.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="expected a whole training state of a validated step, found none: .*20"):
        chosen(folder, said)
