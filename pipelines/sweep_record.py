"""What a sweep knows of its trials, kept in its folder, and what all trials have in common."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pipelines.config import PipelineConfig, config_from_manifest
from pipelines.lineage import Lineage, SavedState
from pipelines.program import resolve
from pipelines.search_space import Value, with_values
from vqvae_core.errors import InputError
from vqvae_core.storage import Folder

_RECORDS = "trials"
RUNNING, DONE, STOPPED, DIVERGED, FAILED = "running", "done", "stopped", "diverged", "failed"


@dataclass(kw_only=True)
class Record:
    """What is known of a trial, kept in the sweep's folder, so that the same command goes on from it. points: (step,
    objective) of its validations; model: the folder of its artifact; reached: of a part of a training, the state at
    its end; reason: of a failure."""

    number: int
    values: dict[str, Value]
    points: list[tuple[int, float]] = field(default_factory=list)
    state: str = RUNNING
    model: str | None = None
    reached: SavedState | None = None
    steps: int = 0
    objective: float | None = None
    reason: str | None = None

    @property
    def is_over(self) -> bool:
        return self.state in (DONE, STOPPED, DIVERGED)

    def write(self, folder: Folder) -> None:
        folder.write(f"{_RECORDS}/trial-{self.number:05d}.json", json.dumps(asdict(self)).encode())


def read_records(folder: Folder) -> dict[int, Record]:
    """The trials that earlier runs of a sweep began, by number. Raises `InputError` where one is of another version."""
    found = {}
    for name in folder.list(_RECORDS):
        if name.endswith(".json"):
            try:
                record = _record(folder.read(f"{_RECORDS}/{name}"))
            except (ValueError, TypeError, RecursionError) as error:
                raise InputError(
                    f"expected what is known of a trial in {folder.path(f'{_RECORDS}/{name}')}, but: {error}; use the "
                    "release that wrote it, or move it away: the trial is then made again"
                ) from error
            found[record.number] = record
    return found


def _record(data: bytes) -> Record:
    record = Record(**json.loads(data))
    record.points = [(step, value) for step, value in record.points]
    if record.reached is not None:
        record.reached = SavedState(**record.reached)  # type: ignore[arg-type]
    return record


@dataclass(frozen=True)
class Shared:
    """What all trials of a sweep have in common. config: the sweep's, as in a manifest, with the resources of one
    trial; data: the folder that they train on; records: that of what is known of them. until: the step that each
    trains to, where that is not the last; parts: the folder of such trainings; before: what each trial's training goes
    on from, by number."""

    root: str
    config: dict[str, Any]
    objective: str
    data: str
    records: str
    until: int | None = None
    parts: str = ""
    before: Mapping[int, Lineage] = field(default_factory=dict)

    def config_of(self, values: Mapping[str, Value]) -> PipelineConfig:
        """A trial's config. Raises `InputError` where it is none."""
        return resolve(with_values(config_from_manifest(self.config), dict(values)))


def short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
