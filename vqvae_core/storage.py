"""Folders, local or on S3, behind one small value. Every file is complete before its final name exists.

Local: a temporary name in the same folder, fsync, rename. S3: one put of a finished buffer (an S3 stream that is
dropped half-way still publishes what it got, so streams are never used for output).
"""

import contextlib
import errno
import functools
import logging
import os
import random
import re
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar

import pyarrow as pa
from pyarrow import fs

from vqvae_core.errors import InputError

_log = logging.getLogger(__name__)
A = TypeVar("A")
T = TypeVar("T")
_ATTEMPTS = 6  # of one request, over about 6 seconds, beside the 6 seconds of each that the S3 client takes itself
_OUTAGE_SECONDS, _LONGEST_PAUSE = 180.0, 5.0  # how long a store may be away
# Codes of curl: no connection, none in time, no answer, broken off as it is written or read. Not: no such host, a
# certificate that is no good.
_OUTAGE = re.compile(
    r"HTTP status 50[0234]|curlCode: (7|28|52|55|56)\b|"
    r"\b(SLOW_DOWN|THROTTLING|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|REQUEST_TIMEOUT)\b"
)
_REQUESTS = 32  # in flight, where many small ones are made
_LARGE_BYTES = 1 << 20


class StorageError(InputError):
    """A folder cannot be reached, read or written."""


def retry(action: Callable[[], T], attempts: int = _ATTEMPTS) -> T:
    """Do something over the network, again after a growing pause where it fails. Raises the last error.

    That a file or a bucket is not there, or may not be read, is an answer: it is raised at once. A store that is away
    or too busy is waited for, for three minutes, with a warning; attempts: how often anything else may fail.
    """
    begin, failures, away = time.monotonic(), 0, 0
    while True:
        try:
            return action()
        except (FileNotFoundError, PermissionError):
            raise
        except (OSError, pa.ArrowException) as error:
            if _is_answer(error):
                raise
            if is_outage(error):
                away += 1
                if time.monotonic() - begin > _OUTAGE_SECONDS:
                    raise
                if away == _ATTEMPTS:
                    _log.warning("the store does not answer, it is asked again for %d s: %s", _OUTAGE_SECONDS, error)
            else:
                failures += 1
                if failures == attempts:
                    raise
            pause = min(_LONGEST_PAUSE, 0.2 * 2 ** (failures + away - 1))
            time.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311  no secret


def _give_pages_back(file: int, num_bytes: int) -> None:
    """Of a large file that is on disk: they serve the next one, where a whole data set would push its own source out of
    memory. A hint, which no write fails for."""
    if num_bytes >= _LARGE_BYTES and hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)


def is_outage(error: BaseException) -> bool:
    """The store was away or too busy: its error, or one that quotes it."""
    return _OUTAGE.search(str(error)) is not None


def _is_answer(error: BaseException) -> bool:
    text = str(error)
    return any(word in text for word in ("ACCESS_DENIED", "NO_SUCH_BUCKET", "INVALID_ACCESS_KEY", "SIGNATURE_DOES_NOT"))


def concurrently(action: Callable[[A], T], values: Sequence[A], folder: "Folder") -> list[T]:
    """action(value) of each, in order: with many requests in flight where the folder is on S3."""
    if folder.is_local:
        return [action(value) for value in values]
    with ThreadPoolExecutor(_REQUESTS) as pool:
        return list(pool.map(action, values))


@functools.lru_cache(maxsize=16)
def _file_system(bucket: str, *environment: str | None) -> fs.FileSystem:
    # from_uri honours AWS_ENDPOINT_URL; the S3FileSystem constructor does not. Opening late makes a small file one
    # request, not the three of an upload in parts.
    return fs.FileSystem.from_uri(f"s3://{bucket}?allow_delayed_open=true")[0]


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
            if "@" in text[5:].partition("/")[0]:  # it would be in manifests, logs and messages; not quoted here either
                raise StorageError(
                    "expected s3://bucket/prefix, found one with an @ before the prefix; keys are given by "
                    "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile by AWS_PROFILE, not in an address"
                )
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

    @property
    def s3(self) -> tuple[fs.FileSystem, str]:
        """The file system of an S3 folder, and the folder's path in it."""
        path = self.uri.removeprefix("s3://")
        names = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_REGION")
        return _file_system(path.split("/")[0], *(os.environ.get(name) for name in names)), path

    def _s3(self, name: str) -> tuple[fs.FileSystem, str]:
        system, path = self.s3
        return system, f"{path}/{check_name(name)}"

    def size(self, name: str) -> int | None:
        """Bytes of a file, or None where there is no such file."""
        if self.is_local:
            try:
                return Path(self.path(name)).stat().st_size
            except (FileNotFoundError, NotADirectoryError):
                return None
        system, path = self._s3(name)
        info = retry(lambda: system.get_file_info(path))
        return info.size if info.type == fs.FileType.File else None

    def sizes(self, names: Sequence[str]) -> list[int | None]:
        """`size` of many files, with many requests in flight where each is one."""
        return concurrently(self.size, names, self)

    def exists(self, name: str) -> bool:
        return self.size(name) is not None

    def open(self, name: str) -> pa.NativeFile:
        """A random-access file to read from. Raises FileNotFoundError."""
        return self._open(name) if self.is_local else retry(lambda: self._open(name))

    def _open(self, name: str) -> pa.NativeFile:
        if self.is_local:
            return pa.OSFile(self.path(name))
        system, path = self._s3(name)
        return system.open_input_file(path)

    def open_unchecked(self, name: str) -> pa.NativeFile:
        """`open` for a file that somebody else named, on S3, where no name leads out of a bucket."""
        system, path = self.s3
        return system.open_input_file(f"{path}/{name}")

    def read(self, name: str, offset: int = 0, num_bytes: int | None = None) -> bytes:
        """A file, or num_bytes of it from an offset. Raises FileNotFoundError, OSError where fewer bytes come."""
        return (
            self._read(name, offset, num_bytes) if self.is_local else retry(lambda: self._read(name, offset, num_bytes))
        )

    def _read(self, name: str, offset: int, num_bytes: int | None) -> bytes:
        with self._open(name) as file:
            expected = file.size() - offset if num_bytes is None else num_bytes
            data = file.read_at(expected, offset)
        if len(data) != expected:
            raise OSError(f"{len(data)} of {expected} bytes of {self.path(name)} came")
        return data

    def write(self, name: str, data: bytes) -> None:
        """Write a file in one step: it has its final name only when it is complete and on disk."""
        if not self.is_local:
            retry(lambda: self._put(name, data))
            return
        path = Path(self.path(name))
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                _give_pages_back(file.fileno(), len(data))
            temporary.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise _explain(error, path.parent, len(data)) from error

    def _put(self, name: str, data: bytes) -> None:
        system, path = self._s3(name)
        # No compression by the name's ending, which is the default. A buffer as large as the data: one request, and the
        # file is there as a whole or not at all.
        with system.open_output_stream(path, compression=None, buffer_size=len(data)) as file:
            file.write(data)

    def folders(self) -> list[str]:
        """Names of the folders in this folder, for whoever writes them."""
        if self.is_local:
            try:
                with os.scandir(self.uri) as entries:
                    return sorted(entry.name for entry in entries if entry.is_dir())
            except (FileNotFoundError, NotADirectoryError):
                return []
        system, path = self.s3
        found = retry(lambda: system.get_file_info(fs.FileSelector(path, allow_not_found=True)))
        return sorted(info.base_name for info in found if info.type == fs.FileType.Directory)

    def list(self, name: str) -> list[str]:
        """Names of the files in a folder of this folder, for whoever writes it: readers go by a manifest."""
        if self.is_local:
            try:
                with os.scandir(self.path(name)) as entries:
                    return sorted(entry.name for entry in entries if entry.is_file())
            except (FileNotFoundError, NotADirectoryError):
                return []
        system, path = self._s3(name)
        found = retry(lambda: system.get_file_info(fs.FileSelector(path, allow_not_found=True)))
        return sorted(info.base_name for info in found if info.type == fs.FileType.File)

    def delete(self, name: str) -> None:
        """Delete a file; one that is not there is fine."""
        if self.is_local:
            Path(self.path(name)).unlink(missing_ok=True)
            return
        system, path = self._s3(name)
        if self.exists(name):
            retry(lambda: system.delete_file(path))

    def delete_folder(self, name: str) -> None:
        """Delete a folder in this folder with all that is in it; one that is not there is fine."""
        if self.is_local:
            shutil.rmtree(self.path(name), ignore_errors=True)
            return
        system, path = self._s3(name)
        if retry(lambda: system.get_file_info(path)).type != fs.FileType.NotFound:
            retry(lambda: system.delete_dir(path))

    def sweep(self) -> None:
        """Delete what a writer that was killed left behind: unfinished files, none of which has a final name."""
        if self.is_local:
            for path in Path(self.uri).glob("**/.*.tmp"):
                path.unlink(missing_ok=True)

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
