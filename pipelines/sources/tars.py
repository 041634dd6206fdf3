"""Walking the headers of a tar inside a file, without unpacking it and without reading what is in it."""

import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from pipelines.sources.base import Entry, SourceError, SourceItem
from pipelines.sources.files import SourceFile, Window, hash_range, open_archive, read_ranges, will_read
from vqvae_core.storage import Folder

MAX_MEMBER_BYTES = 256 << 20  # of one picture; a larger member is not read
LINK = -1  # in the place of the size of a link, whose contents are elsewhere
_SMALL_BYTES = 1 << 20  # of a label
_STRETCH_BYTES = 1 << 16
_KEPT_BYTES = (1 << 31) - 1
_OCTAL = re.compile(rb" *([0-7]+)[ \0]+")


@dataclass(frozen=True, slots=True)
class Member:
    """A plain file in a tar: its name (bytes that are no UTF-8 as surrogates), its place in the whole file, and its
    contents where they were asked for."""

    name: str
    offset: int
    num_bytes: int
    data: bytes = b""


class _Header(tarfile.TarInfo):
    """As the library reads it, by a shorter way for plain files, of which there may be millions. Of those only name,
    size and checksum are looked at: broken owners and times, which nobody asks for, are no fault."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> tarfile.TarInfo:
        if len(buf) == tarfile.BLOCKSIZE and buf[156:157] == tarfile.REGTYPE and not buf[345]:  # no prefix
            name = buf[:100].partition(b"\0")[0]
            number, checksum = _OCTAL.fullmatch(buf[124:136]), _OCTAL.fullmatch(buf[148:156])
            if number and checksum and int(checksum[1], 8) == sum(buf) - sum(buf[148:156]) + 8 * ord(" "):
                header = cls(name.decode(encoding, errors))
                header.size = int(number[1], 8)
                return header
        return super().frombuf(buf, encoding, errors)


def members(
    file: SourceFile,
    where: str,
    start: int = 0,
    size: int | None = None,
    wanted: Callable[[str], bool] = lambda name: False,
) -> Iterator[Member]:
    """The plain files of the tar at [start, start + size) of a file, in order. Raises `SourceError` for a cut one.

    wanted: whether the contents of a member of this name are read too, where they are small.
    """
    size = file.size() - start if size is None else size
    window = Window(file, start, size, most=_SMALL_BYTES)
    try:
        # The encoding is named: the default follows the locale.
        with tarfile.open(
            fileobj=window, mode="r:", tarinfo=_Header, encoding="utf-8", errors="surrogateescape"
        ) as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  it would keep them all
                if member.size < 0 or member.offset_data + member.size > size:
                    raise SourceError(f"expected a complete tar at {where}, it ends inside {member.name!r}; restore it")
                if member.islnk() or member.issym():
                    yield Member(member.name, 0, LINK)
                elif member.issparse():
                    raise SourceError(f"expected plain files in {where}, {member.name!r} is sparse; pack it again")
                elif member.isreg():
                    data = b""
                    if wanted(member.name) and member.size <= _SMALL_BYTES:
                        window.seek(member.offset_data)
                        data = window.read(member.size)
                    yield Member(member.name, start + member.offset_data, member.size, data)
            _check_end(window, tar.offset, size, where)
    except (tarfile.TarError, EOFError) as error:
        raise SourceError(f"expected a complete tar at {where}, found: {error}; restore it") from error


def _check_end(window: Window, end: int, size: int, where: str) -> None:
    """A tar ends with a block of zeros. One that is cut between two files has none."""
    window.seek(end)
    block = window.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE or any(block):
        raise SourceError(
            f"expected a complete tar at {where}, it has no end mark after {end} of {size} bytes; restore it"
        )
    while rest := window.read(_STRETCH_BYTES):
        if any(rest):
            raise SourceError(
                f"expected nothing behind the end mark of {where} at byte {end}, found more; restore it if it is "
                "damaged, or pack it again if it is several tars in one"
            )


def will_read_member(folder: Folder, name: str, entry: Entry) -> None:
    """What `read_members` will read of it: see `will_read`."""
    if entry.num_bytes <= MAX_MEMBER_BYTES:
        will_read(folder, name, entry.offset, entry.num_bytes)


def read_members(folder: Folder, name: str, entries: Sequence[Entry]) -> Iterator[SourceItem]:
    """The image of each entry of an archive by its place, without facts, or the fault of one that is too large or a
    link. Raises `SourceError`."""
    file = open_archive(folder, name)
    small = [entry for entry in entries if 0 <= entry.num_bytes <= MAX_MEMBER_BYTES]
    data = read_ranges(file, [(entry.offset, entry.num_bytes) for entry in small], ahead=file.is_remote)
    for entry in entries:
        if entry.num_bytes == LINK:
            yield SourceItem(position=entry.position, fault="no image: it is a link inside the archive")
        elif entry.num_bytes > MAX_MEMBER_BYTES:
            fault = f"too many bytes: {entry.num_bytes} are more than {MAX_MEMBER_BYTES}"
            # The index keeps sizes up to 2 GiB.
            sha256 = "" if entry.num_bytes >= _KEPT_BYTES else hash_range(file, entry.offset, entry.num_bytes)
            yield SourceItem(position=entry.position, fault=fault, sha256=sha256)
        else:
            image = next(data)
            if len(image) != entry.num_bytes:
                raise SourceError(
                    f"expected {entry.num_bytes} bytes at {entry.offset} of {file.place}, found {len(image)}: it "
                    "changed since it was indexed; run it again when nobody writes there"
                )
            yield SourceItem(position=entry.position, image=image)
