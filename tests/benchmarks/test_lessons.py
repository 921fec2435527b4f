"""Worked solutions: each ends with what the task's own verifier takes for right, and its steps add up."""

import re

import pytest

from benchmarks.lessons import TASKS, lessons
from tasks.config.prompts import ReasoningGymSource, ReasoningGymTask
from tasks.sources import read
from tasks.verify import is_correct

# Importing reasoning-gym takes most of the time.
pytestmark = pytest.mark.long


@pytest.mark.parametrize("task", TASKS)
def test_a_solution_is_right_by_the_verifier_of_runs(task: str) -> None:
    source = ReasoningGymSource(seed=4, tasks=[ReasoningGymTask(name=task, size=20, options=TASKS[task])])
    problems = {row.messages[-1]["content"]: row for row in read(source, "auto")}
    taught = list(lessons(task, 20, 4))
    assert {lesson.question for lesson in taught} == set(problems)
    for lesson in taught:
        row = problems[lesson.question]
        assert is_correct(row.verifier, lesson.solution, row.answer, row.entry), lesson
        assert not is_correct(row.verifier, lesson.solution + "1", row.answer, row.entry), lesson


@pytest.mark.parametrize("task", ["chain_sum", "gcd", "products"])
def test_the_steps_of_a_solution_hold(task: str) -> None:
    for lesson in lessons(task, 50, 5):
        for left, sign, right, result in re.findall(r"(-?\d+) ([-+*%]) (\d+) = (-?\d+)", lesson.solution):
            a, b = int(left), int(right)
            assert {"+": a + b, "-": a - b, "*": a * b, "%": a % b if b else 0}[sign] == int(result), lesson
