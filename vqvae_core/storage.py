"""Folders, local or on S3, behind one small value. Every file is complete before its final name exists.

Local: a temporary name in the same folder, fsync, rename. S3: one put of a finished buffer (an S3 stream that is
dropped half-way still publishes what it got, so streams are never used for output).
"""

import contextlib
import errno
import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pyarrow as pa
from pyarrow import fs

from vqvae_core.errors import InputError


class StorageError(InputError):
    """A folder cannot be reached, read or written."""


def check_name(name: str) -> str:
    """The relative path of a file in a folder. Raises `StorageError` for anything that could leave the folder."""
    parts = PurePosixPath(name).parts
    if not name or name.startswith("/") or "\\" in name or "\0" in name or any(part in ("..", ".") for part in parts):
        raise StorageError(f"expected a relative file name inside the folder, found {name!r}")
    return name


@dataclass(frozen=True)
class Folder:
    """A folder by its URI: an absolute local path or `s3://bucket/prefix`. Nothing is touched until it is used."""

    uri: str

    @classmethod
    def of(cls, location: str | os.PathLike[str]) -> "Folder":
        """The folder at a path or URI; relative local paths become absolute, since workers have other folders."""
        text = os.fspath(location)
        if text.startswith("s3://"):
            return cls(text.rstrip("/"))
        if "://" in text:
            raise StorageError(f"expected a local path or s3://bucket/prefix, found {text!r}")
        return cls(str(Path(text).expanduser().absolute()))

    @property
    def is_local(self) -> bool:
        return not self.uri.startswith("s3://")

    @property
    def name(self) -> str:
        return self.uri.rsplit("/", 1)[-1]

    def __truediv__(self, name: str) -> "Folder":
        return Folder(f"{self.uri}/{check_name(name)}")

    def path(self, name: str) -> str:
        """The full path or URI of a file in the folder."""
        return f"{self.uri}/{check_name(name)}"

    def _s3(self, name: str) -> tuple[fs.FileSystem, str]:
        # from_uri honours AWS_ENDPOINT_URL; the S3FileSystem constructor does not.
        return fs.FileSystem.from_uri(self.path(name))

    def size(self, name: str) -> int | None:
        """Bytes of a file, or None where there is no such file."""
        if self.is_local:
            try:
                return Path(self.path(name)).stat().st_size
            except (FileNotFoundError, NotADirectoryError):
                return None
        system, path = self._s3(name)
        info = system.get_file_info(path)
        return info.size if info.type == fs.FileType.File else None

    def exists(self, name: str) -> bool:
        return self.size(name) is not None

    def open(self, name: str) -> pa.NativeFile:
        """A random-access file to read from. Raises FileNotFoundError."""
        if self.is_local:
            return pa.OSFile(self.path(name))
        system, path = self._s3(name)
        return system.open_input_file(path)

    def read(self, name: str) -> bytes:
        """A whole file. Raises FileNotFoundError."""
        with self.open(name) as file:
            return file.read()

    def write(self, name: str, data: bytes) -> None:
        """Write a file in one step: it has its final name only when it is complete and on disk."""
        if not self.is_local:
            system, path = self._s3(name)
            with system.open_output_stream(path) as file:
                file.write(data)
            return
        path = Path(self.path(name))
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise _explain(error, path.parent, len(data)) from error

    def delete(self, name: str) -> None:
        """Delete a file; one that is not there is fine."""
        if self.is_local:
            Path(self.path(name)).unlink(missing_ok=True)
            return
        system, path = self._s3(name)
        if system.get_file_info(path).type == fs.FileType.File:
            system.delete_file(path)

    def delete_folder(self, name: str) -> None:
        """Delete a folder in this folder with all that is in it; one that is not there is fine."""
        if self.is_local:
            shutil.rmtree(self.path(name), ignore_errors=True)
            return
        system, path = self._s3(name)
        if system.get_file_info(path).type != fs.FileType.NotFound:
            system.delete_dir(path)

    def free_bytes(self) -> int | None:
        """Free space for a local folder (of the nearest parent that exists), None for S3."""
        if not self.is_local:
            return None
        place = Path(self.uri)
        while not place.exists():
            place = place.parent
        return shutil.disk_usage(place).free

    def check_writable(self) -> None:
        """Write and delete a small file. Raises `StorageError` with the reason and the way out."""
        name = f".writable-{uuid.uuid4().hex[:8]}"
        try:
            self.write(name, b"")
            self.delete(name)
        except StorageError:
            raise
        except (OSError, pa.ArrowException) as error:
            raise StorageError(
                f"expected a folder that can be written at {self.uri}, but: {str(error).splitlines()[0]}; "
                "choose another --root or fix its permissions"
            ) from error


def _explain(error: OSError, folder: Path, num_bytes: int) -> OSError | StorageError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(
            f"no space left in {folder}: {num_bytes} more bytes were needed; free some space and run the same "
            "command again, what is finished is kept"
        )
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
        return StorageError(
            f"expected a folder that can be written at {folder}, but: {error.strerror}; "
            "choose another --root or fix its permissions"
        )
    return error
