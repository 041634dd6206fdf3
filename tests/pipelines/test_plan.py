"""Which image goes where: every one once, as a function of the index and the recipe alone."""

import numpy as np
import pytest

from pipelines.config import ShardConfig
from pipelines.plan import Plan, make_plan


def places(plan: Plan) -> list[tuple[str, int, int, int]]:
    """(shard, split, group, image of the group) of every image, in order."""
    return [
        (shard.name, shard.split, group, int(image))
        for group in range(plan.num_groups)
        for shard in plan.shards(group)
        for image in plan.order(group, shard.split)[shard.first : shard.first + shard.count]
    ]


def test_every_image_has_one_place() -> None:
    plan = make_plan(np.array([[25, 0], [0, 7]]), ShardConfig(images_per_shard=10))
    found = places(plan)
    assert [name for name, *_ in found] == (
        ["train-000000"] * 10 + ["train-000001"] * 10 + ["train-000002"] * 5 + ["validation-000000"] * 7
    )
    assert len({place[1:] for place in found}) == 32
    assert [image for *_, image in found[:10]] != sorted(image for *_, image in found[:10])


def test_it_is_a_function_of_seed_and_counts() -> None:
    counts = np.array([[25, 0], [0, 7]])
    plans = [places(make_plan(counts, ShardConfig(images_per_shard=10, seed=seed))) for seed in (0, 0, 1)]
    assert plans[0] == plans[1] != plans[2]


@pytest.mark.parametrize("seed", range(5))
def test_a_large_source_is_cut_into_groups_of_whole_runs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 30, (200, 2))
    counts[rng.integers(0, 200, 20)] = 0
    plan = make_plan(counts, ShardConfig(images_per_shard=16, mix_images=500, seed=seed))
    assert plan.num_groups == pytest.approx(counts.sum() / 500, abs=2)
    assert sorted(plan.runs.tolist()) == list(range(200))
    assert plan.available.sum(axis=0).tolist() == counts.sum(axis=0).tolist()
    for group in range(plan.num_groups):
        runs = plan.runs_of(group)
        assert np.all(np.diff(runs) > 0)
        assert counts[runs].sum() < 500 + 60
        assert runs.max() - runs.min() > 100, "its runs are neighbours"
    found = places(plan)
    assert len(found) == len(set(found)) == counts.sum()
    names = [name for name, split, *_ in found if split == 0]
    assert sorted(set(names)) == [plan.name(0, number) for number in range(plan.num_shards(0))]


def test_limits_take_some_and_leave_the_rest() -> None:
    config = ShardConfig(images_per_shard=10, max_train_images=12, max_validation_images=3)
    assert make_plan(np.array([[25, 0], [0, 7]]), config).num_images == 15
    grouped = ShardConfig(images_per_shard=10, mix_images=20, max_train_images=33)
    plan = make_plan(np.full((10, 2), [10, 0]), grouped)
    assert plan.taken[:, 0].tolist() == [20, 13, 0, 0, 0]
    assert plan.num_shards(0) == 4


def test_names_sort_as_numbers_do() -> None:
    plan = make_plan(np.full((3_000_000, 2), [1, 0]), ShardConfig(images_per_shard=1, mix_images=10**7))
    assert plan.name(0, 7) == "train-0000007"
    assert next(plan.shards(0)).name == "train-0000000"


def test_no_images() -> None:
    plan = make_plan(np.zeros((0, 2), np.int64), ShardConfig())
    assert (plan.num_groups, plan.num_images, plan.num_shards(0)) == (0, 0, 0)
