"""What is wrong with settings, as a person is told."""

from pydantic import ValidationError


def problems_of(error: ValidationError) -> list[str]:
    """One line per wrong field: where, what, the value."""
    lines = []
    for entry in error.errors(include_url=False):
        # Names of union members stand in the path, but not in the file.
        field = ".".join(str(key) for key in entry["loc"]) or "config"
        value = entry.get("input")
        got = "" if isinstance(value, dict) or entry["type"] == "missing" else f" (got {str(value)[:80]!r})"
        lines.append(" ".join(f"{field}: {entry['msg'].removeprefix('Value error, ')}{got}".split()))
    return lines
