"""Which image goes where: every one once, as a function of the index and the recipe alone."""

import dataclasses

import numpy as np
import pytest

from pipelines.config import ShardConfig
from pipelines.plan import Plan, make_plan
from vqvae_core.artifacts import hash_json
from vqvae_core.errors import InputError


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


COUNTS = np.random.default_rng(7).integers(0, 30, (60, 2))
ONE_GROUP = ShardConfig(images_per_shard=16, holdout_images=101)
GROUPS = dataclasses.replace(ONE_GROUP, mix_images=200)


def by_split(plan: Plan) -> list[list[tuple[int, int]]]:
    """The images of each split, in the order of its shards, as (group, image of the group's train or held-out ones)."""
    return [[place[2:] for place in places(plan) if place[1] == split] for split in range(len(plan.origins))]


@pytest.mark.parametrize("config", [ONE_GROUP, GROUPS])
@pytest.mark.parametrize("holdout", [1, 101, int(COUNTS[:, 0].sum()) - 1])
def test_a_holdout_is_exact_and_leaves_the_rest(config: ShardConfig, holdout: int) -> None:
    plan = make_plan(COUNTS, dataclasses.replace(config, holdout_images=holdout))
    without = make_plan(COUNTS, dataclasses.replace(config, holdout_images=0))
    assert (plan.num_groups == 1) == (config is ONE_GROUP)
    assert plan.runs.tolist() == without.runs.tolist()
    assert plan.bounds.tolist() == without.bounds.tolist()
    train, validation, test = by_split(plan)
    assert (len(validation), len(test)) == (holdout, COUNTS[:, 1].sum())
    assert not set(train) & set(validation)
    all_train, held_out = by_split(without)
    assert sorted(train + validation) == sorted(all_train)
    assert test == held_out, "the test split is what is the validation split without a holdout"
    names = {name.split("-")[0]: split for name, split, *_ in places(plan)}
    assert names == {"train": 0, "validation": 1, "test": 2}


def test_each_group_holds_back_its_share() -> None:
    plan = make_plan(COUNTS, GROUPS)
    train = plan.available[:, :2].sum(axis=1)
    assert plan.num_groups > 5
    assert np.abs(plan.available[:, 1] - 101 * train / train.sum()).max() < 1


def test_what_is_held_back_is_drawn_by_the_seed() -> None:
    plans = [by_split(make_plan(COUNTS, dataclasses.replace(ONE_GROUP, seed=seed))) for seed in (0, 0, 1)]
    assert plans[0] == plans[1]
    assert sorted(plans[0][1]) != sorted(plans[2][1])
    assert np.diff(sorted(image for _, image in plans[0][1])).max() > 1, "they are neighbours"


@pytest.mark.parametrize("config", [ONE_GROUP, GROUPS])
def test_limits_apply_after_the_holdout(config: ShardConfig) -> None:
    """They take the first of each split, and move no image from one to another."""
    limits = dataclasses.replace(config, max_train_images=300, max_validation_images=40, max_test_images=50)
    limited, whole = by_split(make_plan(COUNTS, limits)), by_split(make_plan(COUNTS, config))
    assert [len(images) for images in limited] == [300, 40, 50]
    assert [images[: len(some)] for images, some in zip(whole, limited, strict=True)] == limited
    above = dataclasses.replace(config, max_train_images=10**6, max_validation_images=10**6, max_test_images=10**6)
    assert by_split(make_plan(COUNTS, above)) == whole


def test_a_limited_train_split_is_the_same_without_a_holdout() -> None:
    some = dataclasses.replace(ONE_GROUP, max_train_images=50)
    assert by_split(make_plan(COUNTS, some))[0] == by_split(make_plan(COUNTS, ONE_GROUP))[0][:50]
    without = dataclasses.replace(some, holdout_images=0)
    assert by_split(make_plan(COUNTS, some))[0] == by_split(make_plan(COUNTS, without))[0]


def test_a_holdout_of_a_source_without_held_out_images() -> None:
    plan = make_plan(COUNTS * [1, 0], ONE_GROUP)
    assert [plan.num_shards(split) for split in (1, 2)] == [7, 0]


def test_a_holdout_out_of_billions() -> None:
    counts = np.full((4, 2), [2**31 - 1, 0])
    plan = make_plan(counts, ShardConfig(images_per_shard=1 << 30, mix_images=1 << 30, holdout_images=2**32 + 1))
    assert plan.available.sum(axis=0).tolist() == [4 * (2**31 - 1) - 2**32 - 1, 2**32 + 1, 0]
    assert plan.available.min() >= 0


@pytest.mark.parametrize("more", [0, 1, 10**9])
def test_a_holdout_of_all_train_images_is_refused(more: int) -> None:
    expected = f"expected fewer images to hold back than the source's 25 train images, found {25 + more}; lower --sh"
    with pytest.raises(InputError, match=expected):
        make_plan(np.array([[25, 0], [0, 7]]), ShardConfig(holdout_images=25 + more))


def test_messages_of_the_config() -> None:
    with pytest.raises(ValueError, match="holdout_images must be 0 or more, was -1"):
        ShardConfig(holdout_images=-1)
    with pytest.raises(ValueError, match="max_test_images must be at least 1, was 0"):
        ShardConfig(holdout_images=5, max_test_images=0)
    with pytest.raises(ValueError, match="max_test_images must be none where holdout_images is 0, .* was 9; set"):
        ShardConfig(max_test_images=9)


def test_without_a_holdout_places_are_as_before_there_was_one() -> None:
    counts = np.arange(80).reshape(40, 2) % 11
    plan = make_plan(counts, ShardConfig(images_per_shard=16, mix_images=100, max_train_images=150))
    found = hash_json([plan.runs.tolist(), plan.bounds.tolist(), places(plan)])
    assert (plan.num_groups, found[:12]) == (4, "93ead1b78221")


def test_names_sort_as_numbers_do() -> None:
    plan = make_plan(np.full((3_000_000, 2), [1, 0]), ShardConfig(images_per_shard=1, mix_images=10**7))
    assert plan.name(0, 7) == "train-0000007"
    assert next(plan.shards(0)).name == "train-0000000"


def test_no_images() -> None:
    for config in (ShardConfig(), ONE_GROUP):
        plan = make_plan(np.zeros((0, 2), np.int64), config)
        assert (plan.num_groups, plan.num_images, plan.num_shards(0)) == (0, 0, 0)
