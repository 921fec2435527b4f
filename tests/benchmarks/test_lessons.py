"""Worked solutions: each ends with what the task's own verifier takes for right, and its steps add up."""

import re

import pytest

from benchmarks.grid import DISTINCT, HELD_OUT, HELDOUT, problems
from benchmarks.lessons import TASKS, drills, lessons
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


@pytest.mark.parametrize("task", TASKS)
def test_a_drill_asks_for_the_steps_that_it_answers(task: str) -> None:
    steps = {step for lesson in lessons(task, 30, 6) for step in lesson.solution.split(". ")[:-1]}
    found = drills(task, 30, 6)
    assert found
    for drill in found:
        answered = drill.solution.split(". ")
        assert set(answered) <= steps
        asked = drill.question.split(". ")
        assert len(asked) == len(answered)
        assert all(step.startswith(left) and left != step for left, step in zip(asked, answered, strict=True)), drill


def test_as_many_problems_are_held_out_as_the_grid_says() -> None:
    sources = ReasoningGymSource(seed=HELD_OUT, tasks=[ReasoningGymTask(**task) for task in problems(HELDOUT)])
    assert len({row.messages[-1]["content"] for row in read(sources, "auto")}) == DISTINCT


@pytest.mark.parametrize("task", ["chain_sum", "gcd", "products"])
def test_the_steps_of_a_solution_hold(task: str) -> None:
    for lesson in lessons(task, 50, 5):
        for left, sign, right, result in re.findall(r"(-?\d+) ([-+*%]) (\d+) = (-?\d+)", lesson.solution):
            a, b = int(left), int(right)
            assert {"+": a + b, "-": a - b, "*": a * b, "%": a % b if b else 0}[sign] == int(result), lesson
