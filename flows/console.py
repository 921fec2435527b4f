"""The terminal of the command line: what is shown there is read, and does nothing."""

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


# Stdout is for results.
console = PlainConsole(stderr=True)
