"""A helper process for code that must not run in ours, asked over JSON lines.

    python -m tasks.child math | reasoning_gym        (started by ``ask``; by hand it reads requests from stdin)

- Scorers and math-verify evaluate what a model wrote, and ``9**9**9**9`` takes all time and memory there is. Each such
  request has a limit of processor time that the kernel enforces by ending the process (a timer without a handler also
  ends C code, works whatever thread asks, and outlives a killed parent), and the process may take 4 GiB.
- Some generators of reasoning-gym iterate over sets, so their problems differ between processes unless the hash seed is
  fixed, which must happen before Python starts.
"""

import atexit
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import lru_cache
from typing import Any

MEMORY_BYTES = 4 << 30
# Of processor time, not of the clock: a busy machine changes no verdict.
JUDGING_SECONDS = 5
# Requests with that limit; generators may take their time.
JUDGING = {"score", "math_answer", "math_equal"}


class Unanswered(Exception):
    """The helper gave no answer: what it ran raised, or went beyond its time or memory."""


class Child:
    """One helper process of a kind, started at the first request and again after it died."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.lock = threading.Lock()
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tasks.child", self.kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        )
        assert process.stdout
        if process.stdout.readline() != "ready\n":
            raise RuntimeError(f"the helper process for {self.kind} did not start; its message stands above")
        atexit.register(process.kill)
        return process

    def ask(self, op: str, arguments: list[Any]) -> Any:
        with self.lock:
            self.process = process = self.process or self.start()
            assert process.stdin
            assert process.stdout
            try:
                process.stdin.write(json.dumps([op, arguments]) + "\n")
                process.stdin.flush()
                line = process.stdout.readline()
            except BrokenPipeError:
                line = ""
            if not line:
                self.process = None
                process.stdout.close()
                atexit.unregister(process.kill)
                raise Unanswered(f"{op} ended its process (status {process.wait()}): out of time or memory")
        reply = json.loads(line)
        if "error" in reply:
            raise Unanswered(reply["error"])
        return reply["value"]


# By process too: a fork must not share its parent's pipes.
@lru_cache(maxsize=8)
def child(kind: str, process_id: int) -> Child:
    return Child(kind)


def ask(kind: str, op: str, *arguments: Any) -> Any:
    """The value of ``op(*arguments)`` in the helper process ``kind`` (JSON both ways). Unanswered where it raised, took
    more than 5 s of a processor or 4 GiB."""
    return child(kind, os.getpid()).ask(op, list(arguments))


def math_ops() -> dict[str, Callable[..., Any]]:
    from math_verify import parse, verify

    def read(text: str) -> list[Any]:
        return parse(text, parsing_timeout=None)

    def math_answer(text: str) -> list[str] | None:
        """The expression as it stands in the text and as sympy writes it; a number with 12 digits."""
        found = read(text)
        if not found or isinstance(found[0], str):
            return None
        value = found[0].evalf(15) if getattr(found[0], "is_number", False) else found[0]
        return [str(found[-1]), f"{float(value):.12g}" if getattr(value, "is_Float", False) else str(value)]

    def math_equal(text: str, answer: str) -> bool | None:
        """None where the known answer cannot be read."""
        # Bare LaTeX is read only between dollars.
        gold = read(answer if "$" in answer or "\\boxed" in answer else f"${answer}$") or read(answer)
        return verify(gold, read(text), timeout_seconds=None) if gold else None

    return {"math_answer": math_answer, "math_equal": math_equal}


def reasoning_gym_ops() -> dict[str, Callable[..., Any]]:
    from dataclasses import fields

    from reasoning_gym.factory import DATASETS, create_dataset

    @lru_cache(maxsize=64)
    def dataset(name: str, options: str) -> Any:
        return create_dataset(name, **json.loads(options))

    def options_of(name: str) -> list[str] | None:
        """Names of a task's options; None where there is no such task."""
        return [field.name for field in fields(DATASETS[name][1])] if name in DATASETS else None

    def problems(name: str, options: str, start: int, stop: int) -> list[dict[str, Any]]:
        entries = (dataset(name, options)[number] for number in range(start, stop))
        return [{key: entry[key] for key in ("question", "answer", "metadata")} for entry in entries]

    def score(name: str, options: str, text: str, answer: str | None, metadata: dict[str, Any]) -> float:
        """0 to 1, by the task's own measure."""
        return float(dataset(name, options).score_answer(text, {"answer": answer, "metadata": metadata}))

    return {"tasks": lambda: sorted(DATASETS), "options": options_of, "problems": problems, "score": score}


def serve(kind: str) -> None:
    """Answer requests until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # What a library prints must not stand among the replies.
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    logging.disable()
    ops = {"math": math_ops, "reasoning_gym": reasoning_gym_ops}[kind]()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        op, arguments = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, JUDGING_SECONDS if op in JUDGING else 0)
        # Generators and scorers raise anything, by what stands in a text or an option; the asker decides what it means.
        try:
            reply = {"value": ops[op](*arguments)}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"[:500]}
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(reply, default=str), file=replies, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1])
