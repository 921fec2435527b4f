"""A settings file as plain values: text, numbers, lists and mappings, whatever it held. Or ValueError in one line.

YAML can hold more than settings have use for: a name for a list that is repeated until it fills the memory, a key twice
of which one is silently dropped, numbers without end, text that no file can store.
"""

import math
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

# The largest file in ``configs/`` has 4 kB and 140 values; PyYAML needs seconds for what is much longer than this.
MOST_BYTES = 1 << 18
MOST_VALUES = 100_000


class Loader(yaml.SafeLoader):
    """Refuses a key that is given twice. Dates stay text."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (as its base has it)
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)  # type: ignore[no-untyped-call]
        seen: set[Hashable] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.composer.ComposerError(None, None, f"key {key.value!r} stands twice", key.start_mark)
                seen.add(key.value)
        return node


def read_document(path: str | Path) -> Any:
    """The values of a YAML file. ValueError where it is missing, no YAML, or more than settings can be."""
    try:
        with Path(path).open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise ValueError(f"config: no file {str(path)!r}") from None
    except OSError as error:
        raise ValueError(f"config: {str(path)!r} cannot be read: {error.strerror}") from None
    if len(data) > MOST_BYTES:
        raise ValueError(f"config: {path} is longer than {MOST_BYTES:,} bytes: settings are not, give their file")
    return parse(data, f"config: {path}")


def parse(text: str | bytes, place: str) -> Any:
    """The values of a YAML text. ValueError, which begins with ``place``, where it has none."""
    try:
        value = yaml.load(text, Loader)  # noqa: S506 (it is a SafeLoader)
    except RecursionError:
        raise ValueError(f"{place} is nested too deep") from None
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError) as error:
        # Where an explicit tag does not fit its value, PyYAML lets Python's own errors through.
        raise ValueError(f"{place} is not YAML: {' '.join(str(error).split())[:300]}") from None
    check(value, place)
    return value


def check(document: Any, place: str) -> None:
    """ValueError where it holds what settings cannot: too much, once its names are followed, or no plain value."""
    left, waiting = MOST_VALUES, [document]
    while waiting:
        value = waiting.pop()
        left -= 1
        if left < 0:
            raise ValueError(f"{place} holds more than {MOST_VALUES:,} values: write out fewer, repeat none by name")
        if isinstance(value, dict):
            keys = [key for key in value if not isinstance(key, str)]
            if keys:
                raise ValueError(f"{place}: key {keys[0]!r} is no text: put it in quotes")
            waiting += [*value, *value.values()]
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, str):
            if not value.isprintable() and any("\ud800" <= sign <= "\udfff" for sign in value):
                raise ValueError(f"{place}: {value[:80]!r} holds half a character: write it in full")
        elif isinstance(value, float):
            if not math.isfinite(value):
                raise ValueError(f"{place}: {value} is no number a setting can have: leave the setting out")
        elif isinstance(value, int):
            if value.bit_length() > 63:
                raise ValueError(f"{place}: a number of {value.bit_length()} bits is too large: 63 are the most")
        elif value is not None:
            raise ValueError(f"{place}: {str(value)[:80]!r} is {type(value).__name__}: write text, in quotes")
