"""What is wrong with settings, as a person is told."""

from pydantic import ValidationError

from tasks.config.confidential import confidential


def problems_of(error: ValidationError) -> list[str]:
    """One line per wrong field: where, what, the value."""
    lines = []
    for entry in error.errors(include_url=False):
        # Names of union members stand in the path, but not in the file.
        field = ".".join(str(key) for key in entry["loc"]) or "config"
        value = entry.get("input")
        # A key where the name of its variable belongs, or a password within an address, is not said aloud.
        hidden = any(confidential(str(key)) for key in entry["loc"]) or "@" in str(value)
        got = "" if hidden or isinstance(value, dict) or entry["type"] == "missing" else f" (got {str(value)[:80]!r})"
        lines.append(" ".join(f"{field}: {entry['msg'].removeprefix('Value error, ')}{got}".split()))
    return lines
