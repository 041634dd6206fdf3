"""Messages between a loader and its processes: JSON over a socket, with open files beside it."""

import json
import os
import socket
import struct
from collections import deque
from typing import Any

_HEAD = struct.Struct("<IB")  # bytes of JSON, number of files
_CHUNK, _MAX_FILES = 1 << 16, 64  # that are received at once


class ChannelClosedError(EOFError):
    """The other side is gone."""


class Channel:
    """One end of a connected socket."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._bytes = bytearray()  # that have come and were not asked for
        self._files: deque[int] = deque()

    def send(self, message: dict[str, Any], file: int | None = None) -> None:
        """Send JSON values and, where given, an open file. Raises `ChannelClosedError`."""
        body = json.dumps(message).encode()
        head = _HEAD.pack(len(body), file is not None)
        try:
            if file is None:
                self._end.sendall(head + body)
            else:
                socket.send_fds(self._end, [head], [file])
                self._end.sendall(body)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise ChannelClosedError from error

    def receive(self) -> tuple[dict[str, Any], int | None]:
        """The next message and its file, which is the caller's to close. Raises `ChannelClosedError`."""
        num_bytes, has_file = _HEAD.unpack(self._exactly(_HEAD.size))
        message = json.loads(self._exactly(num_bytes))
        return message, self._files.popleft() if has_file else None

    def _exactly(self, num_bytes: int) -> bytes:
        while len(self._bytes) < num_bytes:
            try:
                part, files, _, _ = socket.recv_fds(self._end, _CHUNK, _MAX_FILES)
            except ConnectionResetError as error:
                raise ChannelClosedError from error
            if not part:
                raise ChannelClosedError
            self._bytes += part
            self._files += files  # a file comes no later than the first byte that it was sent with
        found = bytes(self._bytes[:num_bytes])
        del self._bytes[:num_bytes]
        return found

    def close(self) -> None:
        self._end.close()
        while self._files:
            os.close(self._files.popleft())
