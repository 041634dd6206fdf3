"""What the workers of a training and its driver tell each other, so that workers need no tracking client and the driver
can ask.

It stands in the key-value store of Ray's head: an actor would be a process more, which beside training on few cores
takes 1 % of one, and would be gone with the node that it happened to be on.
"""

import base64
import contextlib
import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

_POSTS, _FAILURE, _ASKED, _NODES = "post/", "failure", "ask/", "node/"


@dataclass(frozen=True)
class Board:
    """One for each call of a driver: what an earlier one asked for is not on it. Needs a connection to Ray.

    Raises `ray.exceptions.RayError` where Ray's head does not answer.
    """

    name: str = field(default_factory=lambda: f"training-{uuid.uuid4().hex}")

    def post(self, kind: str, step: int, value: Any) -> None:
        """kind: metrics, pictures (bytes by name), line, or end, which asks the driver to end the whole group."""
        if kind == "pictures":
            value = {name: base64.b64encode(data).decode() for name, data in value.items()}
        key = f"{_POSTS}{time.time_ns():020d}-{uuid.uuid4().hex[:8]}"
        self._put(key, json.dumps([kind, step, value]))

    def take_posts(self) -> list[tuple[str, int, Any]]:
        """What was posted since they were taken last, the oldest first."""
        found = []
        for key in self._keys(_POSTS):
            kind, step, value = json.loads(self._get(key) or "[null, 0, null]")
            self._delete(key)
            if kind == "pictures":
                value = {name: base64.b64decode(data) for name, data in value.items()}
            found.append((kind, step, value))
        return found

    def fail(self, kind: str, message: str) -> None:
        """Tell what ended training for good: an error that starting again would not mend. The first one stays."""
        self._put(_FAILURE, json.dumps([kind, message]), overwrite=False)

    def failure(self) -> tuple[str, str] | None:
        """Kind and message of that error."""
        found = self._get(_FAILURE)
        return None if found is None else tuple(json.loads(found))

    def ask(self, what: str) -> None:
        """what: save, which is taken once, or stop, which stays."""
        self._put(_ASKED + what, "")

    def take_asked(self) -> str:
        """What is asked for: stop, save, or "" for nothing."""
        asked = {key.removeprefix(_ASKED) for key in self._keys(_ASKED)}
        if "save" in asked:
            self._delete(_ASKED + "save")
        return "stop" if "stop" in asked else "save" if "save" in asked else ""

    def join(self, node: str) -> None:
        """A worker runs on that node."""
        self._put(_NODES + node, "")

    def nodes(self) -> set[str]:
        """Ids of the nodes that workers run on, or ran on."""
        return {key.removeprefix(_NODES) for key in self._keys(_NODES)}

    def close(self) -> None:
        """Leave nothing behind, where Ray's head is still there."""
        from ray.exceptions import RayError

        with contextlib.suppress(RayError):
            for key in self._keys(""):
                self._delete(key)

    def _put(self, key: str, value: str, *, overwrite: bool = True) -> None:
        from ray.experimental import internal_kv as store

        store._internal_kv_put(key, value, overwrite, namespace=self.name)

    def _get(self, key: str) -> str | None:
        from ray.experimental import internal_kv as store

        found = store._internal_kv_get(key, namespace=self.name)
        return None if found is None else found.decode()

    def _keys(self, prefix: str) -> list[str]:
        from ray.experimental import internal_kv as store

        return sorted(key.decode() for key in store._internal_kv_list(prefix, namespace=self.name))

    def _delete(self, key: str) -> None:
        from ray.experimental import internal_kv as store

        store._internal_kv_del(key, namespace=self.name)
