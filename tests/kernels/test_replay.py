"""The benchmarks' arithmetic of blocks is the decoder's: replayed forwards are those that were counted."""

import pytest
import torch
from test_decode import STUDENTS, TEACHER, make_prompts

from benchmarks.replay import optimum, replay, stood
from kernels.decode import blockwise, reference
from kernels.gate import ExponentialDecay

LIMITS = [14, 9, 3, 14, 6]


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("block", [1, 3, 8])
@pytest.mark.parametrize("distance", [0.001, 0.05, 1.0])
def test_replayed_forwards_are_the_decoders(role, block, distance):
    prompts, keys = make_prompts([3, 1, 5, 2, 4], seed=2)
    given = STUDENTS[distance], TEACHER, prompts, keys, ExponentialDecay(rate=0.5)
    plain = reference(*given, max_new_tokens=LIMITS, eos_ids=[])
    got = blockwise(*given, max_new_tokens=LIMITS, eos_ids=[], block=block, drafter=role)
    other = "teacher" if role == "student" else "student"
    drafter, scorer = getattr(got.stats, role), getattr(got.stats, other)
    count = replay(stood(plain, role), block)
    assert (len(count.drafter), sum(count.drafter)) == (drafter.calls, drafter.positions)
    assert (len(count.scorer), sum(count.scorer), count.rows) == (scorer.calls, scorer.positions, scorer.rows)


def test_the_optimum_is_the_cheapest_plan():
    prompts, keys = make_prompts([3, 2], seed=3)
    rollout = reference(STUDENTS[0.001], TEACHER, prompts, keys, ExponentialDecay(), max_new_tokens=14, eos_ids=[])
    # A teacher that costs a hundred student forwards, however many tokens it reads, is asked as rarely as can be.
    best = optimum([rollout], {"student": lambda _: 1.0, "teacher": lambda _: 100.0})
    assert best.drafter == "student"
    assert best.block >= 8
    torch.testing.assert_close(
        best.seconds, replay(stood(rollout, "student"), best.block).seconds(lambda _: 1.0, lambda _: 100.0)
    )
