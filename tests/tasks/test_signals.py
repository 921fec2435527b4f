"""What the signals are made of: ratings, and which annotations stay."""

import pyarrow as pa
import pytest

from infra.models import ModelRef
from tasks.config.signals import Keep, Verbalized
from tasks.keeping import choose
from tasks.score import as_confidence, confidence_call, rating


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5", 1.0),
        (" Rating: 1", 0.0),
        ("I would say 3 of 5.", 0.5),
        ("4/5", 0.75),
        ("", 0.0),
        ("ten", 0.0),
        ("10", 0.0),
    ],
)
def test_a_rating_is_the_first_number_from_one_to_five(text: str, expected: float) -> None:
    assert rating(text) == expected


def test_verbalized_confidence_asks_and_reads() -> None:
    settings = Verbalized(template="{question} | {answer} ?")
    model = ModelRef(name="ta", revision="1")
    conversations = [[{"role": "system", "content": "s"}, {"role": "user", "content": "2 + {answer}?"}]]
    call = confidence_call(settings, model, conversations, ["4"], {})
    assert call.method == "generate"
    assert call.arguments[1] == [[{"role": "user", "content": "2 + {answer}? | 4 ?"}]]
    assert call.options["temperature"] == 0.0
    assert as_confidence(settings, pa.table({"text": ["2", "none"]})) == [0.25, 0.0]


@pytest.mark.parametrize(
    ("rule", "kept"),
    [("assistant", [0, 5]), ("majority", [2, 5])],
)
def test_of_several_annotations_of_a_prompt_one_is_chosen(rule: str, kept: list[int]) -> None:
    answers = ["7", "8", "8", "9", "8", None]
    scores = [
        {"prompt_id": "b" if number == 5 else "a", "final_answer": answer, "kept": number != 4, "reason": "as it was"}
        for number, answer in enumerate(answers)
    ]
    choose(Keep(answers=rule), scores, [0.9, 0.3, 0.4, 0.8, 1.0, 0.1])
    assert [number for number, row in enumerate(scores) if row["kept"]] == kept
    reasons = ["as it was" if number in (*kept, 4) else "not_chosen" for number in range(6)]
    assert [row["reason"] for row in scores] == reasons
