"""Worked solutions to four task families of reasoning-gym: what the house models are taught.

Problems and answers are reasoning-gym's; the steps are written here, so that a small model can follow them. A response
ends with "Answer: …", and its own verifier reads that.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Where the models are that were taught.
HOUSE = Path(__file__).parent / "house"
# What is taught. Runs take their problems from the same ranges or a part of them.
TASKS: dict[str, dict[str, Any]] = {
    "chain_sum": {"min_terms": 3, "max_terms": 6, "min_digits": 1, "max_digits": 1},
    "gcd": {"min_value": 4, "max_value": 60},
    "leg_counting": {"min_animals": 1, "max_animals": 3, "max_instances": 12},
    "products": {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2},
}


@dataclass(frozen=True)
class Lesson:
    """A problem with its worked solution."""

    task: str
    question: str
    solution: str
    answer: str


def chain_sum(metadata: dict[str, Any]) -> str:
    """Running totals."""
    total, *rest = metadata["expression"].split()
    steps = []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        result = int(total) + int(term) * (1 if sign == "+" else -1)
        steps.append(f"{total} {sign} {term} = {result}")
        total = str(result)
    return ". ".join(steps)


def gcd(metadata: dict[str, Any]) -> str:
    """Euclid's remainders."""
    large, small = sorted(metadata["numbers"], reverse=True)
    steps = []
    while small:
        steps.append(f"{large} % {small} = {large % small}")
        large, small = small, large % small
    return ". ".join(steps)


def leg_counting(metadata: dict[str, Any]) -> str:
    """Legs by animal, and their running total."""
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    total, steps = 0, []
    for animal, count in metadata["animals"].items():
        legs = count * ANIMALS[animal]
        total += legs
        steps.append(f"{animal} {count} * {ANIMALS[animal]} = {legs}, {total}")
    return ". ".join(steps)


def products(metadata: dict[str, Any]) -> str:
    """The first number times each digit of the second, then the sum, a digit at a time."""
    first, second = (int(number) for number in metadata["expression"].split(" * "))
    tens, ones = divmod(second, 10)
    steps = [f"{first} * {ones} = {first * ones}", f"{first} * {tens} = {first * tens}"]
    total, sums = 10 * first * tens, []
    for place in (100, 10, 1):
        digit = first * ones // place % 10 * place
        sums.append(f"{total} + {digit} = {total + digit}")
        total += digit
    return ". ".join([*steps, *sums])


WORKED: dict[str, Callable[[dict[str, Any]], str]] = {
    "chain_sum": chain_sum,
    "gcd": gcd,
    "leg_counting": leg_counting,
    "products": products,
}


def lessons(task: str, count: int, seed: int) -> Iterator[Lesson]:
    """Problems of one task with their solutions."""
    import reasoning_gym

    for entry in reasoning_gym.create_dataset(task, size=count, seed=seed, **TASKS[task]):
        solution = f"{WORKED[task](entry['metadata'])}. Answer: {entry['answer']}"
        yield Lesson(task, entry["question"], solution, entry["answer"])


def drills(task: str, count: int, seed: int) -> list[Lesson]:
    """One to three single steps as a problem of their own, from the solutions of ``count`` problems: "18 % 3. 41 % 3"
    is answered "18 % 3 = 0. 41 % 3 = 2". Where a step goes on from the one before, as totals of legs do, steps of a
    problem's beginning stay together."""
    generator = random.Random(seed)
    solutions = [lesson.solution.split(". ")[:-1] for lesson in lessons(task, count, seed)]
    if task == "leg_counting":
        spans = [steps[: generator.randint(1, 2)] for steps in solutions]
    else:
        steps = [step for solution in solutions for step in solution]
        generator.shuffle(steps)
        spans = []
        while steps:
            spans.append([steps.pop() for _ in range(min(generator.randint(1, 3), len(steps)))])
    asked = " * " if task == "leg_counting" else " = "
    return [
        Lesson(task, ". ".join(step.partition(asked)[0] for step in span), ". ".join(span), span[-1]) for span in spans
    ]
