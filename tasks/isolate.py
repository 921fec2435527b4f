"""Finding the requests that an engine dies of, so that the others of their call are answered.

The call is asked again in halves, down to single requests; one that its engine does not survive alone, twice, is left
out. Its answer says so: null text and the reason in ``finish_reason``, or NaN for a number.
"""

from collections.abc import Callable
from dataclasses import replace
from math import nan
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from infra.engine import ANSWERS
from tasks.calls import Call

REFUSED = "refused: "


class EngineLost(Exception):
    """An engine died of a call, or hung. The message is what it died of, in one line."""


def size(call: Call) -> int:
    """How many requests a call holds: its arguments after the model run over them."""
    return len(call.arguments[1])


def part(call: Call, start: int, end: int) -> Call:
    model, *lists = call.arguments
    return replace(call, arguments=(model, *(values[start:end] for values in lists)))


def left_out(call: Call, reason: str) -> Any:
    """The result of a single request that is not answered."""
    if call.method == "generate":
        seeds = call.arguments[2][0]
        columns: dict[str, Any] = {name: pa.nulls(len(seeds), ANSWERS.field(name).type) for name in ANSWERS.names}
        columns |= {"conversation": [0] * len(seeds), "seed": seeds, "finish_reason": [REFUSED + reason] * len(seeds)}
        return pa.table(columns, schema=ANSWERS)
    return [nan] if call.method == "choice" else ([nan], [0])


def joined(results: list[tuple[int, Any]]) -> Any:
    """One result of the results of parts, each with the number of its first request."""
    first = results[0][1]
    if isinstance(first, pa.Table):
        place = first.schema.get_field_index("conversation")
        return pa.concat_tables(
            [
                table.set_column(place, "conversation", pc.add(table["conversation"], pa.scalar(start, pa.int32())))
                for start, table in results
            ],
            promote_options="default",
        )
    if isinstance(first, list):
        return [value for _, result in results for value in result]
    return tuple([value for _, result in results for value in result[place]] for place in range(len(first)))


def isolate(call: Call, ask: Callable[[int, int], Any]) -> tuple[Any, list[str]]:
    """(The result of a call that an engine did not survive, without the requests that kill it, why each was left out).

    ``ask(start, end)`` asks so many of its requests, and raises EngineLost. So does this, where more requests are left
    out than answered: then it is the engine.
    """
    reasons: list[str] = []
    answered = 0

    def work(start: int, end: int) -> list[tuple[int, Any]]:
        nonlocal answered
        for last in (False, True):
            try:
                result = ask(start, end)
                answered += end - start
                return [(start, result)]
            except EngineLost as lost:
                if end - start > 1:
                    break
                if last:
                    reasons.append(str(lost))
                    if len(reasons) > max(1, answered):
                        raise
                    return [(start, left_out(part(call, start, end), str(lost)))]
        return halves(start, end)

    def halves(start: int, end: int) -> list[tuple[int, Any]]:
        middle = (start + end) // 2
        return [*work(start, middle), *work(middle, end)]

    count = size(call)
    return joined(halves(0, count) if count > 1 else work(0, count)), reasons
