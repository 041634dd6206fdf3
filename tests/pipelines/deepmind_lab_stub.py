"""A stand-in for the engine's Python module, with the parts of its interface that the source uses.

Frames are a function of level, seed and actions. An episode ends after some steps, as the engine's do.
"""

import numpy as np

__version__ = "stub"
_STEPS = 60


class Lab:
    def __init__(self, level, observations, config=None, renderer="hardware", **_):
        if level == "no_such_level":
            raise RuntimeError("level not found:\n no_such_level")
        assert observations == ["RGB_INTERLEAVED"]
        assert renderer == "software"
        assert all(isinstance(value, str) for value in config.values())
        self._level, self._size = level, (int(config["height"]), int(config["width"]))
        self._frame = np.empty((*self._size, 3), np.uint8)
        self._running = False

    def action_spec(self):
        names = [
            "LOOK_LEFT_RIGHT_PIXELS_PER_FRAME",
            "LOOK_DOWN_UP_PIXELS_PER_FRAME",
            "STRAFE_LEFT_RIGHT",
            "MOVE_BACK_FORWARD",
            "FIRE",
            "JUMP",
            "CROUCH",
        ]
        return [{"name": name, "min": -512, "max": 512} for name in names]

    def reset(self, seed=None, episode=-1):
        self._state, self._left, self._running = int(seed) + 7 * len(self._level), _STEPS, True

    def is_running(self):
        return self._running

    def observations(self):
        assert self._running, "Environment in wrong status for call to observations()"
        height, width = self._size
        y, x = np.mgrid[0:height, 0:width]
        planes = [(x * (self._state % 11 + 1) + y * 3 + self._state + 50 * plane) % 256 for plane in range(3)]
        self._frame[:] = np.stack(planes, axis=-1)  # what was given out before is overwritten
        return {"RGB_INTERLEAVED": self._frame}

    def step(self, action, num_steps=1):
        if action.dtype != np.intc or action.shape != (7,):
            raise ValueError("action must have datatype np.intc")
        self._state = (self._state * 31 + int(action[0]) + 3 * int(action[3]) + 5 * int(action[2])) % 100_003
        self._left -= num_steps
        self._running = self._left > 0
        return 0.0

    def close(self):
        self._running = False
