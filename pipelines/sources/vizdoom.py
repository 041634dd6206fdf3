"""First-person 3D frames, live from the ViZDoom engine: the source that installs anywhere and downloads nothing.

The engine, the Freedoom worlds (BSD) and the renderer come with the `vizdoom` package (arXiv:1605.02097).
"""

import importlib.metadata
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import chdir, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np

from pipelines.sources.base import Entry, Part, Run, RunIndex, SourceError, SourceItem
from vqvae_core.storage import Folder

T = TypeVar("T")
WELL_LIT_MAPS = ("E1M3", "E1M4", "E1M5", "E1M6", "E1M7", "E2M7", "MAP04")
_TICS_PER_ACTION = 4
_WARM_UP_ACTIONS = 3  # the view settles after the spawn
_STUCK_MAP_UNITS = 8.0  # a free step of four tics moves about 30 map units
_NEAR_DEPTH = 14  # of 255 in the engine's depth buffer; nearer than this, a wall fills the view


@dataclass(frozen=True, kw_only=True)
class ViZDoomSource:
    """Frames that a random walker sees on Freedoom maps. An episode is one run, seeded, and in one split."""

    maps: tuple[str, ...] = WELL_LIT_MAPS
    """Freedoom maps: E1M1 to E4M9 of the first world, MAP01 to MAP32 of the second. Each is a label."""
    train_episodes_per_map: int = 10
    """Episodes of each map that go to the train split."""
    validation_episodes_per_map: int = 1
    """Episodes of each map that go to the validation split."""
    frames_per_episode: int = 128
    """Frames kept of an episode."""
    actions_per_frame: int = 3
    """Actions (of 4 engine tics each) between two kept frames."""
    seed: int = 0
    """Seed of the first episode; each episode has its own."""

    random_access: ClassVar[bool] = False
    has_episodes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("train_episodes_per_map", "frames_per_episode", "actions_per_frame"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, was {getattr(self, name)}")
        if self.validation_episodes_per_map < 0:
            raise ValueError(f"validation_episodes_per_map must be 0 or more, was {self.validation_episodes_per_map}")
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, was {self.seed}")
        if not self.maps:
            raise ValueError("maps must name at least one Freedoom map, for example E1M3 or MAP08")
        for name in self.maps:
            _world_of(name)
        if len(set(self.maps)) != len(self.maps):
            raise ValueError(f"maps must differ from each other, were {', '.join(self.maps)}")

    def check(self) -> None:
        try:
            importlib.metadata.version("vizdoom")
        except importlib.metadata.PackageNotFoundError:
            raise SourceError(
                "the vizdoom source needs the package vizdoom, which is not installed: pip install vizdoom"
            ) from None

    def identity(self) -> dict[str, Any]:
        self.check()
        return {"kind": "vizdoom", "engine": importlib.metadata.version("vizdoom")}

    def parts(self) -> list[Part]:
        episodes_per_map = self.train_episodes_per_map + self.validation_episodes_per_map
        return [
            Part(name=name, locator={"seed": self.seed + number * episodes_per_map})
            for number, name in enumerate(self.maps)
        ]

    def index(self, part: Part, spool: Folder) -> Iterator[RunIndex]:
        for episode in range(self.train_episodes_per_map + self.validation_episodes_per_map):
            seed = part.locator["seed"] + episode
            yield RunIndex(
                run=Run(name=f"{part.name}/{seed:06d}", locator={"map": part.name, "seed": seed}),
                entries=[
                    Entry(
                        position=position,
                        name=f"{part.name}-{seed:06d}-{position:06d}",
                        level=part.name,
                        split="train" if episode < self.train_episodes_per_map else "validation",
                    )
                    for position in range(self.frames_per_episode)
                ],
            )

    def labels(self, levels: set[str]) -> dict[str, int] | None:
        return {name: label for label, name in enumerate(self.maps)}

    def read(self, run: Run, entries: Sequence[Entry], spool: Folder) -> Iterator[SourceItem]:
        level, seed = run.locator["map"], run.locator["seed"]
        wanted = {entry.position for entry in entries}
        frames = enumerate(_walk(level, seed, self.frames_per_episode, self.actions_per_frame))
        while (found := _next(frames, level, seed)) is not None:
            position, pixels = found
            if position in wanted:
                yield SourceItem(position=position, image=pixels, facts={"episode": seed, "step": position})


def _next(frames: Iterator[T], level: str, seed: int) -> T | None:
    """The next frame, None after the last. Raises `SourceError` where the engine ended by itself."""
    try:
        return next(frames, None)
    except SourceError:
        raise
    except Exception as error:  # the engine's own errors have no common kind
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SourceError(
            f"expected the ViZDoom engine to go on in map {level} with seed {seed}, but: {reason}; was it killed, or "
            "is memory short? The same command tries it again"
        ) from error


def _world_of(name: str) -> str:
    if len(name) == 4 and name[0] == "E" and name[2] == "M" and name[1] in "1234" and name[3] in "123456789":
        return "freedoom1.wad"
    if name.startswith("MAP") and name[3:].isdigit() and len(name) == 5 and 1 <= int(name[3:]) <= 32:
        return "freedoom2.wad"
    raise ValueError(f"maps must be named E1M1 to E4M9 or MAP01 to MAP32, found {name!r}")


def _open_game(level: str, seed: int, place: str) -> Any:
    import vizdoom

    game = vizdoom.DoomGame()
    game.set_doom_game_path(str(Path(vizdoom.__file__).parent / _world_of(level)))
    game.set_doom_map(level)
    game.set_doom_config_path(str(Path(place) / "engine.ini"))
    game.set_screen_resolution(vizdoom.ScreenResolution.RES_320X240)
    game.set_screen_format(vizdoom.ScreenFormat.RGB24)
    for overlay in ("hud", "minimal_hud", "weapon", "crosshair", "messages", "screen_flashes"):
        getattr(game, f"set_render_{overlay}")(False)
    game.set_depth_buffer_enabled(True)
    game.set_window_visible(False)
    game.set_sound_enabled(False)
    game.set_mode(vizdoom.Mode.PLAYER)
    game.set_available_buttons(
        [
            vizdoom.Button.MOVE_FORWARD,
            vizdoom.Button.TURN_LEFT_RIGHT_DELTA,
            vizdoom.Button.USE,
        ]
    )
    game.set_available_game_variables([vizdoom.GameVariable.POSITION_X, vizdoom.GameVariable.POSITION_Y])
    game.add_game_args("-nomonsters +god 1 +con_midtime 0")  # nothing ends an episode, no centred messages
    game.set_episode_timeout(0)
    game.set_seed(seed)
    try:
        with chdir(place):  # the engine makes a folder where it is started
            game.init()
    except Exception as error:  # the engine's own errors have no common kind
        reason = " ".join(str(error).split())
        raise SourceError(f"expected the ViZDoom engine to start with map {level}, but: {reason}") from error
    return game


def _walk(level: str, seed: int, num_frames: int, actions_per_frame: int) -> Iterator[np.ndarray]:
    """Frames (uint8 HWC, 240x320) of a walker that heads for open space, opens doors and turns away from walls."""
    with tempfile.TemporaryDirectory() as place, closing(_open_game(level, seed, place)) as game:
        rng = np.random.default_rng(seed)
        walker = _Walker(rng)
        kept = actions = taken = 0
        for _ in range(_WARM_UP_ACTIONS):
            game.make_action([0.0, float(rng.uniform(-60, 60)), 0.0], _TICS_PER_ACTION)
        # A walker that is shut in sees walls only: after 20 times the actions asked for, any view is taken.
        patience = 20 * num_frames * actions_per_frame
        while kept < num_frames:
            if game.is_episode_finished():  # it walked through the exit: go on in the same map
                game.new_episode()
                walker = _Walker(rng)
            state = game.get_state()
            if actions % actions_per_frame == 0:
                if np.median(state.depth_buffer) > _NEAR_DEPTH or taken > patience:
                    kept += 1
                    yield state.screen_buffer.copy()
                else:
                    actions -= 1  # the next view that is not a wall is kept
            actions += 1
            taken += 1
            game.make_action(walker.act(state.depth_buffer, state.game_variables), _TICS_PER_ACTION)


class _Walker:
    """Steers by the depth of the view's left, middle and right, with a slow random drift."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._drift = 0.0
        self._last: np.ndarray | None = None
        self._turning = 0
        self._side = 1.0

    def act(self, depth: np.ndarray, place: np.ndarray) -> list[float]:
        """The action for this view: [move forward 0 or 1, turn in degrees, use 0 or 1]."""
        stuck = self._last is not None and float(np.hypot(*(place - self._last))) < _STUCK_MAP_UNITS
        self._last = np.array(place)
        if self._turning > 0:
            self._turning -= 1
            self._last = None
            return [float(self._turning == 0), 15.0 * self._side, 0.0]
        horizon = depth[100:140].astype(np.float64).mean(axis=0)
        left, middle, right = horizon[:100].mean(), horizon[120:200].mean(), horizon[220:].mean()
        if stuck or middle < _NEAR_DEPTH:
            self._side = 1.0 if right > left else -1.0
            if self._rng.random() < 0.25:
                self._side = -self._side
            self._turning = int(self._rng.integers(2, 7))
            return [0.0, 0.0, float(self._rng.random() < 0.7)]  # it may be a door
        self._drift = 0.85 * self._drift + self._rng.normal() * 1.5
        steer = 6.0 * (right - left) / (right + left + 1.0)
        return [1.0, float(self._drift + steer), 0.0]
