"""Metrics: worked by hand, unknown cells, pairing, and independence of row order."""

import numpy as np
import pyarrow as pa
import pytest

from tasks import schemas
from tasks.config.evaluate import EvaluateConfig
from tasks.metrics import EVALUATION_COLUMNS, LABELS, LOSS_COLUMNS, METRICS, SOURCES, measure

EVALUATE = EvaluateConfig(bootstrap=200)


def tables(evaluations, losses=()):
    """(label, problem, source, index, correct, rouge[, tokens, ends]) and (label, problem, source, loss, tokens)."""
    wide = pa.schema([schemas.EVALUATION.field(name) for name in EVALUATION_COLUMNS])
    narrow = pa.schema([schemas.RESPONSE_LOSS.field(name) for name in LOSS_COLUMNS])
    return (
        pa.Table.from_pylist(
            [dict(zip(wide.names, (*row, 8, "stop"), strict=False)) for row in evaluations], schema=wide
        ),
        pa.Table.from_pylist([dict(zip(narrow.names, row, strict=True)) for row in losses], schema=narrow),
    )


def test_worked_by_hand():
    evaluations = [
        ("base", "a", "s", 0, False, 10.0),
        ("base", "a", "s", 1, False, 20.0),
        ("base", "b", "s", 0, True, None),
        ("base", "b", "s", 1, None, None),
        ("final", "a", "s", 0, True, 30.0),
        ("final", "a", "s", 1, False, 40.0),
        ("final", "b", "s", 0, True, None),
        ("final", "b", "s", 1, True, None),
    ]
    losses = [("base", "a", "s", 2.0, 10), ("base", "b", "s", 4.0, 30), ("final", "a", "s", 1.0, 10)]
    found = measure(*tables(evaluations, losses), EVALUATE, 0)
    base, final, change = found.metrics["base"], found.metrics["final"], found.differences["final-base"]
    assert found.problems == 2
    assert base["accuracy"] == pytest.approx(1 / 3)
    assert final["accuracy"] == 0.75
    # Three of the four cells are known in both.
    assert change["accuracy"] == pytest.approx(1 / 3)
    assert (base["rouge_l"], final["rouge_l"], change["rouge_l"]) == (15, 35, 20)
    # One problem with a reference gives no interval.
    assert final["rouge_l_ci"] is None
    assert base["loss"] == (2 * 10 + 4 * 30) / 40
    assert change["loss"] == -1
    assert base["loss_ci"] == [2, 4]


ALWAYS = [label for label in LABELS if label != "warmup"]


def test_every_key_stands_whatever_is_missing():
    found = measure(*tables([]), EVALUATE, 0)
    keys = [key for metric in METRICS for key in (metric, f"{metric}_ci")]
    assert list(found.metrics) == ALWAYS
    assert list(found.differences) == ["final-base", "final-teacher"]
    for row in (*found.metrics.values(), *found.differences.values()):
        assert list(row) == keys
        assert set(row.values()) == {None}
    assert found.problems == 0
    assert found.by_source == {}
    assert found.known("loss") == []


def random_rows(problems=60, seeds=3, sources=("x", "y")):
    random = np.random.default_rng(0)
    evaluations, losses = [], []
    for number in range(problems):
        ease, source = random.random(), sources[number % len(sources)]
        for label, gain in (("base", 0.0), ("final", 0.2)):
            for index in range(seeds):
                correct = bool(random.random() < ease * 0.6 + gain)
                evaluations.append((label, f"p{number}", source, index, correct, 50 * ease + 30 * gain))
            losses.append((label, f"p{number}", source, 3 * ease - gain, 20 + number))
    return evaluations, losses


def test_pairing_sees_what_intervals_do_not():
    found = measure(*tables(*random_rows()), EVALUATE, 0)
    base, final = found.metrics["base"], found.metrics["final"]
    assert final["loss_ci"][1] > base["loss_ci"][0]
    assert found.differences["final-base"]["loss_ci"] == pytest.approx([-0.2, -0.2], abs=1e-5)
    assert found.differences["final-base"]["accuracy_ci"][0] > 0
    assert found.differences["final-teacher"]["accuracy"] is None
    assert found.known("accuracy") == ["base", "final"]


def test_row_order_does_not_matter():
    evaluations, losses = random_rows()
    random = np.random.default_rng(1)
    shuffled = [[rows[i] for i in random.permutation(len(rows))] for rows in (evaluations, losses)]
    assert measure(*tables(evaluations, losses), EVALUATE, 0) == measure(*tables(*shuffled), EVALUATE, 0)


def test_by_source():
    found = measure(*tables(*random_rows()), EVALUATE, 0)
    assert sorted(found.by_source) == ["x", "y"]
    assert sum(part.problems for part in found.by_source.values()) == found.problems
    whole = np.mean([part.metrics["final"]["accuracy"] for part in found.by_source.values()])
    assert found.metrics["final"]["accuracy"] == pytest.approx(whole)
    one = measure(*tables(*random_rows(sources=["x"])), EVALUATE, 0)
    assert one.by_source == {}
    many = measure(
        *tables(*random_rows(problems=SOURCES + 5, sources=[str(n) for n in range(SOURCES + 5)])), EVALUATE, 0
    )
    assert len(many.by_source) == SOURCES


def test_a_promoted_student_and_how_models_write():
    evaluations = [
        ("final", "a", "s", 0, True, 30.0, 10, "stop"),
        ("final", "b", "s", 0, True, 30.0, 30, "length"),
        ("promoted", "a", "s", 0, False, 10.0, 8, "stop"),
        ("promoted", "b", "s", 0, True, 20.0, 8, "stop"),
    ]
    found = measure(*tables(evaluations), EVALUATE, 0)
    assert list(found.metrics) == [*ALWAYS, "promoted"]
    assert found.differences["final-promoted"]["accuracy"] == 0.5
    assert found.differences["final-promoted"]["rouge_l"] == 15
    assert found.habits == {"final": (20, 0.5), "promoted": (8, 1)}
