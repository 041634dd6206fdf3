import errno
import os
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
