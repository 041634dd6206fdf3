"""Messages between a loader and its processes: JSON over a socket, with open files beside it."""

import json
import socket
import struct
from typing import Any

_HEAD = struct.Struct("<IB")  # bytes of JSON, number of files


class ChannelClosedError(EOFError):
    """The other side is gone."""


class Channel:
    """One end of a connected socket."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end

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
        try:
            head, files, _, _ = socket.recv_fds(self._end, _HEAD.size, 1)
            head += self._exactly(_HEAD.size - len(head)) if head else b""
            if len(head) < _HEAD.size:
                raise ChannelClosedError
            num_bytes, has_file = _HEAD.unpack(head)
            return json.loads(self._exactly(num_bytes)), files[0] if has_file else None
        except ConnectionResetError as error:
            raise ChannelClosedError from error

    def _exactly(self, num_bytes: int) -> bytes:
        parts = bytearray()
        while len(parts) < num_bytes:
            part = self._end.recv(num_bytes - len(parts))
            if not part:
                raise ChannelClosedError
            parts += part
        return bytes(parts)

    def close(self) -> None:
        self._end.close()
