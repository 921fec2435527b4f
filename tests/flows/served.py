"""vLLM's own OpenAI server on a tiny model, and a proxy before it that fails on request and keeps the true bill."""

import json
import secrets
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from infra.cluster import free_port
from infra.process import Guarded

KEY = f"a-key-that-must-not-be-seen-{secrets.token_hex(6)}"
NAME = "tiny-teacher"
START_SECONDS = 400.0


@contextmanager
def vllm_server(model: Path, log: Path) -> Iterator[str]:
    """Address of vLLM's server on loopback, behind a key; it ends with the block, and with this process."""
    port = free_port()
    # What ``vllm serve`` starts. The command itself looks for a package named vllm, which the CPU build is not.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", NAME]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    # Seeded requests and split prompts exclude each other on CPU.
    command += ["--max-model-len", "512", "--max-num-batched-tokens", "4096", "--no-enable-chunked-prefill"]
    command += ["--enforce-eager", "--kv-cache-memory-bytes", str(64 << 20), "--max-num-seqs", "16"]
    environment = {
        "VLLM_API_KEY": KEY,
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
    }
    server = Guarded(command, log, {**environment, "VLLM_LOGGING_LEVEL": "WARNING"})
    try:
        deadline = time.monotonic() + START_SECONDS
        while not answers(f"http://127.0.0.1:{port}/health"):
            assert server.alive, server.tail(30)
            assert time.monotonic() < deadline, server.tail(30)
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.stop()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return reply.status == 200
    except (urllib.error.URLError, OSError):
        return False


class Proxy:
    """``faults`` are met by the next requests in turn, None by none: a status, ``slow`` (the answer comes too late) or
    ``hang up`` (it never does). Both of these ask the server, which bills what it wrote."""

    def __init__(self, target: str) -> None:
        self.target = target.removesuffix("/v1")
        self.faults: deque[int | str | None] = deque()
        self.retry_after: str | None = None
        self.slow_seconds = 3.0
        self.requests: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.under_way = self.most_under_way = 0
        self.billed = [0, 0, 0]  # requests, prompt and response tokens
        self.lock = threading.Lock()

    def reset(self, *faults: int | str | None) -> None:
        self.__init__(self.target)  # type: ignore[misc]
        self.faults.extend(faults)

    def forward(self, path: str, body: bytes | None, key: str) -> tuple[int, bytes]:
        headers = {"Authorization": key, "Content-Type": "application/json"}
        request = urllib.request.Request(self.target + path, data=body, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=300) as reply:
                status, data = reply.status, reply.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()
        if body:
            usage = json.loads(data)["usage"]
            with self.lock:
                counts = (1, usage["prompt_tokens"], usage["completion_tokens"])
                self.billed = [known + more for known, more in zip(self.billed, counts, strict=True)]
        return status, data


@contextmanager
def faulty(target: str) -> Iterator[tuple[str, Proxy]]:
    """Address of a proxy before ``target``, and its controls."""
    proxy = Proxy(target)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.reply(*proxy.forward(self.path, None, self.headers.get("Authorization", "")))

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            with proxy.lock:
                fault = proxy.faults.popleft() if proxy.faults else None
                proxy.requests.append(json.loads(body))
                proxy.times.append(time.monotonic())
                proxy.under_way += 1
                proxy.most_under_way = max(proxy.most_under_way, proxy.under_way)
            if isinstance(fault, int):
                # As services do that repeat what they were given.
                said = {"error": f"on request; you sent {self.headers.get('Authorization')}"}
                status, data = fault, json.dumps(said).encode()
            else:
                status, data = proxy.forward(self.path, body, self.headers.get("Authorization", ""))
            if fault == "slow":
                time.sleep(proxy.slow_seconds)
            with proxy.lock:
                proxy.under_way -= 1
            if fault == "hang up":
                self.close_connection = True
                return
            with suppress(BrokenPipeError, ConnectionResetError):  # who asked may have given up
                self.reply(status, data)

        def reply(self, status: int, data: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            if proxy.retry_after and status == 429:
                self.send_header("Retry-After", proxy.retry_after)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", free_port()), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", proxy
    finally:
        server.shutdown()
        server.server_close()
