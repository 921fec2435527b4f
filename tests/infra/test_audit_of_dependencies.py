"""``make audit`` against a server that answers as api.osv.dev does: what is known fails, what is accepted does not, and
where nobody answers nothing was audited."""

import json
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from infra.cluster import free_port

ROOT = Path(__file__).parent.parent.parent
KNOWN = {
    "id": "GHSA-m9c2-8r5x-vfgh",
    "modified": "2026-01-01T00:00:00Z",
    "published": "2026-01-01T00:00:00Z",
    "summary": "nothing real",
    "affected": [
        {
            "package": {"name": "pyarrow", "ecosystem": "PyPI"},
            "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "999"}]}],
        }
    ],
}


ASKED: set[str] = set()


class Osv(BaseHTTPRequestHandler):
    """Knows of one vulnerability of one package."""

    def do_POST(self) -> None:
        package = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["package"]["name"]
        ASKED.add(package)
        answer = json.dumps({"vulns": [KNOWN]} if package == "pyarrow" else {}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def osv() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Osv) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/v1/query"
        server.shutdown()


def audit(url: str, accepted: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = ["make", "--no-print-directory", "audit", f"OSV_URL={url}", f"ACCEPTED={accepted}", *more]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_what_is_known_fails_until_it_is_accepted(osv: str, tmp_path: Path) -> None:
    (accepted := tmp_path / "audit.txt").write_text("# none\n")
    found = audit(osv, accepted)
    if "pip-audit is not reached" in found.stderr:
        pytest.skip(f"pip-audit is not to be had here: {found.stderr}")
    assert found.returncode != 0
    assert KNOWN["id"] in found.stdout
    assert {"torch", "prefect", "ray"} <= ASKED
    accepted.write_text(f"{KNOWN['id']} pyarrow nothing real\n")
    found = audit(osv, accepted)
    assert found.returncode == 0, found.stdout + found.stderr
    assert found.stdout.startswith("audit: No known vulnerabilities found, 1 ignored")


def test_a_service_that_is_not_reached_has_audited_nothing(tmp_path: Path) -> None:
    (accepted := tmp_path / "audit.txt").write_text("# none\n")
    nobody = f"http://127.0.0.1:{free_port()}/v1/query"
    found = audit(nobody, accepted)
    assert found.returncode != 0
    assert f"audit: not done, {nobody} or pip-audit is not reached" in found.stderr
    assert audit(nobody, accepted, "UNREACHABLE=0").returncode == 0
