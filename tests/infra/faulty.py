"""A proxy before an S3 server that fails as networks and servers do: for real, over HTTP, one fault at a time.

Requests pass through until a fault is armed; then the first try of every request meets it and its repetition passes,
so that whatever is asked meets the fault exactly once.
"""

import http.client
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlparse

# Seconds of silence; clients of these tests give up sooner.
SILENCE = 1.0
# Headers of one connection, not of the message.
HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "expect"}


class Exchange(BaseHTTPRequestHandler):
    """One client connection."""

    protocol_version = "HTTP/1.1"
    server: "FaultyProxy"

    def _serve(self) -> None:
        self.asked = self._body()
        fault = self.server.next_fault(f"{self.command} {self.path}")
        (fault or pass_on)(self)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def forward(self) -> tuple[int, list[tuple[str, str]], bytes]:
        """The server's own answer: status, headers, body."""
        connection = http.client.HTTPConnection(*self.server.backend, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP}
        connection.request(self.command, self.path, self.asked, headers)
        answer = connection.getresponse()
        found = answer.status, answer.getheaders(), answer.read()
        connection.close()
        return found

    def begin(self, status: int, headers: list[tuple[str, str]], length: int) -> None:
        self.send_response(status)
        for name, value in headers:
            if name.lower() not in HOP | {"date", "server"}:
                self.send_header(name, value)
        given = [value for name, value in headers if name.lower() == "content-length"]
        # The answer to HEAD tells the length of a body that does not come.
        self.send_header("Content-Length", given[0] if self.command == "HEAD" and given else str(length))
        self.end_headers()
        self.wfile.flush()

    def hang_up(self) -> None:
        """End the connection with a reset."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()


def pass_on(exchange: Exchange) -> None:
    status, headers, body = exchange.forward()
    exchange.begin(status, headers, len(body))
    exchange.wfile.write(body)


def refuses(status: int, code: str) -> Callable[[Exchange], None]:
    """An error of the server's own."""

    def answer(exchange: Exchange) -> None:
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
        exchange.begin(status, [("Content-Type", "application/xml")], len(body))
        if exchange.command != "HEAD":
            exchange.wfile.write(body)

    return answer


def silent(exchange: Exchange) -> None:
    """No answer, and nothing done."""
    time.sleep(SILENCE)
    exchange.hang_up()


def reset(exchange: Exchange) -> None:
    """The connection ends before the server has seen the request."""
    exchange.hang_up()


def lost(exchange: Exchange) -> None:
    """Done, but the answer never comes: the connection ends."""
    exchange.forward()
    exchange.hang_up()


def lost_in_silence(exchange: Exchange) -> None:
    """Done, but the answer never comes: nothing does."""
    exchange.forward()
    silent(exchange)


def cut(exchange: Exchange) -> None:
    """Half of the answer's body, then a reset; of an empty one, nothing at all."""
    status, headers, body = exchange.forward()
    if body and exchange.command != "HEAD":
        exchange.begin(status, headers, len(body))
        exchange.wfile.write(body[: len(body) // 2])
        exchange.wfile.flush()
    exchange.hang_up()


def stalled(exchange: Exchange) -> None:
    """Half of the answer's body, then silence."""
    status, headers, body = exchange.forward()
    exchange.begin(status, headers, len(body))
    if body and exchange.command != "HEAD":
        exchange.wfile.write(body[: len(body) // 2])
        exchange.wfile.flush()
    silent(exchange)


def slow(exchange: Exchange) -> None:
    """The answer's body in ten pieces with pauses between them."""
    status, headers, body = exchange.forward()
    exchange.begin(status, headers, len(body))
    size = max(1, len(body) // 10)
    for start in range(0, len(body), size):
        time.sleep(0.02)
        exchange.wfile.write(body[start : start + size])
        exchange.wfile.flush()


FAULTS: dict[str, Callable[[Exchange], None]] = {
    "500": refuses(500, "InternalError"),
    "503": refuses(503, "ServiceUnavailable"),
    "SlowDown": refuses(503, "SlowDown"),
    "timeout": silent,
    "reset": reset,
    "lost answer": lost,
    "lost answer, silence": lost_in_silence,
    "cut body": cut,
    "stalled body": stalled,
    "slow body": slow,
}


class FaultyProxy(ThreadingHTTPServer):
    """Listens on loopback; ``url`` stands for the server behind it."""

    daemon_threads = True

    def __init__(self, backend: str) -> None:
        super().__init__(("127.0.0.1", 0), Exchange)
        place = urlparse(backend)
        assert place.hostname
        assert place.port
        self.backend = place.hostname, place.port
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.fault: Callable[[Exchange], None] | None = None
        self.failed: set[str] = set()
        self.always = False
        self._lock = threading.Lock()

    def next_fault(self, request: str) -> Callable[[Exchange], None] | None:
        with self._lock:
            if self.fault is None or (request in self.failed and not self.always):
                return None
            self.failed.add(request)
            return self.fault

    @contextmanager
    def failing(self, fault: str, always: bool = False) -> Iterator[set[str]]:
        """Arm a fault for the block; yields the requests that met it. ``always``: repetitions meet it too."""
        self.fault, self.failed, self.always = FAULTS[fault], set(), always
        try:
            yield self.failed
        finally:
            self.fault = None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that gave up, or that was hung up on."""


@contextmanager
def faulty(backend: str) -> Iterator[FaultyProxy]:
    """The proxy before a server, running."""
    with FaultyProxy(backend) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        try:
            yield proxy
        finally:
            proxy.shutdown()
