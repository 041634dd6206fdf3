"""Trainings that go on from a state of another one, under other values of some fields: what population based training
makes. A state is handed over by its path."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vqvae_core.checkpoint import StateFolder, TrainingState
from vqvae_core.storage import Folder


@dataclass(frozen=True)
class SavedState:
    """A state of a training, where it lies. folder: of the training's states, which have this identity."""

    folder: str
    identity: str
    step: int

    def is_there(self) -> bool:
        """Whether it has an index, which is written last."""
        return self.step in StateFolder(Folder(self.folder), self.identity).finished()

    def load(self) -> TrainingState:
        """Raises `CheckpointError` where it is not there any more, or altered."""
        return StateFolder(Folder(self.folder), self.identity).load(self.step)


@dataclass(frozen=True)
class Segment:
    """A part of a training: up to a step, under these values of the config's fields."""

    until: int
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Lineage:
    """What a training goes on from: the parts before it, from step 0 on, and the state at the end of the last one."""

    segments: tuple[Segment, ...] = ()
    state: SavedState | None = None

    def added_to(self, recipe: dict[str, Any]) -> dict[str, Any]:
        """The recipe of a training that goes on from here; that of one that begins at step 0 stays as it is."""
        if not self.segments:
            return recipe
        return {**recipe, "before": [{"until": one.until, "values": dict(one.values)} for one in self.segments]}


NO_LINEAGE = Lineage()
