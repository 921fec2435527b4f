"""Child processes that never outlive what started them, however it ended.

A guarded child runs below a small guard (``python -m infra.process``) that watches a pipe to its parent. When the pipe
closes, be it by ``stop``, Ctrl-C or ``kill -9`` of the parent, the guard ends every process that carries its token in
the environment, wherever it was re-parented to: Ray's workers and vLLM's engine cores included.
"""

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

TOKEN = "SWITCHYARD_GUARD"
TERM_SECONDS = 4.0


def marked(token: str) -> Iterator[psutil.Process]:
    """Processes of this user that carry the token, this one excepted."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get(TOKEN) == token:
                yield process


def end(token: str, grace: float = TERM_SECONDS) -> None:
    """SIGTERM to every marked process, SIGKILL to what is left after ``grace`` seconds, until none is left."""
    for process in (processes := list(marked(token))):
        with suppress(psutil.Error):
            process.terminate()
    psutil.wait_procs(processes, timeout=grace)
    # A process may have forked while it was being ended.
    while processes := list(marked(token)):
        for process in processes:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(processes, timeout=1)


class Guarded:
    """A running child with everything below it."""

    def __init__(
        self,
        command: list[str],
        log: Path,
        environment: dict[str, str] | None = None,
        grace: float = TERM_SECONDS,
    ) -> None:
        """``grace``: seconds between SIGTERM and SIGKILL when it is ended."""
        self.token = uuid.uuid4().hex
        self.log, self.grace = log, grace
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self.guard = subprocess.Popen(
                [sys.executable, "-m", "infra.process", self.token, str(grace), *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                # Ctrl-C in a terminal goes to the whole foreground group: the guard must not be in it.
                start_new_session=True,
            )

    @property
    def alive(self) -> bool:
        return self.guard.poll() is None

    def tail(self, lines: int = 5) -> str:
        """The last lines the child wrote."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def stop(self) -> None:
        """End the child and everything below it; returns when it is gone."""
        assert self.guard.stdin is not None
        self.guard.stdin.close()
        try:
            self.guard.wait(timeout=self.grace + 5)
        except subprocess.TimeoutExpired:
            self.guard.kill()
            end(self.token, grace=0)


def detached(command: list[str], log: Path, environment: dict[str, str], token: str) -> int:
    """Start a child that stays when this process ends; ``end(token)`` ends it. Returns its process id."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment, TOKEN: token},
            start_new_session=True,
        ).pid


def guard(token: str, grace: float, command: list[str]) -> int:
    """Run the command until it ends or the pipe on stdin closes, then leave nothing behind."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A SIGTERM to the guard is a request to end what it guards.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    os.set_blocking(0, False)
    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, env={**os.environ, TOKEN: token})
        while child.poll() is None:
            with suppress(BlockingIOError):
                if os.read(0, 1) == b"":
                    break
            time.sleep(0.1)
        return child.returncode or 0
    finally:
        end(token, grace)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Ctrl-C and SIGTERM do nothing meanwhile: a worker's may come while a cancel is being carried out."""
    kinds = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {kind: signal.signal(kind, signal.SIG_IGN) for kind in kinds}
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


if __name__ == "__main__":
    sys.exit(guard(sys.argv[1], float(sys.argv[2]), sys.argv[3:]))
