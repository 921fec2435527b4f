"""Routing: which prompts of a table a model is asked about. A function of seed and prompt, so every run of a stage, and
every teacher, cuts alike."""

import hashlib
import heapq
from bisect import bisect_right
from collections.abc import Callable
from typing import Any

import pyarrow as pa
from pydantic import Field

from tasks.config.base import Config
from tasks.config.peers import FIRST, BySource, ByWeight, Everyone, Routing
from tasks.ids import Ids
from tasks.stage import Stage

# Of a shard of prompts, those that are asked.
Chosen = Callable[[pa.Table], pa.Table]


class Route(Config):
    """One teacher's part of the prompts."""

    teacher: str
    """Whose."""
    teachers: list[str]
    """All of them."""
    routing: Routing = Everyone()
    """How prompts are shared out."""


class Further(Config):
    """Prompts beside those of another table."""

    apart_from: str
    """Input whose table ``selected`` is left out."""
    count: int = Field(ge=1)
    """How many, drawn at random."""


def uniform(*parts: Any) -> float:
    """A number in [0, 1) that depends on its arguments only."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def teacher_of(route: Route, seed: int, prompt_id: str, source: str) -> str | None:
    """Who answers a prompt; None: everyone."""
    match routing := route.routing:
        case BySource():
            return routing.specialists.get(source, FIRST)
        case ByWeight():
            bounds, total = [], 0.0
            for name in route.teachers:
                total += routing.shares.get(name, 1.0)
                bounds.append(total)
            return route.teachers[bisect_right(bounds, uniform(seed, "route", prompt_id) * total)]
        case Everyone():
            return None


def routed(route: Route, seed: int) -> Chosen:
    """The prompts that go to one teacher."""

    def chosen(prompts: pa.Table) -> pa.Table:
        columns = (prompts["prompt_id"].to_pylist(), prompts["source"].to_pylist())
        own = [teacher_of(route, seed, *row) in (None, route.teacher) for row in zip(*columns, strict=True)]
        return prompts.filter(pa.array(own, pa.bool_()))

    return chosen


def further(stage: Stage[Any], settings: Further, table: str, seed: int) -> Chosen:
    """Prompts that were not selected: those with the smallest salted hashes. Only so many ids are in memory."""
    selected = Ids(part["prompt_id"] for part in stage.read(settings.apart_from, "selected", ["prompt_id"]))
    left = (
        (uniform(seed, "further", name), name)
        for part in stage.read("prompts", table, ["prompt_id"])
        for name in part["prompt_id"].filter(pa.array(selected.find(part["prompt_id"]) < 0)).to_pylist()
    )
    drawn = Ids([pa.array([name for _, name in heapq.nsmallest(settings.count, left)], pa.string())])
    return lambda prompts: prompts.filter(pa.array(drawn.find(prompts["prompt_id"]) >= 0))
