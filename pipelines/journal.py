"""What is to be told to a store that may be down: in order, by a thread of its own, kept in a file while it waits.

Whoever tells never waits. An entry is sent again where a kill came between its arrival there and its end here, so that
sending one twice must do no harm.
"""

import contextlib
import json
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from vqvae_core.errors import InputError
from vqvae_core.storage import Folder

Entry = Mapping[str, Any]  # a JSON object
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 15.0  # seconds between two attempts
_SECONDS_BETWEEN_SAVES = 10.0
_PLACE = "tracking"
_SECONDS_OF_HOPE = 5.0  # for a store that does not answer, at the end


class RefusedError(Exception):
    """The store answers, and will never take this entry."""


class Journal:
    """Entries on their way to a store.

    send: takes one entry; raises `RefusedError` where the store will never take it, anything else where it should be
    tried again. folder: its `tracking/` has files of what was not sent when a journal ended, each of its own name, so
    that several may share it; a new one sends what it finds there first.
    """

    def __init__(
        self,
        send: Callable[[Entry], None],
        folder: Folder,
        *,
        say: Callable[[str], None] = print,
        first_pause: float = _FIRST_PAUSE,
    ) -> None:
        self._send, self._folder, self._say, self._first_pause = send, folder, say, first_pause
        self._changed = threading.Condition()
        self._own_file, self._files = f"{_PLACE}/waiting-{uuid.uuid4().hex[:12]}.json", set[str]()
        self._waiting: deque[Entry] = deque(self._kept())
        self._failures, self._saved, self._closed, self._hurried = 0, 0.0, False, False
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    def put(self, entry: Entry) -> None:
        """Append an entry. Never waits for the store."""
        with self._changed:
            self._waiting.append(entry)
            self._changed.notify_all()

    def wait(self, seconds: float) -> bool:
        """Whether all was sent within so many seconds; within a few of them where the store does not answer."""
        begin = time.monotonic()
        with self._changed:
            self._hurried = True  # whoever waits does not wait for a pause to end
            self._changed.notify_all()
            while self._waiting:
                left = begin + (min(seconds, _SECONDS_OF_HOPE) if self._failures else seconds) - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(min(left, 1.0))
            self._hurried = False
            return not self._waiting

    def close(self, seconds: float) -> int:
        """Give the store so many seconds, then keep in the file what it did not take. Returns how many entries."""
        self.wait(seconds)
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(seconds)
        if self._waiting:
            self._save()
        return len(self._waiting)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                entry = self._waiting[0]
            try:
                self._send(entry)
            except RefusedError as error:
                self._say(f"tracking: left out, since the store refuses it: {_reason(error)}")
            except Exception as error:  # a store can fail in any way; none of them may stop work
                self._pause(error)
                continue
            self._arrived()

    def _pause(self, error: Exception) -> None:
        if not self._failures:
            reason = _reason(error)
            self._say(f"tracking: the store does not answer ({reason}); what is logged waits, and is sent later")
        self._failures += 1
        if time.monotonic() - self._saved > _SECONDS_BETWEEN_SAVES:
            self._save()
        pause = min(_LONGEST_PAUSE, self._first_pause * 2 ** min(self._failures - 1, 10))
        deadline = time.monotonic() + pause
        with self._changed:
            while not self._closed and (left := deadline - time.monotonic()) > 0:  # an entry more ends no pause
                if self._hurried and pause - left >= self._first_pause:
                    return
                self._changed.wait(min(left, self._first_pause) if self._hurried else left)

    def _arrived(self) -> None:
        """The first of the waiting entries is done with."""
        if self._failures:
            self._say(f"tracking: the store answers again, {len(self._waiting)} waiting entries are sent")
            self._failures = 0
        if self._files and len(self._waiting) == 1:  # what comes meanwhile was never in a file
            with contextlib.suppress(OSError, InputError):
                for name in sorted(self._files):
                    self._folder.delete(name)
                self._files.clear()
        with self._changed:
            self._waiting.popleft()
            self._changed.notify_all()

    def _save(self) -> None:
        with self._changed:
            text = json.dumps(list(self._waiting))
        try:
            self._folder.write(self._own_file, text.encode())
            with contextlib.suppress(OSError, InputError):
                for name in sorted(self._files - {self._own_file}):  # what they have is in the new one too
                    self._folder.delete(name)
            self._files = {self._own_file}
        except (OSError, InputError) as error:  # the curves are in the artifacts as well
            self._say(f"tracking: what waits could not be kept: {_reason(error)}")
        self._saved = time.monotonic()

    def _kept(self) -> list[Entry]:
        """What the files of earlier journals have, and of others that run beside this one."""
        found: list[Entry] = []
        try:
            names = [f"{_PLACE}/{name}" for name in self._folder.list(_PLACE) if name.startswith("waiting-")]
        except (OSError, InputError):  # the work will say what is the matter with its root
            names = []
        for name in names:
            try:
                entries = json.loads(self._folder.read(name))
            except OSError:  # another one has just sent it; or the next command will
                continue
            except ValueError:
                entries = None
            if isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries):
                found += entries
                self._files.add(name)
            else:
                self._say(f"tracking: {self._folder.path(name)} is not a list of entries; it is left out")
        return found


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
