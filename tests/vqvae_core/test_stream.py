from collections import Counter

import pytest

from vqvae_core.errors import InputError
from vqvae_core.stream import Order, Stream, StreamConfig, mix, permutation

FILES = [("a", 37), ("b", 50), ("c", 11), ("d", 2)]
CONFIG = StreamConfig(batch_size=16, num_lanes=8, shuffle_window=7, seed=3)


def read(path: str) -> list[tuple[str, int]]:
    return [(path, row) for row in range(dict(FILES)[path])]


def batches(config: StreamConfig = CONFIG, *, rank: int = 0, world_size: int = 1, start: int = 0, stop: int = 18):
    stream = Stream(FILES, read, config, rank=rank, world_size=world_size)
    return list(stream.batches(start, stop, list))


def test_every_sample_at_most_once_an_epoch_and_less_than_a_batch_left_out() -> None:
    assert Order(FILES, CONFIG).steps_per_epoch == 6
    for epoch in range(3):
        seen = Counter(place for batch in batches()[epoch * 6 : epoch * 6 + 6] for place in batch)
        assert len(seen) == 96
        assert set(seen.values()) == {1}


def test_the_left_out_ones_change() -> None:
    everything = {place for path, _ in FILES for place in read(path)}
    left = [everything - {p for b in batches()[e * 6 : e * 6 + 6] for p in b} for e in range(3)]
    assert len({frozenset(part) for part in left}) > 1


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_ranks_partition_each_global_batch(world_size: int) -> None:
    parts = [batches(rank=rank, world_size=world_size) for rank in range(world_size)]
    for step, whole in enumerate(batches()):
        assert [place for part in parts for place in part[step]] == whole


@pytest.mark.parametrize("start", [1, 5, 6, 13])
def test_resume_equals_no_interruption(start: int) -> None:
    assert batches(start=start) == batches()[start:]


def test_skipping_reads_nothing() -> None:
    opened = []

    def counted(path: str) -> list[tuple[str, int]]:
        opened.append(path)
        return read(path)

    stream = Stream(FILES, counted, CONFIG, rank=3, world_size=8)
    list(stream.batches(5, 6, list))
    assert set(opened) == {path for path, _ in stream.order.batch(5, stream.lanes)}
    assert len(set(opened)) < len(FILES)


def test_epochs_and_seeds_differ_and_repeat() -> None:
    assert batches()[:6] != batches()[6:12]
    assert batches() == batches()
    assert batches(StreamConfig(batch_size=16, num_lanes=8, shuffle_window=7, seed=4)) != batches()


def test_a_window_is_shuffled_but_not_left() -> None:
    order = Order([("a", 64)], StreamConfig(batch_size=8, num_lanes=1, shuffle_window=16))
    rows = [order.sample(0, 0, number)[1] for number in range(64)]
    assert rows[:16] != sorted(rows[:16])
    assert sorted(rows[:16]) == list(range(16))


def test_an_error_of_the_reader_is_raised() -> None:
    def broken(path: str) -> list:
        raise InputError(f"broken {path}")

    with pytest.raises(InputError, match="broken"):
        list(Stream(FILES, broken, CONFIG).batches(0, 3, list))


def test_messages() -> None:
    with pytest.raises(ValueError, match="num_lanes must divide batch_size 12, was 8; the largest that does is 6"):
        StreamConfig(batch_size=12, num_lanes=8)
    with pytest.raises(InputError, match="expected a number of workers that divides num_lanes 8, found 3"):
        Stream(FILES, read, CONFIG, world_size=3)
    with pytest.raises(InputError, match="expected at least one batch of 128 samples, the data has 100"):
        Stream(FILES, read, StreamConfig(batch_size=128))


def test_permutations_are_pinned() -> None:
    """Their values are part of every fingerprinted result."""
    assert permutation(8, 1, 2).tolist() == [6, 5, 1, 7, 3, 0, 4, 2]
    assert mix(1, 2, 3) == 15205877802699428709
    assert sorted(permutation(1000, 5).tolist()) == list(range(1000))
