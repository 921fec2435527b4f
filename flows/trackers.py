"""Where a run is followed beside Prefect, as set in ``trackers``: what stages tell, their curves and metrics.

One thread hands everything on, so that a slow server holds up no stage and no cancel. A tracker that fails is left out
from then on, with a warning: it ends no run. Each flow run is one run in each tracker.
"""

import importlib.util
import os
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

from infra.manifest import Manifest
from infra.parts import read_rows
from infra.store import Store
from tasks.config import RunConfig
from tasks.config.trackers import Prometheus, Trackers

# Package and extra of each tracker.
NEEDS = {
    "mlflow": ("mlflow", "mlflow"),
    "wandb": ("wandb", "wandb"),
    "tensorboard": ("tensorboardX", "tensorboard"),
    "prometheus": ("prometheus_client", "prometheus"),
}
# So long the end of a run waits for what is still to be handed on, and that of a run that was cancelled.
CLOSE_SECONDS, CANCEL_SECONDS = 60.0, 3.0
Row = tuple[int, dict[str, float]]


class Tracker(Protocol):
    """One place where runs are followed. Called from one thread."""

    def started(self, stage: str) -> None:
        """A stage begins its work."""

    def rows(self, stage: str, rows: list[Row]) -> None:
        """Figures of a stage by step, by name."""

    def said(self, name: str, text: str) -> None:
        """A fact in words: a link, a verdict."""

    def close(self, state: str) -> None:
        """The run ended: Completed, Failed or Cancelled."""


def numbers(event: dict[str, Any]) -> dict[str, float]:
    """Figures of a progress event; what the teacher was charged by all stages of the run among them."""
    charged = event.get("charged") or {}
    spend = {f"teacher_{name}": value for name, value in charged.items()}
    return {name: float(value) for name, value in {**event, **spend}.items() if isinstance(value, int | float)}


def curve(store: Store, manifest: Manifest) -> Iterator[Row]:
    """Rows of a training stage's whole curve."""
    if "steps" in manifest.tables:
        for row in read_rows(store, manifest, "steps").to_pylist():
            yield row.pop("step"), numbers(row)


def measured(metrics: dict[str, Any]) -> dict[str, float]:
    """Held-out metrics by ``model/metric``, with the bounds of their intervals."""
    found: dict[str, float] = {}
    for label, values in metrics.items():
        for name, value in (values or {}).items():
            if isinstance(value, int | float):
                found[f"{label}/{name}"] = float(value)
            elif name.endswith("_ci") and value:
                found |= {f"{label}/{name[:-3]}_low": value[0], f"{label}/{name[:-3]}_high": value[1]}
    return found


class Following:
    """The trackers of one run, behind their thread."""

    def __init__(self, config: RunConfig, run: str, store: Store, log: Any) -> None:
        self.store, self._log, self._queue = store, log, queue.SimpleQueue[Callable[[Tracker], None] | None]()
        self._live: dict[str, dict[int, set[str]]] = {}
        self._openers = openers(config, run, store)
        self._thread: threading.Thread | None = None
        if self._openers:
            self._thread = threading.Thread(target=self._hand_on, daemon=True, name="trackers")
            self._thread.start()

    def started(self, stage: str) -> None:
        if self._thread:
            self._queue.put(lambda tracker: tracker.started(stage))

    def progress(self, stage: str, event: dict[str, Any]) -> None:
        if self._thread:
            step, values = int(event["done"]), numbers(event)
            self._live.setdefault(stage, {})[step] = set(values)
            self._queue.put(lambda tracker: tracker.rows(stage, [(step, values)]))

    def finished(self, stage: str, manifest: Manifest) -> None:
        """A stage's result stands, made now or earlier: what of its curve was not seen live, metrics, the report."""
        if self._thread is None:
            return
        live = self._live.pop(stage, {})
        rows = [
            (step, {name: value for name, value in values.items() if name not in live.get(step, ())})
            for step, values in curve(self.store, manifest)
        ]
        count = sum(table.rows for table in manifest.tables.values())
        rows.append((rows[-1][0] if rows else max(live, default=0), {"rows": float(count)}))
        self._queue.put(lambda tracker: tracker.rows(stage, rows))
        if metrics := measured(manifest.facts.get("metrics") or {}):
            self._queue.put(lambda tracker: tracker.rows("heldout", [(0, metrics)]))
        if report := manifest.facts.get("report"):
            said = {"report": self.store.location(report), "verdict": manifest.facts["verdict"]}
            for name, text in said.items():
                self._queue.put(partial(tell, name=name, text=text))

    def close(self, state: str) -> None:
        """Hand on what is left, for a while."""
        if self._thread:
            self._queue.put(lambda tracker: tracker.close(state))
            self._queue.put(None)
            self._thread.join(CANCEL_SECONDS if state == "Cancelled" else CLOSE_SECONDS)
            if self._thread.is_alive():
                self._log.warning("trackers: not all of this run was handed on in time")

    def _hand_on(self) -> None:
        """The thread: every message to every tracker that still works."""
        trackers: dict[str, Tracker] = {}

        def enter(name: str) -> None:
            trackers[name] = self._openers[name]()

        for name in self._openers:
            self._guarded(trackers, name, partial(enter, name))
        while (message := self._queue.get()) is not None:
            for name, tracker in list(trackers.items()):
                self._guarded(trackers, name, partial(message, tracker))

    def _guarded(self, trackers: dict[str, Tracker], name: str, act: Callable[[], Any]) -> None:
        try:
            act()
        except Exception as error:  # whatever a tracker's library or server may come up with
            trackers.pop(name, None)
            line = " ".join(str(error).split())[:300]
            self._log.warning("trackers.%s: left out from now on: %s: %s", name, type(error).__name__, line)


def tell(tracker: Tracker, name: str, text: str) -> None:
    tracker.said(name, text)


def openers(config: RunConfig, run: str, store: Store) -> dict[str, Callable[[], Tracker]]:
    """How each tracker that is set is opened. Their libraries are imported there, in the thread."""
    from flows import tracked

    found: dict[str, Callable[[], Tracker]] = {}
    chosen, settings = config.trackers, config.model_dump(mode="json")
    if chosen.mlflow:
        found["mlflow"] = partial(tracked.MlflowRun, chosen.mlflow, config.name, run, settings)
    if chosen.wandb:
        found["wandb"] = partial(tracked.WandbRun, chosen.wandb, run, settings, store.uri)
    if chosen.tensorboard:
        found["tensorboard"] = partial(tracked.TensorBoardRun, chosen.tensorboard, run, settings)
    if chosen.prometheus:
        found["prometheus"] = partial(tracked_endpoint, chosen.prometheus, run)
    return found


def tracked_endpoint(settings: Prometheus, run: str) -> Tracker:
    from flows.prometheus import Gauges

    return Gauges(settings, run)


def usable(trackers: Trackers) -> list[str]:
    """What stands in the way of the trackers that are set, one line each."""
    found = [
        f"trackers.{name}: the package {package} is missing: pip install 'switchyard[{extra}]', or leave it out"
        for name, (package, extra) in NEEDS.items()
        if getattr(trackers, name) is not None and importlib.util.find_spec(package) is None
    ]
    if trackers.prometheus and not found:
        found += listenable(trackers.prometheus)
    return found


def listenable(settings: Prometheus) -> list[str]:
    """What stands in the way of an endpoint."""
    where = "trackers.prometheus"
    if settings.token_variable and not os.environ.get(settings.token_variable):
        return [f"{where}.token_variable: {settings.token_variable} is not set: export it with the token"]
    try:
        family, *_, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # As the server will: an address that its last user has just left is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        said = f"{settings.host}:{settings.port} cannot be listened at ({error.strerror}): choose another"
        return [f"{where}.port: {said}"]
    return []
