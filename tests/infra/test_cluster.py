"""Jobs on a real Ray head: every line of their log comes, once, and the last ones at once."""

import shlex
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from infra.cluster import FINAL, Cluster, Job, running_jobs, stop_jobs, submit

pytestmark = pytest.mark.long
LINES = 300


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    found = Cluster()
    try:
        yield found
    finally:
        found.close()


def test_lines_of_a_job_come_once_and_without_waiting_for_the_tail(cluster: Cluster) -> None:
    # The second half is written right before the end, and the last line has no end.
    script = "; ".join(
        [
            "import time",
            "[print('line', n, flush=True) for n in range(100)]",
            "time.sleep(6)",
            f"print('\\n'.join(f'line {{n}}' for n in range(100, {LINES})), end='')",
        ]
    )
    job = submit(cluster, "lines", shlex.join([sys.executable, "-c", script]), {}, {})
    seen = []
    while job.status not in FINAL:
        seen += job.lines()
        time.sleep(0.1)
    began = time.monotonic()
    early = len(seen)
    seen += job.rest()
    assert time.monotonic() - began < 1
    written = [line for line in seen if line.startswith("line ")]
    assert written == [f"line {n}" for n in range(LINES)]
    assert early >= 100


def test_a_log_that_cannot_be_read_again_comes_by_its_tail(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    job = submit(cluster, "tail", "echo first; sleep 3; echo last", {}, {})
    while job.status not in FINAL:
        time.sleep(0.1)

    def unreachable(_: str) -> str:
        raise RuntimeError("no agent")

    monkeypatch.setattr(cluster.client, "get_job_logs", unreachable)
    assert [line for line in job.rest() if line in ("first", "last")] == ["first", "last"]


def test_a_submission_whose_answer_was_lost_is_adopted(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    real, answers = cluster.client.submit_job, []

    def lossy(**job: Any) -> str:
        answers.append(real(**job))
        raise RuntimeError("Request failed with status code 500: ServerDisconnectedError: Server disconnected.")

    monkeypatch.setattr(cluster.client, "submit_job", lossy)
    job = submit(cluster, "lost", "sleep 30", {}, {"run": "mine"})
    assert answers == ["lost"]
    assert running_jobs(cluster) == {"lost": {"run": "mine"}}
    stop_jobs(cluster, ["lost"])
    assert job.status == "STOPPED"


def test_a_job_that_its_head_does_not_know_is_lost(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    # As after a head was started anew.
    job = Job(cluster, "of-another-head")
    assert job.status == "LOST"
    assert job.status in FINAL
    # And while there is none.
    monkeypatch.setattr(cluster.client, "_address", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1"):
        _ = job.status
