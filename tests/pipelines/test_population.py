"""Population based training: who goes on from whom, with which values, and that a state is handed over whole."""

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines import train_vqvae
from pipelines.lineage import NO_LINEAGE, Lineage, SavedState, Segment
from pipelines.population import Member, Reached, ends, near, next_generation
from pipelines.presets import PRESETS
from pipelines.search_space import Dimension, parse_all
from tests.vqvae_core.shards import make_images
from vqvae_core import train as training
from vqvae_core.checkpoint import CheckpointError, StateFolder, collect_tensors
from vqvae_core.errors import InputError
from vqvae_core.storage import Folder
from vqvae_core.train import Worker

SMOKE = PRESETS["smoke"][0]
DIMENSIONS = parse_all(["train.learning-rate=log:1e-4..1e-2", "vqvae.commitment-cost=choice:1,4,16"], SMOKE)


def members(count: int) -> list[Member]:
    draw = random.Random(0)
    return [Member(number, {one.field: one.draw(draw) for one in DIMENSIONS}) for number in range(1, count + 1)]


def state(number: int) -> SavedState:
    return SavedState(f"/states/{number}", f"w{number}", 8)


def after(values: list[float | None], **more: Any) -> list[Member]:
    """The second generation of members that came to these figures."""
    reached = {
        number: Reached(value, None if value is None else state(number)) for number, value in enumerate(values, 1)
    }
    settings = {"mode": "max", "dimensions": DIMENSIONS, "refusal": lambda values: None, "seed": 0, **more}
    return next_generation(members(len(values)), reached, 8, **settings)


def test_generations_end_evenly_and_at_the_last_step() -> None:
    assert ends(1800, 4) == [450, 900, 1350, 1800] and ends(10, 3) == [3, 6, 10]


def test_the_worst_quarter_goes_on_from_the_best() -> None:
    first, found = members(8), after([5, 1, 8, 4, 7, 3, 2, 6])
    assert [member.parent for member in found if member.number not in (2, 7)] == [1, 3, 4, 5, 6, 8], "most go on"
    assert all(found[number - 1].values == first[number - 1].values for number in (1, 3, 4, 5, 6, 8))
    for number in (2, 7):
        member = found[number - 1]
        assert member.parent in (3, 5) and member.before.state == state(member.parent)
        assert member.before.segments == (Segment(8, first[member.parent - 1].values),)
        assert member.values != first[member.parent - 1].values


def test_the_least_is_the_best_where_it_is_looked_for() -> None:
    found = after([5, 1, 8, 4], mode="min")
    assert [member.parent for member in found] == [1, 2, 2, 4]


def test_one_whose_numbers_are_not_finite_never_goes_on() -> None:
    found = after([None, 3, None, 2, None])
    assert [member.parent for member in found] == [2, 2, 2, 4, 2]
    assert all(found[number].before.state == state(2) for number in (0, 2, 4))
    few = parse_all(["vqvae.commitment-cost=choice:1,4"], SMOKE)
    first = [Member(number, {few[0].field: value}) for number, value in ((1, 1.0), (2, 4.0), (3, 4.0))]
    reached = {1: Reached(3.0, state(1)), 2: Reached(None, None), 3: Reached(None, None)}
    more = {"mode": "max", "dimensions": few, "refusal": lambda values: None, "seed": 0}
    with pytest.raises(
        InputError, match=r"values for trial 3, .* by step 8, .* of trial 1, found none; widen --search"
    ):
        next_generation(first, reached, 8, **more)


def test_no_two_go_on_from_the_same_state_under_the_same_values() -> None:
    """They would be one training, in one folder."""
    one = parse_all(["train.learning-rate=log:5e-4..5e-3"], SMOKE)
    for seed in range(200):
        draw = random.Random(seed)
        now = [Member(number, {one[0].field: one[0].draw(draw)}) for number in range(1, 13)]
        for until in (8, 16, 24):
            reached = {
                member.number: Reached(draw.random(), SavedState("/s", f"{until}-{member.number}", until))
                for member in now
            }
            now = next_generation(
                now, reached, until, mode="max", dimensions=one, refusal=lambda values: None, seed=seed
            )
            assert len({(member.before.state, *member.values.values()) for member in now}) == len(now)
            assert all(
                [part.until for part in member.before.segments] == list(range(8, until + 1, 8)) for member in now
            )


def test_it_is_a_function_of_the_seed() -> None:
    values = [5.0, 1.0, 8.0, 4.0, 7.0, 3.0, 2.0, 6.0]
    assert after(values) == after(values) != after(values, seed=1)


def test_values_lie_near_and_are_taken() -> None:
    draw, values = random.Random(1), {"train.learning_rate": 9e-3, "vqvae.commitment_cost": 4.0}
    found = [near(values, DIMENSIONS, lambda values: None, draw) for _ in range(200)]
    rates = {one["train.learning_rate"] for one in found}
    assert all(isinstance(rate, float) and 1e-4 <= rate <= 1e-2 for rate in rates)
    assert {9e-3 * 100**-0.1, 1e-2} <= rates and len(rates) > 10, (
        "a tenth down, the end of the range, now and then anew"
    )
    assert {one["vqvae.commitment_cost"] for one in found} == {1.0, 4.0, 16.0}
    assert all(one["train.learning_rate"] < 1e-3 for one in
               (near(values, DIMENSIONS, lambda new: "no" if new["train.learning_rate"] > 1e-3 else None, draw)
                for _ in range(20)))  # fmt: skip
    assert near(values, DIMENSIONS, lambda new: "none is taken", draw) is None
    narrow = Dimension("train.beta2", "uniform", 0.9, 0.999)
    moved = {near({narrow.field: 0.95}, [narrow], lambda values: None, draw)[narrow.field] for _ in range(50)}  # type: ignore[index]
    assert {0.9401, 0.9599} <= {round(value, 6) for value in moved}, "not from end to end"


def test_a_lineage_is_part_of_the_recipe() -> None:
    lineage = Lineage((Segment(8, {"train.learning_rate": 1e-3}),), state(1))
    assert NO_LINEAGE.added_to({"a": 1}) == {"a": 1}
    expected = {"a": 1, "before": [{"until": 8, "values": {"train.learning_rate": 1e-3}}]}
    assert lineage.added_to({"a": 1}) == expected, "where the state lies is not"


def test_a_state_is_handed_over_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step of the one that goes on, with another learning rate, finds the parent's weights, table, moments
    and curves, bit for bit."""
    images = make_images(Folder.of(tmp_path / "images"), [32, 32], size=32)

    def trained(name: str, rate: float, before: SavedState | None, until: int | None) -> dict[str, Any]:
        config = dataclasses.replace(SMOKE.train, learning_rate=rate, steps=12, validate_every=4, precision="fp32")
        settings = {
            "images": images.artifact.folder.uri, "model": dataclasses.asdict(SMOKE.vqvae), "augment": {},
            "train": dataclasses.asdict(config), "identity": name, "loader_workers": 0, "out": str(tmp_path / name),
        }  # fmt: skip
        states = StateFolder(Folder.of(tmp_path / f"{name}-states"), name)
        worker = Worker(save=states.save, flush=states.wait, load=states.load, until=until, warn=lambda line: None)
        return train_vqvae.loop(settings, worker, None if before is None else before.load())

    part = trained("parent", 1e-3, None, 6)
    assert [point["step"] for point in part["history"]] == [4, 6] and "validation_psnr_db" in part["history"][-1]
    handed = SavedState(str(tmp_path / "parent-states"), "parent", 6)
    seen: list[tuple[int, dict[str, torch.Tensor]]] = []
    step = training._Loop._step

    def watched(self: Any, pieces: Any, number: int) -> Any:
        seen.append(
            (
                number,
                {name: value.clone() for name, value in collect_tensors(self._task.model, self._optimizer).items()},
            )
        )
        return step(self, pieces, number)

    monkeypatch.setattr(training._Loop, "_step", watched)
    made = trained("child", 2e-3, handed, None)
    expected = handed.load()
    number, found = seen[0]
    assert number == 6 and found.keys() == expected.tensors.keys()
    assert all(torch.equal(found[name], expected.tensors[name]) for name in found)
    assert [name for name in found if "exp_avg" in name] and [name for name in found if "table" in name]
    assert len(seen) == 6 and "model.safetensors" in {file["path"] for file in made["files"]}
    with pytest.raises(CheckpointError, match="of another run|expected the training state of run other"):
        dataclasses.replace(handed, identity="other").load()
