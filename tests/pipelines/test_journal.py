"""Nothing told is lost, doubled or sent out of order, whatever the store does; and telling never waits."""

import json
import threading
from pathlib import Path

import pytest

from pipelines.journal import Journal, RefusedError
from vqvae_core.storage import Folder


class Store:
    """A store that can be down."""

    def __init__(self) -> None:
        self.took: list[int] = []
        self.up = threading.Event()
        self.asked = threading.Event()

    def send(self, entry: dict) -> None:
        self.asked.set()
        if not self.up.is_set():
            raise ConnectionError("refused\nin detail")
        if entry["n"] < 0:
            raise RefusedError("no such run")
        self.took.append(entry["n"])


@pytest.fixture
def said() -> list[str]:
    return []


def journal(store: Store, place: Path, said: list[str]) -> Journal:
    return Journal(store.send, Folder.of(place), say=said.append, first_pause=0.01)


def test_entries_come_in_order_and_leave_no_file(tmp_path: Path, said: list[str]) -> None:
    store = Store()
    store.up.set()
    found = journal(store, tmp_path, said)
    for number in range(50):
        found.put({"n": number})
    assert found.close(10) == 0
    assert store.took == list(range(50)) and said == [] and list((tmp_path / "tracking").glob("*")) == []


def test_a_store_that_is_down_for_a_while(tmp_path: Path, said: list[str]) -> None:
    store = Store()
    found = journal(store, tmp_path, said)
    found.put({"n": 0})
    assert store.asked.wait(10)
    for number in range(1, 20):
        found.put({"n": number})
    assert not found.wait(0.05) and store.took == []
    store.up.set()
    assert found.wait(10)
    assert store.took == list(range(20))
    assert found.close(1) == 0 and list((tmp_path / "tracking").glob("*")) == []
    assert said[0] == "tracking: the store does not answer (refused); what is logged waits, and is sent later"
    assert said[1].startswith("tracking: the store answers again") and len(said) == 2


def test_telling_does_not_wait_for_a_store_that_hangs(tmp_path: Path, said: list[str]) -> None:
    go, entered = threading.Event(), threading.Event()

    def send(entry: dict) -> None:
        entered.set()
        assert go.wait(30)

    found = Journal(send, Folder.of(tmp_path), say=said.append)
    found.put({"n": 0})
    assert entered.wait(10)
    for number in range(1000):
        found.put({"n": number})  # a put that waited would never come back
    go.set()
    assert found.close(10) == 0


def test_what_waits_is_sent_by_the_next_one(tmp_path: Path, said: list[str]) -> None:
    store = Store()
    first = journal(store, tmp_path, said)
    for number in range(5):
        first.put({"n": number})
    assert first.close(0.05) == 5
    assert len(list((tmp_path / "tracking").glob("*"))) == 1
    store.up.set()
    second = journal(store, tmp_path, said)
    second.put({"n": 5})
    assert second.close(10) == 0
    assert store.took == [0, 1, 2, 3, 4, 5]
    assert list((tmp_path / "tracking").glob("*")) == []


def test_a_kill_while_the_store_is_down_loses_nothing_that_was_kept(tmp_path: Path, said: list[str]) -> None:
    """The file is written while it waits, not only at the end."""
    store = Store()
    first = journal(store, tmp_path, said)
    first.put({"n": 7})
    assert store.asked.wait(10)
    for _ in range(500):
        if list((tmp_path / "tracking").glob("waiting-*.json")):
            break
        threading.Event().wait(0.01)
    store.up.set()  # nothing of `first` is closed: it could as well be dead
    assert first.wait(10)
    (tmp_path / "tracking" / "waiting-1.json").write_text('[{"n": 7}]')  # as a kill before the deletion leaves it
    assert journal(store, tmp_path, said).close(10) == 0
    assert store.took == [7, 7]  # twice, which does no harm: a metric has its step and its time


def test_an_entry_that_is_refused_does_not_hold_up_the_others(tmp_path: Path, said: list[str]) -> None:
    store = Store()
    store.up.set()
    found = journal(store, tmp_path, said)
    for number in (1, -1, 2):
        found.put({"n": number})
    assert found.close(10) == 0
    assert store.took == [1, 2] and said == ["tracking: left out, since the store refuses it: no such run"]


@pytest.mark.parametrize("text", ["{", '{"n": 1}', "[1]"])
def test_a_broken_file_is_told(tmp_path: Path, said: list[str], text: str) -> None:
    (tmp_path / "tracking").mkdir()
    (tmp_path / "tracking" / "waiting-1.json").write_text(text)
    store = Store()
    store.up.set()
    found = journal(store, tmp_path, said)
    found.put({"n": 1})
    assert found.close(10) == 0
    assert store.took == [1] and "is not a list of entries; it is left out" in said[0]


def test_what_waits_is_kept_once_however_often_it_is_kept(tmp_path: Path, said: list[str]) -> None:
    """A root whose store is down for many runs has one file, with what all of them told."""
    store = Store()
    for number in range(5):
        found = journal(store, tmp_path, said)
        found.put({"n": number})
        assert found.close(0.05) == number + 1
    (kept,) = (tmp_path / "tracking").glob("*")
    assert json.loads(kept.read_text()) == [{"n": number} for number in range(5)]
