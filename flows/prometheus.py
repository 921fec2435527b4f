"""An endpoint for Prometheus: how the run of this process stands."""

import hmac
import os
import threading
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, Gauge, make_wsgi_app

from flows.trackers import Row
from tasks.config.trackers import Prometheus

# Figures of a stage that are gauges, and what they say.
STAGE = {
    "done": "What the stage has done, in its own unit",
    "total": "What the stage has to do, in its own unit",
    "rows": "Rows that the finished stage wrote",
    "tokens": "Response tokens written by this attempt, or trained on at this step",
    "tokens_per_second": "Response tokens a second",
    "loss": "Training loss, nats per response token",
    "loss_on_policy": "Training loss on the student's own sequences, nats per response token",
    "loss_off_policy": "Training loss on other sequences, nats per response token",
    "validation_loss": "The stage's own loss on rows set aside, nats per response token",
    "intervention_rate": "Share of rollout positions that the teacher decided",
    "response_length": "Mean tokens of a rollout",
    "eos_rate": "Share of rollouts that ended by themselves",
}
# What the teacher was charged by all stages of the run, requests under way at their worst.
TEACHER = {
    "queries": "Teacher queries charged to the run",
    "prompt_tokens": "Prompt tokens charged to the run",
    "completion_tokens": "Response tokens charged to the run",
    "money": "What the teacher cost, in the budget's currency",
}


class Quiet(WSGIRequestHandler):
    """Scrapes are no news."""

    def log_message(self, *_: Any) -> None: ...


class Server(ThreadingMixIn, WSGIServer):
    """Answers scrapes beside each other."""

    daemon_threads = True


class Gauges:
    """A tracker that Prometheus asks. It forgets with its process, as Prometheus expects."""

    def __init__(self, settings: Prometheus, run: str) -> None:
        self.run, self.current = run, ""
        self.newest: dict[str, int] = {}
        registry = CollectorRegistry()

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"switchyard_{name}", text, ("run", *labels), registry=registry)

        self.running = gauge("stage_running", "1 for the stage that is at work, 0 for those before it", "stage")
        self.stage = {name: gauge(f"stage_{name}", text, "stage") for name, text in STAGE.items()}
        self.teacher = {f"teacher_{name}": gauge(f"teacher_{name}", text) for name, text in TEACHER.items()}
        self.heldout = gauge("heldout", "Held-out metric of a model", "model", "metric")
        token = os.environ[settings.token_variable] if settings.token_variable else ""
        app: Any = make_wsgi_app(registry)
        self.server = make_server(
            settings.host, settings.port, guarded(app, token) if token else app, Server, handler_class=Quiet
        )
        threading.Thread(target=self.server.serve_forever, daemon=True, name="prometheus").start()

    def started(self, stage: str) -> None:
        if self.current:
            self.running.labels(self.run, self.current).set(0)
        self.current = stage
        self.running.labels(self.run, stage).set(1)

    def rows(self, stage: str, rows: list[Row]) -> None:
        for step, values in rows:
            if step < self.newest.get(stage, 0):
                continue  # what was not seen live is no news
            self.newest[stage] = step
            for name, value in values.items():
                if stage == "heldout":
                    self.heldout.labels(self.run, *name.split("/", 1)).set(value)
                elif name in self.teacher:
                    self.teacher[name].labels(self.run).set(value)
                elif name in self.stage:
                    self.stage[name].labels(self.run, stage).set(value)

    def said(self, name: str, text: str) -> None: ...

    def close(self, state: str) -> None:
        self.server.shutdown()
        self.server.server_close()


def guarded(app: Callable[..., Iterable[bytes]], token: str) -> Callable[..., Iterable[bytes]]:
    """The same, for those who send the token (``Authorization: Bearer …``)."""
    wanted = f"Bearer {token}".encode()

    def answer(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        if hmac.compare_digest(environ.get("HTTP_AUTHORIZATION", "").encode(), wanted):
            return app(environ, start)
        start("401 Unauthorized", [("WWW-Authenticate", "Bearer"), ("Content-Length", "0")])
        return [b""]

    return answer
