"""Frames of DeepMind Lab (Beattie et al. 2016, arXiv:1612.03801), live: levels times seeds, seen by a sticky random
walker. The engine is built from source by whoever wants it, so it is imported where it is needed."""

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from pipelines.sources.base import Entry, Part, Run, RunIndex, SourceError, SourceItem
from vqvae_core.storage import Folder

_MODULE = "deepmind_lab"
_FRAMES_PER_ACTION = 4
_STICKINESS = 0.8  # the chance that an action is kept for the next step
_TURN_PIXELS = 60


@dataclass(frozen=True, kw_only=True)
class DMLabSource:
    """Frames from levels of the engine. An episode is one run, seeded, and in one split."""

    levels: tuple[str, ...] = ("seekavoid_arena_01", "nav_maze_random_goal_01", "stairway_to_melon")
    """Names of levels; those of DMLab-30 are contributed/dmlab30/NAME. Each is a label."""
    train_episodes_per_level: int = 50
    """Episodes of each level that go to the train split."""
    validation_episodes_per_level: int = 5
    """Episodes of each level that go to the validation split."""
    frames_per_episode: int = 128
    """Frames kept of an episode."""
    actions_per_frame: int = 2
    """Actions (of 4 engine frames each) between two kept frames."""
    width: int = 84
    """Of the rendered frames, in pixels."""
    height: int = 84
    """Of the rendered frames, in pixels."""
    hide_hud: bool = False
    """Render without the head-up display."""
    seed: int = 0
    """Seed of the first episode; each episode has its own."""

    random_access: ClassVar[bool] = False
    has_episodes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("train_episodes_per_level", "frames_per_episode", "actions_per_frame", "width", "height"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, was {getattr(self, name)}")
        if self.validation_episodes_per_level < 0:
            raise ValueError(
                f"validation_episodes_per_level must be 0 or more, was {self.validation_episodes_per_level}"
            )
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, was {self.seed}")
        if not self.levels or len(set(self.levels)) != len(self.levels):
            raise ValueError(f"levels must name at least one level, each once, were {', '.join(self.levels) or 'none'}")

    def check(self) -> None:
        if importlib.util.find_spec(_MODULE) is None:
            raise SourceError(
                f"the dmlab source needs the module {_MODULE}, which is not installed and on no package index: build "
                "its Python package from the sources of DeepMind Lab (github.com/google-deepmind/lab, "
                "python/pip_package) and install that, or use recorded frames (--source-kind recorded_frames)"
            )

    def identity(self) -> dict[str, Any]:
        self.check()
        try:
            version = importlib.metadata.version(_MODULE)
        except importlib.metadata.PackageNotFoundError:
            version = str(getattr(importlib.import_module(_MODULE), "__version__", "unknown"))
        return {"kind": "dmlab", "engine": version}

    def parts(self) -> list[Part]:
        episodes = self.train_episodes_per_level + self.validation_episodes_per_level
        return [
            Part(name=level, locator={"seed": self.seed + number * episodes})
            for number, level in enumerate(self.levels)
        ]

    def index(self, part: Part, spool: Folder) -> Iterator[RunIndex]:
        for episode in range(self.train_episodes_per_level + self.validation_episodes_per_level):
            seed = part.locator["seed"] + episode
            short = part.name.rpartition("/")[2]
            yield RunIndex(
                run=Run(name=f"{part.name}/{seed:06d}", locator={"level": part.name, "seed": seed}),
                entries=[
                    Entry(
                        position=position,
                        name=f"{short}-{seed:06d}-{position:06d}",
                        level=part.name,
                        split="train" if episode < self.train_episodes_per_level else "validation",
                    )
                    for position in range(self.frames_per_episode)
                ],
            )

    def labels(self, levels: set[str]) -> dict[str, int] | None:
        return {name: label for label, name in enumerate(self.levels)}

    def read(self, run: Run, entries: Sequence[Entry], spool: Folder) -> Iterator[SourceItem]:
        wanted, seed = {entry.position for entry in entries}, run.locator["seed"]
        for position, frame in enumerate(self._walk(run.locator["level"], seed)):
            if position in wanted:
                yield SourceItem(position=position, image=frame, facts={"episode": seed, "step": position})

    def _walk(self, level: str, seed: int) -> Iterator[np.ndarray]:
        """frames_per_episode frames (uint8 HWC). Where the level ends, it begins again with a seed made of this one."""
        rng = np.random.default_rng(seed)
        with closing(self._open(level)) as engine:
            actions = _Actions(engine.action_spec(), rng)
            engine.reset(seed=seed)
            starts = 1
            for _ in range(self.frames_per_episode):
                yield engine.observations()["RGB_INTERLEAVED"].copy()
                for _ in range(self.actions_per_frame):
                    engine.step(actions.next(), num_steps=_FRAMES_PER_ACTION)
                    if not engine.is_running():
                        engine.reset(seed=int(np.random.default_rng([seed, starts]).integers(2**31)))
                        starts += 1

    def _open(self, level: str) -> Any:
        self.check()
        engine = importlib.import_module(_MODULE)
        config = {"width": str(self.width), "height": str(self.height)}
        if self.hide_hud:
            config["minimalUI"] = "true"
        if level.endswith("_test"):
            config["allowHoldOutLevels"] = "true"
        try:
            return engine.Lab(level, ["RGB_INTERLEAVED"], config=config, renderer="software")
        except Exception as error:  # the engine's own errors have no common kind
            raise SourceError(
                f"expected DeepMind Lab to open the level {level!r}, but: {' '.join(str(error).split())}"
            ) from error


class _Actions:
    """A sticky random walk: it goes forward most of the time and keeps what it does for some steps."""

    def __init__(self, spec: Sequence[dict[str, Any]], rng: np.random.Generator) -> None:
        self._names = [item["name"] for item in spec]
        self._rng = rng
        self._action = self._draw()

    def next(self) -> np.ndarray:
        """The next action, np.intc, one number for each entry of the engine's action spec."""
        if self._rng.random() > _STICKINESS:
            self._action = self._draw()
        return self._action

    def _draw(self) -> np.ndarray:
        chosen = {
            "LOOK_LEFT_RIGHT_PIXELS_PER_FRAME": int(self._rng.choice([-_TURN_PIXELS, -20, 0, 0, 20, _TURN_PIXELS])),
            "STRAFE_LEFT_RIGHT": int(self._rng.choice([-1, 0, 0, 0, 1])),
            "MOVE_BACK_FORWARD": int(self._rng.choice([-1, 0, 1, 1, 1, 1])),
        }
        return np.array([chosen.get(name, 0) for name in self._names], dtype=np.intc)
