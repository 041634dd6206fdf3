import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from vqvae_core import storage
from vqvae_core.storage import Folder, StorageError


def test_round_trip(tmp_path: Path) -> None:
    folder = Folder.of(tmp_path) / "a"
    assert folder.size("b/c.txt") is None
    folder.write("b/c.txt", b"hello")
    assert folder.read("b/c.txt") == b"hello"
    assert folder.size("b/c.txt") == 5
    folder.write("b/c.txt", b"again")
    assert folder.read("b/c.txt") == b"again"
    folder.delete("b/c.txt")
    folder.delete("b/c.txt")
    assert not folder.exists("b/c.txt")


def test_relative_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Folder.of("runs/x").uri == str(tmp_path / "runs" / "x")


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../b", "", "a\\b", "a\0b"])
def test_a_name_cannot_leave_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(StorageError, match="expected a relative file name"):
        Folder.of(tmp_path).write(name, b"")


def test_an_interrupted_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder.of(tmp_path)
    folder.write("x", b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(storage.os, "fsync", full)
    with pytest.raises(StorageError, match=r"no space left in .*: 3 more bytes were needed; free some space"):
        folder.write("x", b"new")
    assert folder.read("x") == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_root_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="expected a folder that can be written at"):
        Folder.of(tmp_path / "file" / "root").check_writable()


def test_other_schemes_are_refused() -> None:
    with pytest.raises(StorageError, match="expected a local path or s3://bucket/prefix, found 'gs://x'"):
        Folder.of("gs://x")


@pytest.mark.slow
def test_s3(s3_bucket: str) -> None:
    folder = Folder.of(f"{s3_bucket}/prefix")
    folder.check_writable()
    assert folder.size("a/b") is None
    folder.write("a/b", b"0123456789")
    assert folder.size("a/b") == 10
    with folder.open("a/b") as file:
        file.seek(4)
        assert file.read(3) == b"456"
    with pytest.raises(FileNotFoundError):
        folder.read("a/c")
    folder.delete("a/b")
    assert not folder.exists("a/b")


def test_no_ending_makes_a_store_compress(s3_bucket: str) -> None:
    folder = Folder.of(f"{s3_bucket}/endings")
    for name in ("x.gz", "x.bz2", "x.zst", "x.tar"):
        folder.write(name, b"as it is" * 100)
        assert folder.read(name) == b"as it is" * 100
        assert folder.size(name) == 800
        assert folder.read(name, 8, 16) == b"as it isas it is"


def failing(*failures: OSError) -> Callable[[], str]:
    """What fails in these ways, one after the other, before it is done."""
    left = list(failures)

    def action() -> str:
        if left:
            raise left.pop(0)
        return "done"

    return action


def test_a_request_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: None)
    assert storage.retry(failing(OSError("reset"), OSError("503"))) == "done"
    with pytest.raises(OSError, match="always"):
        storage.retry(lambda: (_ for _ in ()).throw(OSError("always")), attempts=3)
    tries = []
    with pytest.raises(FileNotFoundError):
        storage.retry(lambda: tries.append(1) or (_ for _ in ()).throw(FileNotFoundError()))
    assert len(tries) == 1, "that it is not there is an answer"


@pytest.mark.parametrize(
    ("seconds", "survives"), [pytest.param(100, True, id="a minute and more"), pytest.param(1000, False, id="for good")]
)
def test_a_store_that_is_away(seconds: float, survives: bool, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    """Each request fails at once, and a clock that only pauses advance."""
    now = [0.0]
    monkeypatch.setattr(storage.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(storage.time, "sleep", lambda pause: now.__setitem__(0, now[0] + pause))

    def action() -> str:
        if now[0] < seconds:
            raise OSError("When getting information for key 'k': AWS Error UNKNOWN (HTTP status 503) during HeadObject")
        return "done"

    if survives:
        assert storage.retry(action) == "done"
    else:
        with pytest.raises(OSError, match="503"):
            storage.retry(action)
        assert 180 <= now[0] < 190
    assert [record.message[:42] for record in caplog.records] == ["the store does not answer, it is asked aga"]


def test_other_failures_are_counted_apart_from_an_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.time, "sleep", lambda pause: None)
    away = [OSError("HTTP status 503")] * 20
    assert storage.retry(failing(*away, OSError("5 of 10 bytes came"))) == "done"
    for text in ("HTTP status 501", "NETWORK_CONNECTION: curlCode: 60, no such certificate", "no such thing"):
        tries: list[int] = []
        with pytest.raises(OSError, match=text):
            storage.retry(lambda text=text, tries=tries: tries.append(1) or (_ for _ in ()).throw(OSError(text)))
        assert len(tries) == 6


def test_a_read_waits_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is opened and read in one request of three minutes' patience."""
    now = [0.0]
    monkeypatch.setattr(storage.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(storage.time, "sleep", lambda pause: now.__setitem__(0, now[0] + pause))

    def refused(self: Folder, name: str) -> None:
        raise OSError("AWS Error SLOW_DOWN during GetObject")

    monkeypatch.setattr(Folder, "_open", refused)
    with pytest.raises(OSError, match="SLOW_DOWN"):
        Folder("s3://bucket").read("name")
    assert 180 <= now[0] < 190


def test_leftovers_of_a_killed_writer_are_swept(tmp_path: Path) -> None:
    folder = Folder.of(tmp_path)
    folder.write("a/b", b"x")
    (tmp_path / "a" / ".b.12345678.tmp").write_bytes(b"half")
    folder.sweep()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    Folder.of(tmp_path / "nothing").sweep()


def test_listing(tmp_path: Path, s3_bucket: str) -> None:
    for folder in (Folder.of(tmp_path), Folder.of(f"{s3_bucket}/listing")):
        assert folder.list("sidecars") == []
        for name in ("sidecars/b", "sidecars/a", "sidecars/deeper/c"):
            folder.write(name, b"x")
        assert folder.list("sidecars") == ["a", "b"]
        assert (folder / "sidecars").folders() == ["deeper"]
        assert (folder / "nothing").folders() == []
        assert folder.sizes(["sidecars/a", "sidecars/z"]) == [1, None]
