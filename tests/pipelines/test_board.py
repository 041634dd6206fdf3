"""What workers and driver tell each other, on a store in memory and on Ray's."""

from collections.abc import Iterator

import pytest

from pipelines import board as boards
from pipelines.board import Board


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], str]:
    values: dict[tuple[str, str], str] = {}

    def put(self: Board, key: str, value: str, *, overwrite: bool = True) -> None:
        if overwrite or (self.name, key) not in values:
            values[self.name, key] = value

    monkeypatch.setattr(Board, "_put", put)
    monkeypatch.setattr(Board, "_get", lambda self, key: values.get((self.name, key)))
    monkeypatch.setattr(Board, "_delete", lambda self, key: values.pop((self.name, key), None))
    monkeypatch.setattr(
        Board, "_keys",
        lambda self, prefix: sorted(key for name, key in values if name == self.name and key.startswith(prefix)),
    )  # fmt: skip
    return values


@pytest.fixture
def rays() -> Iterator[None]:
    import ray

    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def all_of_it() -> None:
    board, other = Board(), Board()
    worker = Board(board.name)
    worker.post("metrics", 10, {"loss": 0.1})
    worker.post("pictures", 10, {"grid.png": b"\x89PNG"})
    worker.post("line", 0, "said")
    assert other.take_posts() == []
    assert board.take_posts() == [
        ("metrics", 10, {"loss": 0.1}), ("pictures", 10, {"grid.png": b"\x89PNG"}), ("line", 0, "said")
    ]  # fmt: skip
    assert board.take_posts() == []

    assert board.failure() is None
    worker.fail("InputError", "the first")
    worker.fail("InputError", "another rank's")
    assert board.failure() == ("InputError", "the first")

    assert worker.take_asked() == ""
    board.ask("save")
    assert worker.take_asked() == "save"
    assert worker.take_asked() == "", "a save is taken once"
    board.ask("save")
    board.ask("stop")
    assert [worker.take_asked() for _ in range(3)] == ["stop"] * 3

    worker.join("node-1")
    worker.join("node-2")
    assert board.nodes() == {"node-1", "node-2"}
    assert (other.failure(), other.take_asked(), other.nodes()) == (None, "", set())

    board.close()
    assert (board.failure(), board.take_asked(), board.nodes(), board.take_posts()) == (None, "", set(), [])


def test_a_board(store: dict[tuple[str, str], str]) -> None:
    all_of_it()
    assert store == {}


def test_posts_come_in_the_order_of_their_time(store: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([9, 10, 1_000])
    monkeypatch.setattr(boards.time, "time_ns", lambda: next(times))
    board = Board()
    for step in range(3):
        board.post("metrics", step, {})
    assert [step for _, step, _ in board.take_posts()] == [0, 1, 2]


@pytest.mark.slow
@pytest.mark.usefixtures("rays")
def test_a_board_in_rays_store() -> None:
    all_of_it()
