import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels.consistency import consistency, rank_average, rank_share


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


def test_ranks_by_hand():
    assert rank_share([10, 30, 20]).tolist() == [0, 1, 0.5]
    assert rank_share([1, 1, 2, 2]).tolist() == [1 / 6, 1 / 6, 5 / 6, 5 / 6]
    assert rank_share([4, 4]).tolist() == [0.5, 0.5]
    assert rank_share([4]).tolist() == [0.5]
    assert rank_share([]).tolist() == []


@given(st.lists(st.integers(-5, 5), min_size=2, max_size=30))
def test_ranks_are_those_counted_one_by_one(values):
    plain = [(sum(b < a for b in values) + (sum(b == a for b in values) - 1) / 2) / (len(values) - 1) for a in values]
    assert rank_share(values) == pytest.approx(plain)


def test_rank_average():
    unique, doubt = [1, 3, 2], [0.9, 0.1, 0.5]
    assert rank_average([unique, doubt], [1, 0]).tolist() == [0, 1, 0.5]
    assert rank_average([unique, doubt], [1, 1]).tolist() == [0.5, 0.5, 0.5]
    assert rank_average([unique, doubt], [3, 1]).tolist() == [0.25, 0.75, 0.5]


def test_an_unused_signal_may_be_missing():
    assert rank_average([[1, 2], [np.nan, np.nan]], [1, 0]).tolist() == [0, 1]


@pytest.mark.parametrize("weights", [[0, 0], [1, -1], [1]])
def test_weights_that_make_no_average(weights):
    with pytest.raises(ValueError, match="weights"):
        rank_average([[1, 2], [3, 4]], weights)


def test_nan_has_no_rank():
    with pytest.raises(ValueError, match="NaN"):
        rank_average([[1, np.nan]], [1])
