"""The files of a source, local or on S3: listed by name and size, opened by name, read in ranges with read-ahead."""

import contextlib
import errno
import functools
import hashlib
import io
import itertools
import os
import stat
import tarfile
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
from pyarrow import fs

from pipelines.sources.base import SourceError, readable
from vqvae_core.artifacts import hash_json
from vqvae_core.storage import Folder, StorageError, concurrently, retry

T = TypeVar("T")
_REQUESTS = 16  # in flight for one task on S3, where a read is all waiting
_BLOCK_BYTES = 2048  # on S3: a tar header with a small file behind it
_HEADER_BYTES = tarfile.BLOCKSIZE + 1  # the library reads the byte before a header, then the header
_HASHED_BYTES = 1 << 24  # at a time
_MAX_TOLD = 128  # files of `will_read` that are open
_LISTINGS = 32  # folders on S3 that are listed at the same time


def place_of(location: str | None, what: str) -> Folder:
    """The folder of a source. Raises `SourceError` where none was given."""
    if location is None:
        raise SourceError(f"expected the place of {what}, none was given; name it with --source PATH")
    return Folder.of(location)


@dataclass(frozen=True)
class FolderSummary:
    """A folder of a source as the driver keeps it, without the folders below it. folder: relative to the source, "" for
    the source itself. num_files: of those that are wanted; digest: of their names and sizes. ignored: how many others,
    by extension."""

    folder: str
    num_files: int
    digest: str
    ignored: Counter[str] = field(default_factory=Counter)


@dataclass
class _Digest:
    """A hash of (name, size) pairs whatever their order, so that they need not be kept and sorted."""

    count: int = 0
    total: int = 0

    def add(self, name: str, size: int) -> None:
        self.count += 1
        self.total = (self.total + int(hash_json([readable(name), size]), 16)) % (1 << 256)

    @property
    def text(self) -> str:
        return f"{self.count}-{self.total:064x}"


def list_files(location: str | None, extensions: str | tuple[str, ...], what: str) -> list[tuple[str, int]]:
    """(name relative to the location, bytes) of its files with an extension, by name; those with a dot first not.

    Upper and lower case of the extension are the same. Raises `SourceError`.
    """
    endings = _endings(extensions)
    folder = place_of(location, what)
    files: list[tuple[str, int]] = []
    for _ in _walk(folder, endings, what, lambda place, name, size: files.append((_join(place, name), size))):
        pass
    if not files:
        raise _none_found(folder, endings, what)
    return sorted(files)


@functools.lru_cache(maxsize=4)
def list_folders(location: str | None, extensions: tuple[str, ...], what: str) -> tuple[FolderSummary, ...]:
    """Every folder of a source in which something lies, by name. Files are listed folder by folder and not kept, so
    that millions take no memory. Raises `SourceError` where no file has one of the extensions."""
    folder = place_of(location, what)
    found = [each for each in _walk(folder, extensions, what) if each.num_files or each.ignored]
    if not any(each.num_files for each in found):
        raise _none_found(folder, extensions, what)
    return tuple(sorted(found, key=lambda each: each.folder))


def list_folder(
    location: str | None, name: str, extensions: tuple[str, ...], what: str
) -> tuple[FolderSummary, list[tuple[str, int]]]:
    """One folder of a source, and (name, bytes) of its wanted files by name. Raises `SourceError`."""
    folder = place_of(location, what)
    files: list[tuple[str, int]] = []
    try:
        summary, _ = _list(folder, name, extensions, lambda _, file, size: files.append((file, size)))
    except (OSError, pa.ArrowException) as error:
        raise _unlisted(folder, what, error) from error
    return summary, sorted(files)


def identity_of(files: Sequence[tuple[str, int]]) -> dict[str, Any]:
    """What some files are, for a fingerprint: how many, and the hash of their names and sizes."""
    return {"num_files": len(files), "files": hash_json([[readable(name), size] for name, size in files])}


def _endings(extensions: str | tuple[str, ...]) -> tuple[str, ...]:
    return (extensions,) if isinstance(extensions, str) else extensions


def _none_found(folder: Folder, endings: tuple[str, ...], what: str) -> SourceError:
    looked_for = ", ".join(f"*{ending}" for ending in endings)
    return SourceError(
        f"expected {what} at {folder.uri}, found no {looked_for} there; name it with --source PATH, "
        "and what lies there with --source-kind"
    )


def _unlisted(folder: Folder, what: str, error: BaseException) -> SourceError:
    reason = str(error).splitlines()[0]
    return SourceError(f"expected to read {what} at {folder.uri}, but: {reason}; check its permissions")


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _walk(
    folder: Folder, endings: tuple[str, ...], what: str, keep: Callable[[str, str, int], None] = lambda *_: None
) -> Iterator[FolderSummary]:
    """All folders of a source, level by level. Links to folders are followed, but for one to a folder above it."""
    if folder.is_local and not Path(folder.uri).is_dir():
        raise SourceError(f"expected {what} at {folder.uri}, found no such folder; name it with --source PATH")
    level = [""]
    try:
        while level:
            below: list[str] = []
            for start in range(0, len(level), _LISTINGS):
                names = level[start : start + _LISTINGS]
                found = concurrently(lambda name: _list(folder, name, endings, keep), names, folder)
                for summary, folders in found:
                    yield summary
                    below += folders
            level = [name for name in sorted(below) if not _is_loop(folder, name)]
    except (OSError, pa.ArrowException) as error:
        raise _unlisted(folder, what, error) from error


def _is_loop(folder: Folder, name: str) -> bool:
    place = Path(folder.uri) / name
    if not folder.is_local or not place.is_symlink():
        return False
    above = place.parents[: name.count("/") + 1]
    return place.resolve() in {parent.resolve() for parent in above}


def _list(
    folder: Folder, name: str, endings: tuple[str, ...], keep: Callable[[str, str, int], None]
) -> tuple[FolderSummary, list[str]]:
    """(what lies in one folder, the folders in it), without what is hidden by a dot. keep(folder, name, bytes) is
    called for each wanted file."""
    digest, folders, ignored = _Digest(), [], Counter()
    for found, size in _entries(folder, name):
        if found.startswith("."):
            continue
        if size is None:
            folders.append(_join(name, found))
        elif found.lower().endswith(endings):
            digest.add(found, size)
            keep(name, found, size)
        else:
            ignored[extension_of(found)] += 1
    return FolderSummary(name, digest.count, digest.text, ignored), folders


def extension_of(name: str) -> str:
    """The extension of a file that is ignored, in lower case and with its dot, "none" where it has none."""
    dot, extension = name.rpartition("/")[2].rpartition(".")[1:]
    return readable(dot + extension.lower()) if dot else "none"


def _entries(folder: Folder, name: str) -> Iterator[tuple[str, int | None]]:
    """(name, bytes, None for a folder) of what lies in a folder, in no fixed order."""
    if not folder.is_local:
        system, root = folder.s3
        selector = fs.FileSelector(_join(root, name) if name else root, allow_not_found=True)
        for info in retry(lambda: system.get_file_info(selector)):
            yield info.base_name, info.size if info.type == fs.FileType.File else None
        return
    with os.scandir(_join(folder.uri, name) if name else folder.uri) as entries:
        for entry in entries:
            if _is(entry.is_dir):
                yield entry.name, None
            elif _is(entry.is_file):
                yield entry.name, entry.stat().st_size
            elif entry.is_symlink():  # to nothing: its image is missing, it will be rejected and not forgotten
                yield entry.name, 0


def _is(test: Callable[[], bool]) -> bool:
    try:
        return test()
    except OSError as error:
        if error.errno != errno.ELOOP:  # a link to itself is one to nothing
            raise
        return False


def open_source(folder: Folder, name: str) -> "SourceFile":
    """A file of a source, to be read at random. Raises `SourceError`."""
    try:
        return SourceFile(folder, name)
    except (OSError, pa.ArrowException, StorageError) as error:
        raise unreadable(folder, name, error) from error


@functools.lru_cache(maxsize=2)  # of training and validation images
def open_archive(folder: Folder, name: str) -> "SourceFile":
    """`open_source` of a file that is read run by run. It is shared, so nobody closes it but `forget_files`."""
    return open_source(folder, name)


def unreadable(folder: Folder, name: str, error: BaseException) -> SourceError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return SourceError(
        f"expected to read {folder.uri}/{name}, but: {reason}; restore it or check its permissions and the connection"
    )


class NoFileError(OSError):
    """What has the name of a file is none: a pipe, a device, a link to itself."""


class _Local:
    """An open file, closed when nobody has it any more."""

    def __init__(self, path: str) -> None:
        try:  # names that are no UTF-8 too; a pipe that nobody writes to is not waited for
            self.descriptor = os.open(os.fsencode(path), os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise NoFileError(errno.ELOOP, "a link to itself", path) from error
            raise
        if not stat.S_ISREG(os.fstat(self.descriptor).st_mode):
            raise NoFileError(errno.EINVAL, "it is no file", path)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


_told: dict[tuple[Folder, str], _Local] = {}  # files of `will_read`: kept open for what reads them


def will_read(folder: Folder, name: str, offset: int, num_bytes: int) -> None:
    """A stretch of a file is read soon: a local disk may begin with it now. A hint, which nothing fails for: what is
    wrong with the file, its reader finds. The file stays open until 128 others were told of, or `forget_files`."""
    if folder.is_local and num_bytes > 0 and hasattr(os, "posix_fadvise"):  # 0 would be all of the file
        with contextlib.suppress(OSError):
            file = _told.get((folder, name))
            if file is None:
                file = _told[folder, name] = _Local(f"{folder.uri}/{name}")
                if len(_told) > _MAX_TOLD:
                    del _told[next(iter(_told))]
            os.posix_fadvise(file.descriptor, offset, num_bytes, os.POSIX_FADV_WILLNEED)


@functools.lru_cache(maxsize=64)
def _opened(folder: Folder, name: str) -> pa.NativeFile:
    """A file on S3. Opening one is a request, and a shard takes from hundreds of runs of one archive."""
    return retry(lambda: folder.open_unchecked(name))


def forget_files() -> None:
    """Open and list files of a source anew from here on: it may have changed since an earlier job."""
    _told.clear()
    open_archive.cache_clear()
    _opened.cache_clear()
    list_folders.cache_clear()


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
        self._file: _Local | pa.NativeFile | None
        if folder.is_local:
            self._file = local = _told.get((folder, name)) or _Local(f"{folder.uri}/{name}")
            self._size = os.fstat(local.descriptor).st_size  # not of when it was told of: it may have changed
        else:
            self._file = remote = _opened(folder, name)
            self._size = remote.size()

    @property
    def is_remote(self) -> bool:
        return isinstance(self._file, pa.NativeFile)

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
        """num_bytes from offset, fewer only at the end of the file. Raises OSError; `SourceError` where a local file is
        shorter than when it was opened."""
        expected = max(0, min(num_bytes, self._size - offset))
        if not expected:
            return b""
        file = self._file
        if isinstance(file, _Local):
            data = os.pread(file.descriptor, expected, offset)
            while 0 < len(data) < expected and (
                more := os.pread(file.descriptor, expected - len(data), offset + len(data))
            ):
                data += more  # one call reads 2 GiB at most
            if len(data) != expected:
                raise SourceError(
                    f"expected {expected} bytes at {offset} of {self.place}, found {len(data)}: it was cut while it "
                    "was read; run it again when nobody writes there"
                )
            return data
        if file is None:
            raise ValueError(f"read of {self.place} after it was closed")
        return retry(lambda: self._complete(file, expected, offset))

    def _complete(self, file: Any, num_bytes: int, offset: int) -> bytes:
        data = file.read_at(num_bytes, offset)
        if len(data) != num_bytes:
            raise OSError(f"{len(data)} of {num_bytes} bytes came")
        return data

    def close(self) -> None:
        self._file = None
        super().close()


class Window(_Positioned):
    """A stretch of a file as a file of its own, read in blocks, so that a header (on S3: and what follows) is one read.

    most: bytes that may be read at once. A header that claims more raises tarfile.ReadError and takes no memory."""

    def __init__(self, file: SourceFile, start: int, size: int, most: int) -> None:
        super().__init__()
        self._file, self._start, self._size, self._most = file, start, size, most
        self._block, self._block_start = b"", 0

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self._position)
        count = left if size is None or size < 0 else min(size, left)
        if count > self._most:
            raise tarfile.ReadError(f"a header of {count} bytes, more than {self._most}")
        within = self._position - self._block_start
        if not 0 <= within <= len(self._block) - count:
            stretch = min(left, max(count, _BLOCK_BYTES if self._file.is_remote else _HEADER_BYTES))
            self._block, self._block_start = self._file.read_at(self._start + self._position, stretch), self._position
            within = 0
        data = self._block[within : within + count]
        self._position += len(data)
        return data


def read_ranges(file: SourceFile, ranges: Sequence[tuple[int, int]], *, ahead: bool) -> Iterator[bytes]:
    """The bytes of each (offset, size), in order; ahead: with several requests in flight."""
    if ahead:
        return _in_order([lambda o=offset, n=size: file.read_at(o, n) for offset, size in ranges])
    return itertools.starmap(file.read_at, ranges)


def hash_range(file: SourceFile, offset: int, num_bytes: int) -> str:
    """The sha256 of a stretch of a file that is too large for memory."""
    found = hashlib.sha256()
    for start in range(0, num_bytes, _HASHED_BYTES):
        found.update(file.read_at(offset + start, min(_HASHED_BYTES, num_bytes - start)))
    return found.hexdigest()


def read_files(folder: Folder, names: Sequence[str]) -> Iterator[bytes | OSError]:
    """The bytes of each file, in order, or the error in its place where the file is not there or may not be read."""
    if folder.is_local:
        return (_whole(folder, name) for name in names)
    return _in_order([lambda n=name: _whole(folder, n) for name in names])


def _whole(folder: Folder, name: str) -> bytes | OSError:
    try:
        with SourceFile(folder, name) as file:
            return file.read()
    except (FileNotFoundError, PermissionError, IsADirectoryError, NoFileError) as error:
        return error  # an answer about this file; anything else may pass, and must not become a rejection


def _in_order(reads: Sequence[Callable[[], T]]) -> Iterator[T]:
    """The results of all, in order, with some at work ahead."""
    with ThreadPoolExecutor(_REQUESTS) as pool:
        waiting = deque(pool.submit(read) for read in reads[:_REQUESTS])
        for read in reads[_REQUESTS:]:
            yield waiting.popleft().result()
            waiting.append(pool.submit(read))
        while waiting:
            yield waiting.popleft().result()
