"""Images in Parquet as Hugging Face writes them: `image` or `img` struct<bytes, path>, and a column of labels."""

import json
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
    split_by_fraction,
)
from pipelines.sources.files import identity_of, list_files, place_of
from pipelines.sources.parquet import image_column, images_in, open_parquet, read_group, read_rows
from vqvae_core.storage import Folder

_IMAGES = ("image", "img")
_LABEL_COLUMN = "label"
_LABELS = (pa.types.is_integer, pa.types.is_string, pa.types.is_large_string, pa.types.is_null)
_WHAT = "Parquet files with images"


@dataclass(frozen=True, kw_only=True)
class HuggingFaceSource:
    """Parquet files with an image a row. Files named train-* and validation-* (or test-*) are the splits; where they
    are not, a fraction of the rows is validation."""

    path: str | None = field(default=None, metadata={"hashed": False})
    """Folder with the Parquet files, local or s3://. Never part of a fingerprint."""
    label_column: str = _LABEL_COLUMN
    """Column of whole numbers or strings; images have no label where it is missing."""
    validation_fraction: float = 0.05
    """Share of the rows that become validation where no file is named so."""

    random_access: ClassVar[bool] = False
    has_episodes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_fraction(self.validation_fraction)

    @cached_property
    def _folder(self) -> Folder:
        return place_of(self.path, _WHAT)

    def _files(self) -> list[tuple[str, int]]:
        return list_files(self.path, ".parquet", _WHAT)

    def check(self) -> None:
        name = self._files()[0][0]
        image_column(open_parquet(self._folder, name), _IMAGES, f"{self.path}/{name}")

    def identity(self) -> dict[str, Any]:
        return {"kind": "huggingface", **identity_of(self._files())}

    def parts(self) -> list[Part]:
        return parts_of(self._files())

    def index(self, part: Part, spool: Folder) -> Iterator[RunIndex]:
        if part.locator["left_out"]:
            yield left_out(part)
            return
        file = open_parquet(self._folder, part.name)
        image_column(file, _IMAGES, f"{self.path}/{part.name}")
        classes = self._classes(file)
        labelled = self.label_column in file.schema_arrow.names
        if not labelled and self.label_column != _LABEL_COLUMN:
            raise SourceError(
                f"expected the column `{self.label_column}` (--data.label-column) in {self.path}/{part.name}, found "
                f"{', '.join(map(readable, file.schema_arrow.names))}"
            )
        stem, row = part.name.removesuffix(".parquet"), 0
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            levels = self._levels(part, file, group, classes) if labelled else [None] * count
            entries = []
            for position, level in enumerate(levels):
                name = f"{stem}-{row + position:08d}"
                split = part.locator["split"] or split_by_fraction(name, self.validation_fraction)
                # Where a label is missing or out of range, `read` finds it again and says so.
                entries.append(Entry(position=position, name=name, level=level, split=split))
            row += count
            run = Run(name=readable(f"{part.name}#{group}"), locator={"file": part.name, "group": group})
            yield RunIndex(run=run, entries=entries)

    def _classes(self, file: pq.ParquetFile) -> list[str] | None:
        """The names of the labels, from the metadata that the datasets library writes."""
        try:
            features = json.loads((file.schema_arrow.metadata or {})[b"huggingface"])["info"]["features"]
            names = features[self.label_column]["names"]
        except (KeyError, ValueError, TypeError, RecursionError):
            return None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise SourceError(f"expected a list of names of labels in the metadata of {self.path}, found {names!r:.80}")
        if len(set(names)) != len(names):
            raise SourceError(f"expected names of labels that differ in {self.path}, found {', '.join(names)}")
        return names

    def _levels(self, part: Part, file: pq.ParquetFile, group: int, classes: list[str] | None) -> list[str | None]:
        column = read_group(self._folder, part.name, file, group, [self.label_column])[self.label_column]
        kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        if not any(test(kind) for test in _LABELS):
            raise SourceError(
                f"expected whole numbers or strings in `{self.label_column}` of {self.path}/{part.name}, found "
                f"{kind}; name another column with --data.label-column"
            )
        return [None if _fault(value, classes) else _level(value, classes) for value in column.to_pylist()]

    def labels(self, levels: set[str]) -> dict[str, int] | None:
        classes = self._all_classes()
        if classes and levels <= set(classes):
            return {name: label for label, name in enumerate(classes)}
        return number_by_name(levels)

    def _all_classes(self) -> list[str] | None:
        return self._classes(open_parquet(self._folder, self.parts()[0].name))

    def read(self, run: Run, entries: Sequence[Entry], spool: Folder) -> Iterator[SourceItem]:
        name, group = run.locator["file"], run.locator["group"]
        file = open_parquet(self._folder, name)
        column = image_column(file, _IMAGES, f"{self.path}/{name}")
        columns = [column for column in (column, self.label_column) if column in file.schema_arrow.names]
        classes = self._classes(file)
        waiting = iter(entries)
        for rows in read_rows(self._folder, name, file, group, columns, [entry.position for entry in entries]):
            labels = rows[self.label_column].to_pylist() if self.label_column in columns else None
            for number, (image, path) in enumerate(images_in(rows, column)):
                fault = "no bytes: the cell is empty" if not image else ""
                if labels is not None:
                    fault = fault or _fault(labels[number], classes)
                yield self._item(next(waiting), name, image, path, fault)

    def _item(self, entry: Entry, name: str, image: bytes, path: str | None, fault: str) -> SourceItem:
        facts = {"source": readable(f"{name}#{entry.name[-8:]}")}
        if path:
            facts["path"] = path.replace("\\", "/").rpartition("/")[2]
        return SourceItem(position=entry.position, image=image, facts=facts, fault=fault)


def _fault(value: int | str | None, classes: list[str] | None) -> str:
    if value is None:
        return "no label: the cell is empty"
    if isinstance(value, int) and classes and not 0 <= value < len(classes):
        return f"label out of range: {value} is not 0 to {len(classes) - 1}"
    if isinstance(value, int) and value < 0:
        return f"label out of range: {value} is below 0"
    return ""


def _level(value: int | str, classes: list[str] | None) -> str:
    return classes[value] if classes and isinstance(value, int) else str(value)
