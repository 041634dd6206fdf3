"""Frames of an engine, recorded as Parquet: columns `image` (struct of bytes and path), `level`, `episode`, `step`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.sources.base import Run, SourceError, SourceIndex, SourceItem, fraction_of
from pipelines.sources.files import list_files, open_source
from vqvae_core.storage import Folder

_COLUMNS = ("image", "level", "episode", "step")


@dataclass(frozen=True, kw_only=True)
class RecordedFramesSource:
    """Parquet files of frames. Files named test-* or validation-* are the validation split; where there are none, a
    fraction of the episodes is. An episode is never in both."""

    path: str | None = field(default=None, metadata={"hashed": False})
    """Folder with the Parquet files, local or s3://. Never part of a fingerprint."""
    validation_fraction: float = 0.1
    """Share of the episodes that become validation where no file is named so."""

    random_access: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must be at least 0 and below 1, was {self.validation_fraction}")

    def _files(self) -> list[tuple[str, int]]:
        return list_files(self.path, ".parquet", "recorded frames: a folder of Parquet files")

    def _open(self, name: str) -> pq.ParquetFile:
        try:
            file = pq.ParquetFile(open_source(self.path, name))
        except (pa.ArrowException, OSError) as error:
            raise SourceError(
                f"expected a Parquet file at {self.path}/{name}, it cannot be read: {str(error).splitlines()[0]}; "
                "restore it or move it out of the folder"
            ) from error
        missing = [column for column in _COLUMNS if column not in file.schema_arrow.names]
        if missing:
            raise SourceError(
                f"expected the columns {', '.join(_COLUMNS)} in {self.path}/{name}, missing: {', '.join(missing)}"
            )
        schema = file.schema_arrow
        image = schema.field("image").type
        if not (pa.types.is_struct(image) and {"bytes", "path"} <= {image.field(n).name for n in range(len(image))}):
            raise SourceError(f"expected `image` as a struct of bytes and path in {self.path}/{name}, found {image}")
        for column in ("episode", "step"):
            if not pa.types.is_integer(schema.field(column).type):
                found = schema.field(column).type
                raise SourceError(f"expected integers in `{column}` of {self.path}/{name}, found {found}")
        return file

    def _rows(self, file: pq.ParquetFile, name: str, group: int, columns: Sequence[str]) -> pa.Table:
        try:
            table = file.read_row_group(group, columns=list(columns))
        except (pa.ArrowException, OSError) as error:
            raise SourceError(
                f"expected to read row group {group} of {self.path}/{name}, but: {str(error).splitlines()[0]}; "
                "restore the file or move it out of the folder"
            ) from error
        for column in set(columns) - {"image"}:
            if table[column].null_count:
                raise SourceError(
                    f"expected a value in every row of `{column}`, row group {group} of {self.path}/{name} has "
                    f"{table[column].null_count} nulls; leave those rows out"
                )
        return table

    def check(self) -> None:
        self._open(self._files()[0][0])

    def identity(self) -> dict[str, Any]:
        return {"kind": "recorded_frames", "files": [list(entry) for entry in self._files()]}

    def index(self) -> SourceIndex:
        runs, run, position, validation, levels = [], [], [], [], set()
        names = [name for name, _ in self._files()]
        given = [name for name in names if _is_validation(name)]
        for name in names:
            file = self._open(name)
            for group in range(file.num_row_groups):
                table = self._rows(file, name, group, ["level", "episode"])
                levels.update(table["level"].to_pylist())
                if given:
                    split = np.full(table.num_rows, name in given)
                else:
                    episodes = zip(table["level"].to_pylist(), table["episode"].to_pylist(), strict=True)
                    split = np.array(
                        [fraction_of(f"{level}/{episode}") < self.validation_fraction for level, episode in episodes],
                        dtype=bool,
                    )
                run.append(np.full(table.num_rows, len(runs), np.int32))
                position.append(np.arange(table.num_rows, dtype=np.int32))
                validation.append(split)
                runs.append(Run(name=f"{name}#{group}", locator={"file": name, "group": group}))
        if not runs:
            raise SourceError(f"expected frames in the Parquet files at {self.path}, found no row")
        return SourceIndex(
            runs=tuple(runs),
            run=np.concatenate(run),
            position=np.concatenate(position),
            validation=np.concatenate(validation),
            label_map={level: label for label, level in enumerate(sorted(levels))},
        )

    def read(self, run: Run, positions: Sequence[int] | None = None) -> Iterator[SourceItem]:
        name = run.locator["file"]
        table = self._rows(self._open(name), name, run.locator["group"], _COLUMNS)
        wanted = range(table.num_rows) if positions is None else positions
        for position in wanted:
            image, level, episode, step = (table[column][position].as_py() for column in _COLUMNS)
            yield SourceItem(
                position=position,
                key=f"{level}-{episode}-{step:06d}",
                image=(image or {}).get("bytes") or b"",
                level=level,
                facts={"episode": episode, "step": step, "source": (image or {}).get("path")},
            )


def _is_validation(name: str) -> bool:
    return Folder.of("/" + name).name.startswith(("test", "validation"))
