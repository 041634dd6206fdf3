"""An HTTP proxy in front of an S3 server that fails now and then, as real stores do: 503s, resets, cut bodies."""

import contextlib
import http.client
import itertools
import os
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest

_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}


def faulty(monkeypatch: pytest.MonkeyPatch) -> "FaultyProxy":
    """A proxy in front of the test session's S3 server, to which this test goes from here on."""
    address = urlsplit(os.environ["AWS_ENDPOINT_URL"])
    proxy = FaultyProxy(str(address.hostname), int(address.port or 80))
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    return proxy


class FaultyProxy:
    """Forwards to host:port. Of every `period` requests one gets a 503 and one a reset; of every `period` GETs that
    come through, one gets half its body.

    down: while it is set, all requests get a 503. slow: requests to write a path that contains this wait for `pause`
    seconds, so that there is time to kill who writes. counts: how often each fault was dealt out.
    """

    def __init__(self, host: str, port: int, period: int = 9, slow: str = "", pause: float = 0.0) -> None:
        self.counts = {"503": 0, "reset": 0, "cut": 0}
        self.down = False
        numbers, gets, lock = itertools.count(1), itertools.count(1), threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_) -> None:
                pass

            def forward(self) -> None:
                body = self.body()
                with lock:
                    turn = next(numbers) % period
                    is_cut = self.command == "GET" and turn not in (2, 5) and next(gets) % period == 4
                if slow and self.command == "PUT" and slow in self.path:
                    time.sleep(pause)
                if turn == 2 or proxy.down:
                    return self.refuse()
                if turn == 5:
                    return self.reset()
                back = http.client.HTTPConnection(host, port, timeout=60)
                back.request(self.command, self.path, body=body, headers=self.kept(self.headers.items()))
                answer = back.getresponse()
                data = answer.read()
                self.send_response_only(answer.status, answer.reason)
                for name, value in self.kept(answer.getheaders()).items():
                    self.send_header(name, value)
                length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
                self.send_header("Content-Length", length or "0")
                self.end_headers()
                back.close()
                if is_cut and len(data) > 1:
                    proxy.counts["cut"] += 1
                    self.wfile.write(data[: len(data) // 2])
                    self.wfile.flush()
                    self.close_connection = True
                    return None
                self.wfile.write(data)
                return None

            def body(self) -> bytes:
                if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                    return self.rfile.read(int(self.headers.get("Content-Length") or 0))
                parts = []
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                while self.rfile.readline().strip():
                    pass
                return b"".join(parts)

            def kept(self, headers) -> dict[str, str]:
                return {name: value for name, value in headers if name.lower() not in _HOP_BY_HOP}

            def refuse(self) -> None:
                proxy.counts["503"] += 1
                text = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Reduce your rate</Message></Error>"
                self.send_response_only(503, "Slow Down")
                self.send_header("Content-Type", "application/xml")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(text)

            def reset(self) -> None:
                proxy.counts["reset"] += 1
                # Closing with a linger of 0 seconds sends RST.
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True
                self.connection.close()

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = forward

            def handle(self) -> None:
                with contextlib.suppress(OSError, ValueError):  # the connection was closed on purpose
                    super().handle()

            def finish(self) -> None:
                with contextlib.suppress(OSError, ValueError):
                    super().finish()

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_) -> None:
                pass

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
