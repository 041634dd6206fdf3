"""States of a run: round trips, what is kept, and what happens to a torn, altered or foreign one."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from vqvae_core.checkpoint import CheckpointError, StateFolder, TornStateError, TrainingState, config_from_json
from vqvae_core.quantizer import QuantizerConfig
from vqvae_core.storage import Folder, StorageError
from vqvae_core.vqvae import VQVAEConfig


def state(step: int, identity: str = "run") -> TrainingState:
    return TrainingState(
        step=step,
        identity=identity,
        tensors={"model.x": torch.arange(6.0).view(2, 3) + step},
        history=[{"step": step, "loss": 0.1 + step}],
        pending=[{"loss": 0.1}],
    )


def folder_of(place: Path, **options) -> StateFolder:
    return StateFolder(Folder.of(place), "run", **options)


def saved(place: Path, *steps: int, **options) -> StateFolder:
    states = folder_of(place, **options)
    for step in steps:
        states.save(state(step))
    states.wait()
    return states


def test_round_trip(tmp_path: Path) -> None:
    found = saved(tmp_path, 7).newest()
    assert found is not None
    assert (found.step, found.history, found.pending) == (7, state(7).history, [{"loss": 0.1}])
    assert torch.equal(found.tensors["model.x"], state(7).tensors["model.x"])
    assert sorted(path.suffix for path in (tmp_path / "step-000000007").iterdir()) == [".json", ".safetensors"]


def test_there_may_be_none(tmp_path: Path) -> None:
    assert folder_of(tmp_path / "new").newest() is None


def test_the_last_ones_and_the_best_are_kept(tmp_path: Path) -> None:
    states = folder_of(tmp_path, keep=2)
    for step, best in ((10, None), (20, 20), (30, 20), (40, 20), (50, 20)):
        states.save(state(step), best)
    states.wait()
    assert states.steps() == [50, 40, 20]


def test_a_torn_state_takes_no_whole_ones_place(tmp_path: Path) -> None:
    """Killed while 30 was written, training went on from 20: if 40 is altered, 20 must still be there."""
    states = saved(tmp_path, 10, 20, 30, keep=2)
    (tmp_path / "step-000000030" / "state.json").unlink()
    states.save(state(40))
    states.wait()
    assert states.steps() == [40, 20]


def test_saving_does_not_wait_and_the_next_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    gate, order = threading.Event(), []
    whole = StateFolder.write

    def slow(self: StateFolder, one: TrainingState) -> None:
        gate.wait(20)
        whole(self, one)
        order.append(one.step)

    monkeypatch.setattr(StateFolder, "write", slow)
    states = folder_of(tmp_path)
    states.save(state(1))
    assert states.steps() == []
    gate.set()
    states.save(state(2))
    assert 1 in order
    states.wait()
    assert order == [1, 2]


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda place: flip(place / "state.safetensors"), "expected sha256"),
        (lambda place: (place / "state.safetensors").unlink(), "expected state.safetensors at"),
        (lambda place: (place / "state.json").unlink(), "found no state.json"),
        (lambda place: (place / "state.json").write_text('{"version": 3, "st'), "expected the index of a state in"),
        (lambda place: (place / "state.json").write_text('{"version": 3}'), "as it was written, found it altered"),
        (lambda place: replace(place / "state.json", "20.1", "20.2"), "as it was written, found it altered"),
        (
            lambda place: replace(place / "state.json", '"step": 20', '"step": 30'),
            "as it was written, found it altered",
        ),
        (lambda place: shutil.copy(place.with_name("step-000000010") / "state.json", place), "found it altered"),
    ],
    ids=["flipped", "missing", "torn", "half", "empty", "a digit", "another step", "of another state"],
)
def test_what_is_torn_is_passed_over_and_both_are_named(tmp_path: Path, harm, words: str) -> None:
    said: list[str] = []
    states = saved(tmp_path, 10, 20, warn=said.append)
    harm(tmp_path / "step-000000020")
    found = states.newest()
    assert found is not None
    assert found.step == 10
    (line,) = said
    assert words in line
    assert "step-000000020" in line
    assert line.endswith("going on from " + str(tmp_path / "step-000000010"))
    with pytest.raises(TornStateError, match=words):
        states.load(20)
    states.save(state(20))
    states.wait()
    assert states.newest().step == 20


def test_when_all_are_torn_training_starts_again_and_says_so(tmp_path: Path) -> None:
    said: list[str] = []
    states = saved(tmp_path, 10, warn=said.append)
    (tmp_path / "step-000000010" / "state.json").unlink()
    assert states.newest() is None
    assert said[0].endswith("there is no other, starting from step 0")


def test_another_run_and_another_version_are_refused(tmp_path: Path) -> None:
    states = saved(tmp_path, 10)
    with pytest.raises(CheckpointError, match="expected the training state of run other at .*, found one of run run"):
        StateFolder(Folder.of(tmp_path), "other").newest()
    index = tmp_path / "step-000000010" / "state.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "version": 1}))
    with pytest.raises(CheckpointError, match="expected training state version 3 at .*, found 1; use the release"):
        states.newest()


def test_a_state_that_cannot_be_read_is_no_torn_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that fails for a while must not send training back to an earlier state."""
    states = saved(tmp_path, 10, 20)

    def fail(*_: object) -> bytes:
        raise OSError("connection reset")

    monkeypatch.setattr(Folder, "read", fail)
    with pytest.raises(OSError, match="connection reset"):
        states.newest()


def test_on_s3(s3_bucket: str) -> None:
    states = StateFolder(Folder.of(f"{s3_bucket}/states"), "run", keep=1)
    for step, best in ((1, 1), (2, 1), (3, 1)):
        states.save(state(step), best)
    states.wait()
    assert states.steps() == [3, 1]
    assert states.newest().step == 3


def test_a_full_disk_keeps_what_is_there(small_disk: Path) -> None:
    """One state fits, two do not."""
    states = folder_of(small_disk)
    big = dataclasses.replace(state(10), tensors={"model.x": torch.zeros(180_000)})
    states.save(big)
    states.save(dataclasses.replace(big, step=20))
    with pytest.raises(StorageError, match="no space left in .*step-000000020"):
        states.wait()
    assert states.steps() == [10]
    assert states.newest().step == 10
    states.save(state(30))
    states.wait()
    assert states.steps() == [30, 10]


def test_configs_from_json() -> None:
    config = VQVAEConfig(hidden_channels=3, quantizer=QuantizerConfig(levels=(8, 5, 5)))
    assert config_from_json(VQVAEConfig, json.loads(json.dumps(dataclasses.asdict(config)))) == config
    with pytest.raises(TypeError, match="unknown"):
        config_from_json(VQVAEConfig, {"unknown": 1})
