"""A loopback web server of a folder with byte ranges, which fails on request (a stall lasts until the end): what the tests of stores read from."""

import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import patch


class FaultyServer(ThreadingHTTPServer):
    """Serves `folder`; the n-th range request suffers faults[n], if there is one."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.faults = folder, list[str]()
        self.ranges, self.connections, self.most_at_once, self.at_once = list[str](), 0, 0, 0
        self.delay, self.ended = 0.0, threading.Event()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/set"

    def next_fault(self, asked: str) -> str:
        with self.lock:
            self.ranges.append(asked)
            return self.faults.pop(0) if self.faults else ""

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections += 1
        super().process_request(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients of these tests hang up; that is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: FaultyServer

    def do_GET(self) -> None:
        path = self.server.folder / self.path.split("?")[0].rsplit("/", 1)[1]
        if not path.is_file():
            return self.answer(404, b"")
        asked = self.headers.get("Range", "")
        if not asked:
            return self.answer(200, path.read_bytes())
        first, last = (int(number) for number in asked.removeprefix("bytes=").split("-"))
        with self.server.lock:
            self.server.at_once += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.at_once)
        try:
            time.sleep(self.server.delay)
            self.fail(self.server.next_fault(f"{path.name} {first}-{last}"), path, first, last)
        finally:
            with self.server.lock:
                self.server.at_once -= 1
        return None

    def fail(self, fault: str, path: Path, first: int, last: int) -> None:
        size = path.stat().st_size
        with open(path, "rb") as file:
            file.seek(first)
            body = file.read(last + 1 - first)
        if fault == "stall":
            self.server.ended.wait(60)
        if fault == "reset":  # a reset and not an orderly end: linger for 0 s
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
        elif fault == "503":
            self.answer(503, b"slow down")
        elif fault == "ignores ranges":
            self.answer(200, path.read_bytes())
        elif fault == "wrong range":
            self.answer(206, body, f"bytes {first + 1}-{last + 1}/{size}")
        elif fault == "garbage":
            self.answer(206, bytes(len(body)), f"bytes {first}-{last}/{size}")
        else:
            sent = body[: len(body) // 2] if fault == "truncated" else body
            self.answer(206, sent, f"bytes {first}-{last}/{size}", len(body))
            self.close_connection |= fault == "truncated"

    def answer(
        self, status: int, body: bytes, content_range: str = "", length: int | None = None
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        if content_range:
            self.send_header("Content-Range", content_range)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


@contextmanager
def serving(folder: Path) -> Iterator[FaultyServer]:
    """The server, running; no proxy stands before it."""
    server = FaultyServer(folder)
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
    )
    thread.start()
    try:
        with patch.dict(os.environ, {"no_proxy": "*", "NO_PROXY": "*"}):
            yield server
    finally:
        server.ended.set()
        server.shutdown()
        server.server_close()
