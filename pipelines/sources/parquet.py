"""Parquet files of images: opened and read by row group, with what is wrong said in one line."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.sources.base import SourceError
from pipelines.sources.files import SourceFile, open_source
from vqvae_core.storage import Folder

_BUFFER_BYTES = 8 << 20  # of a column at a time: a row group may be larger than memory
_ROWS = 64
_BYTES = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary, pa.types.is_null)


def open_parquet(folder: Folder, name: str) -> pq.ParquetFile:
    """Raises `SourceError` where the file is none."""
    try:
        return pq.ParquetFile(_buffered(open_source(folder, name)), pre_buffer=False, buffer_size=_BUFFER_BYTES)
    except (pa.ArrowException, OSError) as error:
        raise SourceError(
            f"expected a Parquet file at {folder.uri}/{name}, it cannot be read: {str(error).splitlines()[0]}; "
            "restore it or move it out of the folder"
        ) from error


def _buffered(file: SourceFile) -> Any:
    return pa.PythonFile(file, mode="r")


def read_group(folder: Folder, name: str, file: pq.ParquetFile, group: int, columns: Sequence[str]) -> pa.Table:
    """Some columns of one row group. Raises `SourceError` where it cannot be read."""
    try:
        table = file.read_row_group(group, columns=list(columns), use_threads=False)
        table.validate(full=True)  # strings that are no UTF-8, offsets beyond their data
        return table
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(folder, name, group, error) from error


def _unreadable(folder: Folder, name: str, group: int, error: BaseException) -> SourceError:
    return SourceError(
        f"expected to read row group {group} of {folder.uri}/{name}, but: {str(error).splitlines()[0]}; "
        "restore the file or move it out of the folder"
    )


def read_rows(
    folder: Folder, name: str, file: pq.ParquetFile, group: int, columns: Sequence[str], rows: Sequence[int]
) -> Iterator[pa.Table]:
    """Some rows (ascending) of one row group, in tables of a few, so that large groups need little memory. Raises
    `SourceError` where they cannot be read."""
    wanted, begin = np.asarray(rows, np.int64), 0
    batches = file.iter_batches(_ROWS, row_groups=[group], columns=list(columns), use_threads=False)
    try:
        for batch in batches:
            batch.validate(full=True)
            mine = wanted[(wanted >= begin) & (wanted < begin + len(batch))] - begin
            begin += len(batch)
            if len(mine):
                yield pa.Table.from_batches([batch]).take(pa.array(mine))
            if not len(wanted) or begin > wanted[-1]:
                return
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(folder, name, group, error) from error


def image_column(file: pq.ParquetFile, names: Sequence[str], where: str) -> str:
    """The first of some columns that is a struct with bytes. Raises `SourceError` where there is none."""
    schema = file.schema_arrow
    for name in names:
        if name in schema.names:
            kind = schema.field(name).type
            place = kind.get_field_index("bytes") if pa.types.is_struct(kind) else -1
            if place >= 0 and any(test(kind.field(place).type) for test in _BYTES):
                return name
            raise SourceError(f"expected `{name}` as a struct of bytes and path in {where}, found {kind}")
    wanted = " or ".join(f"`{name}`" for name in names)
    raise SourceError(f"expected the column {wanted} in {where}, found the columns {', '.join(schema.names)}")


def images_in(table: pa.Table, column: str) -> Iterator[tuple[bytes, str | None]]:
    """(bytes, path) of each row; no bytes where they are null."""
    for image in table[column]:
        value = image.as_py() or {}
        yield value.get("bytes") or b"", value.get("path")
