"""A promotion is an event, and an automation at a real Prefect server posts it to an HTTP receiver."""

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
# A process of its own: Prefect reads its settings when it is imported.
SCRIPT = """
import sys, time
from pathlib import Path
from flows.server import EmbeddedServer
from infra.store import LocalStore
from tasks.promoted import promote

home, url, store = Path(sys.argv[1]), sys.argv[2], LocalStore(Path(sys.argv[1]) / "root")
server = EmbeddedServer(home)
server.start()
try:
    server.wait()
    from flows.notify import announce, flush, webhook_on_promotion

    first = webhook_on_promotion(url)
    assert webhook_on_promotion(url) == first
    said = {"student": "s", "report": "r.html", "reason": 'say "better"', "verdict": "It learned <b>.", "metrics": {}}
    announce(promote(store, "weekly", None, run="weekly-1", fingerprint="f", manifest="m", **said), store)
    flush()
    input()
finally:
    server.stop()
"""


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_promotion_reaches_a_webhook(tmp_path: Path) -> None:
    received: list[dict] = []
    came = threading.Event()

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.append({"type": self.headers["Content-Type"], **json.loads(body)})
            self.send_response(200)
            self.end_headers()
            came.set()

        def log_message(self, *_: object) -> None: ...

    receiver = HTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=receiver.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{receiver.server_port}/hook"
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), url]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, text=True) as process:
        try:
            assert came.wait(400), "nothing came"
        finally:
            process.communicate("\n")
    receiver.shutdown()
    (message,) = received
    assert process.returncode == 0
    assert message["type"] == "application/json"
    assert message["text"].startswith('weekly: a new student is promoted. It learned <b>. say "better".')
    assert message["promotion"]["student"] == str(tmp_path / "root" / "s")
