"""Frames of an engine, recorded as Parquet: columns `image` (struct of bytes and path), `level`, `episode`, `step`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.sources.base import (
    Entry,
    Part,
    Run,
    RunIndex,
    SourceError,
    SourceItem,
    check_fraction,
    left_out,
    number_by_name,
    parts_of,
    readable,
    relative,
    split_by_fraction,
)
from pipelines.sources.files import identity_of, list_files, place_of
from pipelines.sources.parquet import image_column, images_in, open_parquet, read_group, read_rows
from vqvae_core.storage import Folder

_FRAME = ("level", "episode", "step")
_WHAT = "recorded frames: a folder of Parquet files"


@dataclass(frozen=True, kw_only=True)
class RecordedFramesSource:
    """Parquet files of frames. Files named train-* and test-* or validation-* are the splits; where they are not, a
    fraction of the episodes is validation. An episode is never in both."""

    path: str | None = field(default=None, metadata={"hashed": False})
    """Folder with the Parquet files, local or s3://. Never part of a fingerprint."""
    validation_fraction: float = 0.1
    """Share of the episodes that become validation where no file is named so."""

    random_access: ClassVar[bool] = False
    has_episodes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fraction(self.validation_fraction)

    @cached_property
    def _folder(self) -> Folder:
        return place_of(self.path, _WHAT)

    def _files(self) -> list[tuple[str, int]]:
        return list_files(self.path, ".parquet", _WHAT)

    def _open(self, name: str) -> pq.ParquetFile:
        file, where = open_parquet(self._folder, name), f"{self.path}/{name}"
        image_column(file, ["image"], where)
        schema = file.schema_arrow
        missing = [column for column in _FRAME if column not in schema.names]
        if missing:
            raise SourceError(
                f"expected the columns image, {', '.join(_FRAME)} in {where}, missing: {', '.join(missing)}"
            )
        level = schema.field("level").type
        if not (pa.types.is_string(level) or pa.types.is_large_string(level)):
            raise SourceError(f"expected strings in `level` of {where}, found {level}")
        for column in ("episode", "step"):
            if not pa.types.is_integer(schema.field(column).type):
                found = schema.field(column).type
                raise SourceError(f"expected integers in `{column}` of {where}, found {found}")
        return file

    def check(self) -> None:
        self._open(self._files()[0][0])

    def identity(self) -> dict[str, Any]:
        return {"kind": "recorded_frames", **identity_of(self._files())}

    def parts(self) -> list[Part]:
        return parts_of(self._files())

    def index(self, part: Part, spool: Folder) -> Iterator[RunIndex]:
        if part.locator["left_out"]:
            yield left_out(part)
            return
        file = self._open(part.name)
        for group in range(file.num_row_groups):
            table = read_group(self._folder, part.name, file, group, _FRAME)
            columns = (table[column].to_pylist() for column in _FRAME)
            entries = []
            for position, (level, episode, step) in enumerate(zip(*columns, strict=True)):
                split = part.locator["split"] or split_by_fraction(f"{level}/{episode}", self.validation_fraction)
                name = f"{level}-{episode}-{step:06d}" if None not in (level, episode, step) else f"row-{position}"
                entries.append(Entry(position=position, name=name, level=level, split=split))
            yield RunIndex(
                run=Run(name=readable(f"{part.name}#{group}"), locator={"file": part.name, "group": group}),
                entries=entries,
            )

    def labels(self, levels: set[str]) -> dict[str, int] | None:
        return number_by_name(levels)

    def read(self, run: Run, entries: Sequence[Entry], spool: Folder) -> Iterator[SourceItem]:
        name, group = run.locator["file"], run.locator["group"]
        columns, positions = ["image", *_FRAME], [entry.position for entry in entries]
        waiting = iter(entries)
        for rows in read_rows(self._folder, name, self._open(name), group, columns, positions):
            values = zip(*(rows[column].to_pylist() for column in _FRAME), strict=True)
            for (image, path), (level, episode, step) in zip(images_in(rows, "image"), values, strict=True):
                found = zip(_FRAME, (level, episode, step), strict=True)
                missing = [column for column, value in found if value is None] + ([] if image else ["bytes"])
                fault = f"no {', '.join(missing)}: the cell is empty" if missing else ""
                facts = {"episode": episode, "step": step, "source": path and relative(path)}
                yield SourceItem(position=next(waiting).position, image=image, facts=facts, fault=fault)
