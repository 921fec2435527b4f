"""The terminal of the command line: what is shown there is read, and does nothing."""

import os
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.segment import Segment

from infra.terminal import visible


class PlainConsole(Console):
    """Rich's console, which by itself hands escape sequences within texts on to the terminal."""

    def render(self, renderable: Any, options: Any = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


def outlive_readers() -> None:
    """A run goes on when whoever read its lines is gone, such as a worker that was killed. Rich, by which Prefect shows
    its logs, would end the process at the next line."""
    Console.on_broken_pipe = unheard  # type: ignore[method-assign,assignment]


def unheard(console: Console) -> None:
    console.quiet = True
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), console.file.fileno())


# Stdout is for results.
console = PlainConsole(stderr=True)
