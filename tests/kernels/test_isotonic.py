"""Isotonic calibration against its min-max formula, a case worked by hand, and what it promises."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels.calibration import auroc, brier, isotonic

answers = st.lists(st.tuples(st.integers(0, 9).map(lambda n: n / 9), st.booleans()), min_size=1, max_size=40)


def test_worked_by_hand() -> None:
    # 0.3 and 0.5 fall, so they share their mean; what is known twice weighs twice.
    fit = isotonic([0.1, 0.3, 0.5, 0.5, 0.9], [False, True, False, False, True])
    assert fit.confidence.tolist() == [0.1, 0.3, 0.5, 0.9]
    assert fit.accuracy.tolist() == pytest.approx([0.0, 1 / 3, 1 / 3, 1.0])
    assert fit([0.0, 0.2, 0.4, 0.7, 1.0]).tolist() == pytest.approx([0.0, 1 / 6, 1 / 3, 2 / 3, 1.0])
    with pytest.raises(ValueError, match="no answer"):
        isotonic([], [])


@given(answers)
def test_equals_the_min_max_formula(rows: list[tuple[float, bool]]) -> None:
    confidence, correct = np.array([row[0] for row in rows]), np.array([row[1] for row in rows], float)
    knots = np.unique(confidence)

    def share(first: float, last: float) -> float:
        return correct[(confidence >= first) & (confidence <= last)].mean()

    plain = [max(min(share(low, high) for high in knots if high >= x) for low in knots if low <= x) for x in knots]
    assert isotonic(confidence, correct)(knots).tolist() == pytest.approx(plain)


@given(answers)
def test_keeps_the_order_and_never_errs_more_where_it_was_fitted(rows: list[tuple[float, bool]]) -> None:
    confidence, correct = [row[0] for row in rows], [row[1] for row in rows]
    calibrated = isotonic(confidence, correct)(confidence)
    assert (np.diff(calibrated[np.argsort(confidence, kind="stable")]) >= -1e-12).all()
    assert brier(np.clip(calibrated, 0, 1), correct) <= brier(confidence, correct) + 1e-12
    if 0 < sum(correct) < len(correct):
        assert auroc(np.clip(calibrated, 0, 1), correct) >= auroc(confidence, correct) - 1e-12
