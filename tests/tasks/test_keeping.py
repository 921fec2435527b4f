"""Keeping: the threshold of a quantile; the TA's own answer has to agree, and the student's text may stand in."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from infra.manifest import commit_manifest
from infra.models import ModelRef
from infra.parts import read_rows
from infra.store import LocalStore
from kernels.calibration import isotonic
from tasks import agreement, schemas
from tasks.batches import chance
from tasks.config.signals import Agreement, Keep
from tasks.keep import CONFIDENCE, KeepSettings, run
from tasks.keeping import threshold
from tasks.stage import Stage, StageSpec

# By prompt: the teacher's answers with the TA's confidence in each; the student's answers, the first being its
# majority's, with the TA's confidence in it; and the TA's own answer.
CASES: dict[str, tuple[list[tuple[str, float]], list[str], float | None, str | None]] = {
    "agreed": ([("It is 7.", 0.6)], ["8"], 0.7, "So: 7"),
    "doubted": ([("It is 7.", 0.3)], ["9", "8"], 0.9, "9"),
    "nothing": ([("no idea", 0.5)], ["10"], 0.6, "10"),
    "same": ([("It is 7.", 0.2)], ["so 7"], 0.9, "8"),
    "unknown": ([("It is 7.", 0.4)], ["8"], None, None),
    "open": ([("Paris.", 0.5)], ["London"], 0.6, None),
    "two": ([("It is 5.", 0.1), ("It is 6.", 0.6)], ["3"], 0.65, "6"),
}


# As CASES, without a verifier: two annotations say the same, and so does the student, or it does not.
ANNOTATED = [("Lyon.", 0.6), ("The capital is Paris.", 0.3), ("Paris is the capital.", 0.4)]
FREE: dict[str, tuple[list[tuple[str, float]], list[str], float | None, str | None]] = {
    "open-same": (ANNOTATED, ["The capital: Paris."], 0.9, None),
    "open-other": (ANNOTATED, ["I would say Rome"], 0.9, None),
}


def keep(root: Path, cases: dict[str, Any] = CASES, more: Any = None, **rule: Any) -> Stage[KeepSettings]:
    """The stage's result; what engines are asked for is there already."""
    store = LocalStore(root)
    prompts, samples, signals, own, confidence, answers = [], [], [], [], [], []
    for name, (theirs, ours, trust, assistant) in cases.items():
        verifier = "none" if name.startswith("open") else "number"
        prompts.append({"prompt_id": name, "source": "toy", "answer": "9", "verifier": verifier})
        ids = {"prompt_id": name, "prompt_token_ids": [1], "token_ids": [2], "finish_reason": "stop"}
        for number, (text, value) in enumerate(theirs):
            samples.append(ids | {"sample_id": f"{name}-{number}", "text": text, "role": "teacher"})
            confidence.append({"sample_id": f"{name}-{number}", "confidence": value})
        for number, text in enumerate([*ours, ours[0]]):
            sample = {"sample_id": f"{name}-own{number}", "text": text, "role": "student", "token_ids": [3, number]}
            own.append(ids | sample)
        signal = {"prompt_id": name, "selected": True, "majority_text": ours[0], "ta_student": trust}
        signals.append(signal | {"majority_answer": ours[0]})
        if verifier != "none":
            answers.append({"prompt_id": name, "text": assistant, "final_answer": assistant and assistant[-2:].strip()})
    signals.insert(0, signals[0] | {"prompt_id": "other", "selected": False})
    inputs = {}
    for name, table, rows, schema in (
        ("models", None, None, None),
        ("prompts", "selected", prompts, schemas.PROMPT),
        ("samples", "samples", samples, schemas.SAMPLE),
        ("select", "signals", signals, schemas.SIGNAL),
        ("student-sample", "samples", own, schemas.SAMPLE),
    ):
        stage: Stage[Any] = Stage(StageSpec(stage=name, module="", root=store.uri), None)  # type: ignore[arg-type]
        stage.facts["models"] = {"assistant": ModelRef(name="ta", revision="1").model_dump()}
        if table:
            stage.write_table(table, pa.Table.from_pylist(rows, schema))
        inputs[name] = commit_manifest(store, stage.manifest).path
    values = {"table": "selected", "shard_size": 1000, "keep": {"rule": "absolute", "threshold": 0.25, **rule}} | (
        more or {}
    )
    spec = StageSpec(stage="keep", module="tasks.keep", settings=values, inputs=inputs, root=store.uri)
    found = Stage(spec, KeepSettings.model_validate(values))
    found.commit("confidence", 0, pa.Table.from_pylist(confidence, CONFIDENCE))
    if "agreement" in rule:
        found.commit(agreement.TABLE, 0, pa.Table.from_pylist(answers, agreement.ANSWER))
    run(found)
    return found


def reasons(stage: Stage[KeepSettings]) -> dict[str, str]:
    rows = read_rows(stage.store, stage.manifest, "scores").to_pylist()
    assert [row["kept"] for row in rows] == [row["reason"] in ("kept", "stand_in") for row in rows]
    return {row["sample_id"]: row["reason"] for row in rows}


def kept(stage: Stage[KeepSettings]) -> dict[str, dict[str, Any]]:
    return {row["row_id"]: row for row in read_rows(stage.store, stage.manifest, "kept").to_pylist()}


def test_an_annotation_has_to_agree_with_the_tas_own_answer(tmp_path: Path) -> None:
    found = keep(tmp_path, agreement={})
    assert reasons(found) == {
        "agreed-0": "kept",
        "doubted-0": "disagreement",
        "nothing-0": "disagreement",
        "same-0": "disagreement",
        "unknown-0": "disagreement",
        "open-0": "kept",
        "two-0": "disagreement",
        "two-1": "kept",
    }
    assert set(kept(found)) == {"agreed-0", "open-0", "two-1"}
    assert found.facts["reasons"]["disagreement"] == 5
    # What the TA answered stays to be read, and prompts whose rows were dropped remain paid for.
    assert read_rows(found.store, found.manifest, agreement.TABLE).num_rows == 6
    assert read_rows(found.store, found.manifest, "charged").num_rows == len(CASES)


def test_without_either_only_the_threshold_counts(tmp_path: Path) -> None:
    found = reasons(keep(tmp_path))
    assert {name for name, why in found.items() if why != "kept"} == {"same-0", "two-0"}
    assert set(found.values()) == {"kept", "below_threshold"}


def test_the_students_text_stands_in_where_the_ta_trusts_it_clearly_more(tmp_path: Path) -> None:
    found = keep(tmp_path, stand_in={"margin": 0.25})
    # Not by less than the margin, nor for the same answer, nor without a confidence.
    expected = reasons(keep(tmp_path / "plain")) | {"doubted-0": "replaced", "doubted-own0": "stand_in"}
    assert reasons(found) == expected
    assert found.facts["stand_ins"] == 1
    rows = kept(found)
    assert "doubted-0" not in rows
    assert (rows["doubted-own0"]["token_ids"], rows["doubted-own0"]["prompt_id"]) == ([3, 0], "doubted")
    (row,) = [row for row in read_rows(found.store, found.manifest, "scores").to_pylist() if row["text"] == "9"]
    assert (row["correct"], row["final_answer"], row["ta_teacher"]) == (True, "9", None)


def test_a_stand_in_is_clearly_better_than_the_best_annotation_and_carries_its_own_weight(tmp_path: Path) -> None:
    found = keep(tmp_path, rule="weight", threshold=0.0, stand_in={"margin": 0.04})
    why = reasons(found)
    assert (why["two-0"], why["two-1"], why["two-own0"]) == ("replaced", "replaced", "stand_in")
    weights = {name: row["weight"] for name, row in kept(found).items()}
    assert weights["two-own0"] == pytest.approx(0.65)
    assert weights["same-0"] == pytest.approx(0.2)
    assert "two-own0" not in reasons(keep(tmp_path / "more", stand_in={"margin": 0.06}))


def test_what_calibrates_is_not_trained_on_though_all_of_a_mentors_rows_are(tmp_path: Path) -> None:
    names = ["agreed", "doubted", "nothing", "same", "unknown", "two"]
    chosen = {name for name in names if chance(0, "validation", name) < 0.5}
    assert 0 < len(chosen) < len(names)
    calibrate = {"rule": "all", "calibrate": {"least": 2}}
    for drop in (False, True):
        found = keep(tmp_path / str(drop), more={"validation_share": 0.5, "drop_calibrating": drop}, **calibrate)
        rows = read_rows(found.store, found.manifest, "scores").to_pylist()
        assert {row["prompt_id"] for row in rows if row["calibrates"]} == chosen
        # Training leaves the teacher's rows of these prompts out by itself.
        dropped = chosen if drop else set()
        assert {row["prompt_id"] for row in rows if row["reason"] == "calibrates"} == dropped
        assert not {row["prompt_id"] for row in kept(found).values()} & dropped


def test_free_texts_that_say_the_same_are_one_answer_of_a_majority_and_no_reason_to_stand_in(tmp_path: Path) -> None:
    found = keep(tmp_path, FREE, answers="majority")
    assert set(kept(found)) == {"open-same-2", "open-other-2"}
    assert [why for why in reasons(found).values() if why != "kept"] == ["not_chosen"] * 4
    rows = read_rows(found.store, found.manifest, "scores").to_pylist()
    assert [row["final_answer"] for row in rows[:3]] == ["lyon", "the capital is paris", "the capital is paris"]
    found = keep(tmp_path / "own", FREE, stand_in={"margin": 0.25})
    assert {name for name, why in reasons(found).items() if why == "stand_in"} == {"open-other-own0"}


def test_a_stand_in_meets_the_rules_itself(tmp_path: Path) -> None:
    found = reasons(keep(tmp_path, stand_in={"margin": 0.05}, agreement={}))
    # The TA itself answers 9 and 10, but 7 to the first prompt, where the student says 8.
    assert {name for name, why in found.items() if why == "stand_in"} == {"doubted-own0", "nothing-own0", "open-own0"}
    assert found["doubted-0"] == "disagreement"


class Pool:
    """An engine that answers with the prompt's own number, and dies of the prompt "deadly"."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def map(self, calls: Any) -> Any:
        for key, call in calls:
            names = [conversation[0]["content"] for conversation in call.arguments[1]]
            self.asked += names
            rows = [
                {"text": None, "finish_reason": "refused: it died"}
                if name == "deadly"
                else {"text": f"It is {name}.", "finish_reason": "stop"}
                for name in names
            ]
            yield key, pa.Table.from_pylist(rows)


def test_the_ta_is_asked_each_prompt_once_and_no_shard_twice(tmp_path: Path) -> None:
    def prompt(name: str, verifier: str = "number") -> dict[str, Any]:
        messages = [{"role": "user", "content": name}]
        return {"prompt_id": f"p{name}", "messages": messages, "verifier": verifier, "entry": None}

    shards = [(0, [prompt("7"), prompt("7"), prompt("deadly")]), (1, [prompt("8", "none")]), (2, [prompt("9")])]
    stage: Stage[Any] = Stage(StageSpec(stage="keep", module="", root=str(tmp_path)), None)  # type: ignore[arg-type]
    pool, model = Pool(), ModelRef(name="ta", revision="1")
    for most in (2, 3):
        agreement.ask(stage, pool, model, Agreement(), iter(shards[:most]), most, {})
    assert pool.asked == ["7", "deadly", "9"]
    stage.close_table(agreement.TABLE, agreement.ANSWER)
    finals = {name: row["final_answer"] for name, row in agreement.answers_of(stage, 0).items()}
    assert finals == {"p7": "7", "pdeadly": None}
    assert agreement.answers_of(stage, 1) == {}
    assert not agreement.disagrees(prompt("7"), "7", agreement.answers_of(stage, 0))
    assert agreement.disagrees(prompt("deadly"), None, agreement.answers_of(stage, 0))


def test_a_calibrated_quantile_is_that_of_the_calibrated_confidences() -> None:
    random = np.random.default_rng(3)
    confidences = random.random(101).astype(np.float32)
    fit = isotonic(confidences[:40], random.random(40) < confidences[:40])
    for share in (0.0, 0.2, 0.333, 0.5, 1.0):
        found = threshold(Keep(rule="quantile", threshold=share), lambda: np.array_split(confidences, 3), fit)
        assert np.isclose(found, np.quantile(fit(confidences), share), rtol=1e-12)
