"""The files of a source, local or on S3: listed by name and size, opened by name, read in ranges with read-ahead."""

import functools
import io
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs

from pipelines.sources.base import SourceError
from vqvae_core.storage import Folder, StorageError, retry

_REQUESTS = 16  # in flight for one task on S3, where a read is all waiting
_BLOCK_BYTES = 2048  # a tar header with a small file behind it


def place_of(location: str | None, what: str) -> Folder:
    """The folder of a source. Raises `SourceError` where none was given."""
    if location is None:
        raise SourceError(f"expected the place of {what}, none was given; name it with --source PATH")
    return Folder.of(location)


def list_files(location: str | None, extensions: str | tuple[str, ...], what: str) -> list[tuple[str, int]]:
    """(name relative to the location, bytes) of its files with an extension, by name; those with a dot first not.

    Upper and lower case of the extension are the same. Raises `SourceError`.
    """
    folder = place_of(location, what)
    endings = (extensions,) if isinstance(extensions, str) else extensions
    try:
        found = sorted(_walk(folder, what))
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise SourceError(f"expected to read {what} at {folder.uri}, but: {reason}; check its permissions") from error
    files = [(name, size) for name, size in found if name.lower().endswith(endings) and not _is_hidden(name)]
    if not files:
        looked_for = ", ".join(f"*{ending}" for ending in endings)
        raise SourceError(f"expected {what} at {folder.uri}, found no {looked_for} there; name it with --source PATH")
    return files


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _walk(folder: Folder, what: str) -> Iterator[tuple[str, int]]:
    if not folder.is_local:
        system, root = folder.s3
        selector = fs.FileSelector(root, recursive=True, allow_not_found=True)
        for info in retry(lambda: system.get_file_info(selector)):
            if info.type == fs.FileType.File:
                yield info.path[len(root) + 1 :], info.size
        return
    if not Path(folder.uri).is_dir():
        raise SourceError(f"expected {what} at {folder.uri}, found no such folder; name it with --source PATH")
    seen = set()  # links to folders are followed, a loop is not
    for place, folders, names in os.walk(folder.uri, followlinks=True, onerror=_raise):
        seen.add(Path(place).resolve())
        folders[:] = sorted(name for name in folders if (Path(place) / name).resolve() not in seen)
        for name in names:
            path = Path(place) / name
            if path.is_file():
                yield path.relative_to(folder.uri).as_posix(), path.stat().st_size
            elif path.is_symlink() and not path.exists():  # its image is missing: it will be rejected, not forgotten
                yield path.relative_to(folder.uri).as_posix(), 0


def _raise(error: OSError) -> None:
    raise error


def open_source(folder: Folder, name: str) -> "SourceFile":
    """A file of a source, to be read at random. Raises `SourceError`."""
    try:
        return SourceFile(folder, name)
    except (OSError, pa.ArrowException, StorageError) as error:
        raise unreadable(folder, name, error) from error


def unreadable(folder: Folder, name: str, error: BaseException) -> SourceError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return SourceError(
        f"expected to read {folder.uri}/{name}, but: {reason}; restore it or check its permissions and the connection"
    )


@functools.lru_cache(maxsize=64)
def _opened(folder: Folder, name: str) -> pa.NativeFile:
    """A file on S3. Opening one is a request, and a shard takes from hundreds of runs of one archive."""
    return retry(lambda: folder.open_unchecked(name))


def forget_files() -> None:
    """Open files of a source anew from here on: it may have changed since an earlier job."""
    _opened.cache_clear()


class _Positioned(io.RawIOBase):
    """A readable stretch of `_size` bytes with a position."""

    _size: int
    _position: int = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position


class SourceFile(_Positioned):
    """A file that is read at random, local or on S3. On S3 a read that fails or comes short is tried again."""

    def __init__(self, folder: Folder, name: str) -> None:
        super().__init__()
        self.place = f"{folder.uri}/{name}"
        self._file: pa.NativeFile | None = None
        self._local = -1
        if folder.is_local:
            self._local = os.open(os.fsencode(f"{folder.uri}/{name}"), os.O_RDONLY)  # names that are no UTF-8 too
            self._size = os.fstat(self._local).st_size
        else:
            file = _opened(folder, name)
            self._file, self._size = file, file.size()

    def size(self) -> int:
        return self._size

    def read(self, size: int = -1) -> bytes:
        stop = self._size if size is None or size < 0 else min(self._size, self._position + size)
        data = self.read_at(self._position, max(0, stop - self._position))
        self._position += len(data)
        return data

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def read_at(self, offset: int, num_bytes: int) -> bytes:
        """num_bytes from offset, fewer only at the end of the file. Raises OSError."""
        expected = max(0, min(num_bytes, self._size - offset))
        if not expected:
            return b""
        if self._file is None:
            data = os.pread(self._local, expected, offset)
            while 0 < len(data) < expected and (
                more := os.pread(self._local, expected - len(data), offset + len(data))
            ):
                data += more  # one call reads 2 GiB at most
            return data
        return retry(lambda: self._complete(self._file, expected, offset))

    def _complete(self, file: Any, num_bytes: int, offset: int) -> bytes:
        data = file.read_at(num_bytes, offset)
        if len(data) != num_bytes:
            raise OSError(f"{len(data)} of {num_bytes} bytes came")
        return data

    def close(self) -> None:
        if self._local >= 0:
            os.close(self._local)
            self._local = -1
        super().close()


class Window(_Positioned):
    """A stretch of a file as a file of its own, read in blocks, so that a header and what follows are one request."""

    def __init__(self, file: SourceFile, start: int, size: int) -> None:
        super().__init__()
        self._file, self._start, self._size = file, start, size
        self._block, self._block_start = b"", 0

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self._position)
        count = left if size is None or size < 0 else min(size, left)
        within = self._position - self._block_start
        if not 0 <= within <= len(self._block) - count:
            stretch = min(left, max(count, _BLOCK_BYTES))
            self._block, self._block_start = self._file.read_at(self._start + self._position, stretch), self._position
            within = 0
        data = self._block[within : within + count]
        self._position += len(data)
        return data


def read_ranges(file: SourceFile, ranges: Sequence[tuple[int, int]], *, ahead: bool) -> Iterator[bytes]:
    """The bytes of each (offset, size), in order; ahead: with several requests in flight."""
    yield from _in_order([lambda o=offset, n=size: file.read_at(o, n) for offset, size in ranges], ahead)


def read_files(folder: Folder, names: Sequence[str]) -> Iterator[bytes | OSError]:
    """The bytes of each file, in order, or the error in its place where the file is not there or may not be read."""
    yield from _in_order([lambda n=name: _whole(folder, n) for name in names], not folder.is_local)


def _whole(folder: Folder, name: str) -> bytes | OSError:
    try:
        with SourceFile(folder, name) as file:
            return file.read()
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        return error  # an answer about this file; anything else may pass, and must not become a rejection


def _in_order(reads: Sequence, ahead: bool) -> Iterator:  # type: ignore[type-arg]
    if not ahead:
        for read in reads:
            yield read()
        return
    with ThreadPoolExecutor(_REQUESTS) as pool:
        waiting = deque(pool.submit(read) for read in reads[:_REQUESTS])
        for read in reads[_REQUESTS:]:
            yield waiting.popleft().result()
            waiting.append(pool.submit(read))
        while waiting:
            yield waiting.popleft().result()
