from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from vqvae_core.errors import InputError
from vqvae_core.order import Order, OrderConfig, lanes_of, mix, permutation

FILES = [("a", 37), ("b", 50), ("c", 11), ("d", 2)]
CONFIG = OrderConfig(batch_size=16, num_lanes=8, shuffle_window=7, seed=3)
Place = tuple[int, int]


def batches(config: OrderConfig = CONFIG, *, rank: int = 0, world_size: int = 1, start: int = 0, stop: int = 18):
    order, lanes = Order(FILES, config), lanes_of(rank, world_size, config)
    found = [order.batch(step, lanes) for step in range(start, stop)]
    return [list(zip(places.files.tolist(), places.rows.tolist(), strict=True)) for places in found]


def test_every_sample_at_most_once_an_epoch_and_less_than_a_batch_left_out() -> None:
    order = Order(FILES, CONFIG)
    assert (order.steps_per_epoch, order.left_out) == (6, 4)
    for epoch in range(3):
        seen = Counter(place for batch in batches()[epoch * 6 : epoch * 6 + 6] for place in batch)
        assert len(seen) == 96
        assert set(seen.values()) == {1}
        assert all(0 <= row < FILES[file][1] for file, row in seen)


def test_the_left_out_ones_change() -> None:
    everything = {(file, row) for file, (_, rows) in enumerate(FILES) for row in range(rows)}
    left = [everything - {p for b in batches()[e * 6 : e * 6 + 6] for p in b} for e in range(3)]
    assert len({frozenset(part) for part in left}) > 1


def test_the_left_out_ones_of_a_single_shard_change() -> None:
    """Each of its samples is left out as often as any other: 116 of 500 in an epoch."""
    order = Order([("a", 500)], OrderConfig(batch_size=128, num_lanes=64, shuffle_window=4))
    assert (order.steps_per_epoch, order.left_out) == (3, 116)
    epochs, seen = 100, np.zeros(500, np.int64)
    for epoch in range(epochs):
        rows = order.stretch(range(3 * epoch, 3 * epoch + 3), range(64)).rows
        assert len(set(rows.tolist())) == 384
        seen[rows] += 1
    assert seen.min() / epochs > 0.55 and seen.max() / epochs < 0.95  # 0.768 in the mean


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_ranks_partition_each_global_batch(world_size: int) -> None:
    parts = [batches(rank=rank, world_size=world_size) for rank in range(world_size)]
    for step, whole in enumerate(batches()):
        assert [place for part in parts for place in part[step]] == whole


def test_64_lanes_and_fewer_shards_than_lanes() -> None:
    config = OrderConfig(batch_size=64, num_lanes=64, shuffle_window=4)
    for world_size in (1, 2, 4, 8, 16, 32, 64):
        parts = [batches(config, rank=rank, world_size=world_size, stop=2) for rank in range(world_size)]
        for step, whole in enumerate(batches(config, stop=2)):
            assert [place for part in parts for place in part[step]] == whole


@pytest.mark.parametrize("start", [1, 5, 6, 13])
def test_resume_equals_no_interruption(start: int) -> None:
    assert batches(start=start) == batches()[start:]


def test_epochs_and_seeds_differ_and_repeat() -> None:
    assert batches()[:6] != batches()[6:12]
    assert batches() == batches()
    assert batches(OrderConfig(batch_size=16, num_lanes=8, shuffle_window=7, seed=4)) != batches()


def test_a_window_is_shuffled_but_not_left() -> None:
    order = Order([("a", 64)], OrderConfig(batch_size=8, num_lanes=1, shuffle_window=16))
    rows = order.window(0, 0, 0).rows.tolist()
    assert rows != sorted(rows)
    first = next(row for row in rows if (row - 1) % 64 not in rows)
    assert sorted((row - first) % 64 for row in rows) == list(range(16))
    assert order.window(0, 0, 4).rows.tolist() == order.window(1, 0, 0).rows.tolist()


def test_a_batch_may_reach_over_windows() -> None:
    wide = OrderConfig(batch_size=32, num_lanes=2, shuffle_window=5)
    order = Order(FILES, wide)
    seen = Counter(place for batch in batches(wide, stop=order.steps_per_epoch) for place in batch)
    assert len(seen) == 96
    assert set(seen.values()) == {1}


@pytest.mark.parametrize("window", [2, 5, 64])
@pytest.mark.parametrize("longest", [1, 3, 8])
def test_stretches_are_the_batches_one_after_the_other_and_begin_in_one_window(window: int, longest: int) -> None:
    order = Order(FILES, replace(CONFIG, shuffle_window=window))
    lanes, stop = lanes_of(1, 2, order.config), 2 * order.steps_per_epoch + 3
    stretches = [*order.stretches(1, stop, longest)]
    assert [step for steps in stretches for step in steps] == [*range(1, stop)]
    assert max(len(steps) for steps in stretches) <= longest
    for steps in stretches:
        assert len({order.window_of(step) for step in steps}) == 1
        together, single = order.stretch(steps, lanes), [order.batch(step, lanes) for step in steps]
        assert together.files.tolist() == [number for one in single for number in one.files.tolist()]
        assert together.rows.tolist() == [row for one in single for row in one.rows.tolist()]


@pytest.mark.parametrize("step", range(0, 18))
def test_near_files_are_those_that_are_read_from_here_to_the_end_of_the_next_window(step: int) -> None:
    order, lanes = Order(FILES, CONFIG), range(2, 4)
    near = order.near(step, lanes)
    share, window = 2, 7
    epoch, index = divmod(step, 6)
    last = min((index * share // window + 1) * window // share, 6)  # steps that lie in this window as a whole
    for later in range(step, epoch * 6 + last):
        assert set(order.batch(later, lanes).files.tolist()) <= set(near)
    assert len(near) == len(set(near))


@pytest.mark.parametrize(("batch_size", "num_lanes", "window"), [(32, 1, 5), (32, 2, 1), (16, 1, 16), (96, 1, 7)])
def test_near_files_hold_all_of_a_batch_that_is_wider_than_windows(
    batch_size: int, num_lanes: int, window: int
) -> None:
    """What is open changes only where a step begins in another window."""
    order = Order(FILES * 4, OrderConfig(batch_size=batch_size, num_lanes=num_lanes, shuffle_window=window))
    lanes, share, at, near = range(num_lanes), batch_size // num_lanes, (-1, -1), set()
    for step in range(3 * order.steps_per_epoch):
        epoch, index = divmod(step, order.steps_per_epoch)
        if at != (at := (epoch, index * share // window)):
            near = set(order.near(step, lanes))
        assert set(order.batch(step, lanes).files.tolist()) <= near


def test_messages() -> None:
    with pytest.raises(ValueError, match="num_lanes must divide batch_size 12, was 8; the largest that does is 6"):
        OrderConfig(batch_size=12, num_lanes=8)
    with pytest.raises(InputError, match="expected a number of workers that divides num_lanes 8, found 3"):
        lanes_of(0, 3, CONFIG)
    with pytest.raises(InputError, match="expected at least one batch of 128 samples, the data has 100"):
        Order(FILES, OrderConfig(batch_size=128))


def test_permutations_are_pinned() -> None:
    """Their values are part of every fingerprinted result."""
    assert permutation(8, 1, 2).tolist() == [6, 5, 1, 7, 3, 0, 4, 2]
    assert mix(1, 2, 3) == 15205877802699428709
    assert sorted(permutation(1000, 5).tolist()) == list(range(1000))


def test_the_order_is_pinned() -> None:
    assert batches(stop=1) == [GOLDEN]


GOLDEN: list[Place] = [
    (2, 4), (3, 1), (0, 3), (0, 2), (0, 13), (0, 14), (0, 25), (0, 24), (0, 35), (1, 2), (1, 11), (1, 16), (1, 25),
    (1, 28), (1, 38), (1, 34),
]  # fmt: skip
