"""A verifier for models that write noise: the final answer is whether a text has an even number of characters."""

from typing import Any


def check(text: str, answer: str | None, entry: dict[str, Any] | None) -> tuple[str, bool | None]:
    final = "even" if len(text) % 2 == 0 else "odd"
    return final, None if answer is None else len(answer) % 2 == len(text) % 2
