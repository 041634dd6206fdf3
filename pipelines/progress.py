"""How long work shows itself: a bar with rate and time left on a terminal, plain lines in a log."""

import sys
import time

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 15.0


class Progress:
    """Counts to `total`. Use as a context manager."""

    def __init__(self, name: str, total: int, unit: str, *, done: int = 0) -> None:
        self.total, self.done = total, done
        self._name, self._unit = name, unit
        self._first, self._begin, self._last = done, time.monotonic(), time.monotonic()
        terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=done, desc=name, unit=unit, leave=False) if terminal else None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance_to(self, done: int, note: str = "") -> None:
        """Set the count; note: a few words on how it goes (loss=...)."""
        step, self.done = done - self.done, done
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(step)
            return
        now = time.monotonic()
        if now - self._last >= _SECONDS_BETWEEN_LINES and done < self.total:
            self._last = now
            rate = (done - self._first) / (now - self._begin)
            left = f", {(self.total - done) / rate:.0f} s left" if rate > 0 else ""
            print(f"{self._name}: {done} of {self.total} {self._unit}, {rate:.1f}/s{left} {note}".rstrip(), flush=True)
