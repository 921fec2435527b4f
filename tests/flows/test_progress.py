"""The words of a stage's progress."""

from typing import Any

import pytest

from flows.progress import progress_text

CHARGED = {"queries": 1200, "prompt_tokens": 30_000, "completion_tokens": 4500}
STEPS = {"done": 3, "total": 1000, "unit": "steps"}


@pytest.mark.parametrize(
    ("event", "left", "said"),
    [
        (STEPS, None, "3 of 1,000 steps"),
        (STEPS, 45.4, "3 of 1,000 steps, about 45 s left"),
        (STEPS, 5400, "3 of 1,000 steps, about 1.5 h left"),
        (
            {**STEPS, "unit": "rows", "tokens": 123_456, "tokens_per_second": 1234.5},
            90,
            "3 of 1,000 rows, 123,456 tokens, 1,234.5 tokens/s, about 1.5 min left",
        ),
        (
            {**STEPS, "charged": CHARGED, "spent": CHARGED, "left": "300 queries"},
            None,
            "3 of 1,000 steps; teacher: 1,200 queries, 34,500 tokens; left: 300 queries",
        ),
        (
            {
                **STEPS,
                "charged": {**CHARGED, "money": 0.123456, "currency": "EUR"},
                "spent": {**CHARGED, "queries": 1203, "completion_tokens": 4600, "money": 0.125, "currency": "EUR"},
                "left": "300 queries, 1 EUR",
            },
            None,
            "3 of 1,000 steps; teacher: 1,200 queries, 34,500 tokens, 0.1235 EUR, "
            "and 3 queries, 100 tokens, 0.001544 EUR sent again; left: 300 queries, 1 EUR",
        ),
    ],
)
def test_what_is_known_of_a_stage_is_told(event: dict[str, Any], left: float | None, said: str) -> None:
    assert progress_text(event, left) == said
