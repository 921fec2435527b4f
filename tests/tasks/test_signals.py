"""What the signals are made of: ratings, and which annotations stay."""

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.models import ModelRef
from kernels.consistency import consistency
from tasks.clusters import clustered
from tasks.config.signals import Keep, Select, Signals, Verbalized
from tasks.forms import exact
from tasks.keeping import choose
from tasks.score import as_confidence, confidence_call, rating
from tasks.select import answers
from tasks.verify import rouge_l


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


def test_of_answers_that_are_equally_frequent_the_ta_decides() -> None:
    answers = ["7", "8", None, None]
    scores = [{"prompt_id": "a", "final_answer": answer, "kept": True, "reason": "kept"} for answer in answers]
    choose(Keep(answers="majority"), scores, [0.3, 0.2, 0.1, 0.6])
    assert [row["kept"] for row in scores] == [True, False, False, False]


SAID = [
    "Paris is the capital of France.",
    "The capital of France is Paris",
    "paris IS the  capital of France",
    "I do not know that.",
    "",
    "The capital city of France is Paris, of course.",
]


def test_free_texts_that_say_the_same_are_one_answer() -> None:
    first = "paris is the capital of france"
    assert clustered(SAID, 50.0) == [first, first, first, "i do not know that", None, first]
    # Nobody agrees but with what is equal, and the empty text not even with itself.
    assert len({answer for answer in clustered(SAID, 100.0) if answer}) == 4
    assert clustered(["", ""], 50.0) == [None, None]
    # No word that ROUGE-L counts.
    assert clustered(["東京です", " 東京です", "大阪です"], 50.0) == ["東京です", "東京です", "大阪です"]
    assert len(set(clustered(["ответ Москва 5", "ответ Киев 5", "東京 5"], 50.0))) == 3
    # The third is nearer to the second than to the first; the last is the second again.
    drifting = clustered(["a1 b1 c1 d1", "a1 b1 x1 y1", "b1 x1 y1 z1", "a1 b1 x1 y1"], 50.0)
    assert drifting == ["a1 b1 c1 d1", "a1 b1 c1 d1", "b1 x1 y1 z1", "a1 b1 c1 d1"]
    agreement = consistency(answers({"verifier": "none", "entry": None}, SAID, Select()), "p1")
    assert (agreement.unique, agreement.majority_index) == (3, 0)
    exact = consistency(answers({"verifier": "exact", "entry": None}, SAID, Select()), "p1")
    assert exact.unique == 5


@settings(deadline=None)
@given(st.lists(st.text("ab c", max_size=12), max_size=6), st.floats(1, 100))
def test_clusters_are_those_of_rouge_l_alone(texts: list[str], least: float) -> None:
    """The twin scores every pair, and asks nobody first how many words two texts share."""
    firsts: list[str] = []
    expected: list[str | None] = []
    names = [exact(text) for text in texts]
    for text, name in zip(texts, names, strict=True):
        if name is None:
            expected.append(None)
            continue
        equal = [answer for seen, answer in zip(names, expected, strict=False) if seen == name]
        scored = [(rouge_l(text, [first]), -number) for number, first in enumerate(firsts)]
        best = max(scored, default=(0.0, 0))
        if equal:
            expected.append(equal[0])
        elif best[0] >= least:
            expected.append(" ".join(firsts[-best[1]].split()))
        else:
            firsts.append(text)
            expected.append(" ".join(text.split()))
    assert clustered(texts, least) == expected


def test_each_ablation_is_one_setting_also_of_a_run_that_sets_no_rule() -> None:
    def rules(use: str) -> tuple[str, str]:
        signals = Signals.model_validate({"use": use})
        assert Signals.model_validate(signals.model_dump(mode="json")) == signals
        return signals.select.rule, signals.keep.rule

    assert rules("none") == ("random", "all")
    assert rules("consistency") == rules("ta_student") == ("signals", "all")
    assert rules("ta_teacher") == ("random", "quantile")
    agreed = Signals.model_validate({"use": "ta_teacher", "keep": {"agreement": {}}})
    assert (agreed.keep.rule, agreed.keep.agreement is not None) == ("all", True)
