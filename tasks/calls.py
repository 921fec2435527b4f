"""What is asked of an engine, apart from which engine is asked."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Call:
    """One method call of an engine; the same call can be made again on another."""

    method: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def on(self, engine: Any) -> Any:
        """Ray's reference of the result."""
        return getattr(engine, self.method).remote(*self.arguments, **self.options)
