import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels.consistency import consistency


def test_all_agree():
    found = consistency(["8"] * 5, "p")
    assert (found.unique, found.majority_share, found.entropy) == (1, 1.0, 0.0)
    assert (found.majority_answer, found.majority_index) == ("8", 0)


def test_all_differ():
    found = consistency(["1", "2", "3"], "p")
    assert found.unique == 3
    assert found.majority_share == pytest.approx(1 / 3)
    assert found.entropy == pytest.approx(1.0)


def test_by_hand():
    found = consistency(["7", "8", "8", "9"], "p")
    assert found.unique == 3
    assert found.majority_share == 0.5
    assert found.entropy == pytest.approx((0.5 * np.log(2) + 0.5 * np.log(4)) / np.log(4))
    assert (found.majority_answer, found.majority_index) == ("8", 1)


def test_missing_answers_agree_with_nothing():
    found = consistency([None, None, None, "5"], "p")
    assert found.unique == 4
    assert found.entropy == pytest.approx(1.0)
    assert (found.majority_answer, found.majority_index, found.majority_share) == ("5", 3, 0.25)
    nothing = consistency([None, None], "p")
    assert (nothing.unique, nothing.majority_answer, nothing.majority_index) == (2, None, 0)
    assert nothing.majority_share == 0.5


def test_one_answer_and_none_at_all():
    assert consistency(["x"], "p").entropy == 0.0
    with pytest.raises(ValueError, match="no answers"):
        consistency([], "p")


def test_ties_depend_on_the_prompt_and_not_on_the_order():
    winners = set()
    for prompt in range(40):
        first = consistency(["7", "8"], f"p{prompt}").majority_answer
        assert first == consistency(["8", "7"], f"p{prompt}").majority_answer
        winners.add(first)
    assert winners == {"7", "8"}


@given(st.lists(st.none() | st.text(max_size=3), min_size=1, max_size=9))
def test_ranges(answers):
    found = consistency(answers, "p")
    assert 1 <= found.unique <= len(answers)
    assert 1 / len(answers) <= found.majority_share <= 1
    assert 0 <= found.entropy <= 1
    assert answers[found.majority_index] == found.majority_answer
