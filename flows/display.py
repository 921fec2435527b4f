"""What a person sees in the terminal while a run goes on: a line a stage, live with rate and time left."""

import sys
from contextlib import contextmanager
from typing import Any

from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from flows.console import PlainConsole
from infra.manifest import Manifest

# What of a progress event is worth a glance, in this order, and what it is called in a narrow line.
FACTS = {
    "now": "now",
    "loss": "loss",
    "loss_on_policy": "on",
    "loss_off_policy": "off",
    "validation_loss": "validation",
    "tokens_per_second": "tokens/s",
    "intervention_rate": "intervened",
    "response_length": "length",
    "eos_rate": "ended",
    "left": "left",
}


def shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


class RateColumn(ProgressColumn):
    """What is done a second, or the seconds that one takes."""

    def render(self, task: Task) -> Text:
        if not task.speed:
            return Text("")
        unit = task.fields["unit"]
        return Text(f"{task.speed:.3g} {unit}/s" if task.speed >= 1 else f"{1 / task.speed:.3g} s/{unit.rstrip('s')}")


class Display:
    """Silent: a run by a worker has Prefect's UI instead."""

    def started(self, stage: str) -> None: ...

    def progress(self, stage: str, event: dict[str, Any]) -> None: ...

    def finished(self, stage: str, manifest: Manifest, *, reused: bool, seconds: float) -> None: ...

    def notice(self, text: str) -> None:
        """Something that a person should act on."""


class TerminalDisplay(Display):
    """Finished stages as lines above one live line."""

    def __init__(self, console: PlainConsole) -> None:
        self.console = console
        self.live = Progress(
            SpinnerColumn(),
            TextColumn("{task.description:<16}", style="bold", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[count]}", markup=False),
            RateColumn(),
            TextColumn("{task.fields[facts]}", style="cyan", markup=False),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._task: TaskID | None = None

    def started(self, stage: str) -> None:
        self._task = self.live.add_task(stage, total=None, count="starting", unit="", facts="")

    def progress(self, stage: str, event: dict[str, Any]) -> None:
        if self._task is not None:
            known = {name: event[name] for name in FACTS if event.get(name) is not None}
            self.live.update(
                self._task,
                total=event["total"],
                completed=event["done"],
                count=f"{event['done']:g}/{event['total']:g} {event['unit']}",
                unit=event["unit"],
                facts="  ".join(f"{FACTS[name]} {shown(value)}" for name, value in known.items()),
            )

    def finished(self, stage: str, manifest: Manifest, *, reused: bool, seconds: float) -> None:
        if self._task is not None:
            self.live.remove_task(self._task)
            self._task = None
        rows = ", ".join(f"{table.rows:,} {name}" for name, table in manifest.tables.items())
        mark, took = ("[dim]=[/]", "reused") if reused else ("[green]✓[/]", f"{seconds:.1f} s")
        self.console.print(f"{mark} {stage:<16} {took:>9}   [dim]{rows}[/]", highlight=False)

    def notice(self, text: str) -> None:
        self.console.print(f"[yellow]![/] {escape(text)}", highlight=False, soft_wrap=True)


_current: Display = Display()


def display() -> Display:
    """The display of this process."""
    return _current


@contextmanager
def terminal(enabled: bool = True) -> Any:
    """Show runs of this process on stderr while the context lasts: stdout is for results."""
    global _current
    if not enabled:
        yield
        return
    shown = TerminalDisplay(PlainConsole(file=sys.stderr))
    _current = shown
    try:
        with shown.live:
            yield
    finally:
        _current = Display()
