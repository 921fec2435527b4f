"""Worked solutions to five task families of reasoning-gym: what the house models are taught.

Problems and answers are reasoning-gym's; the steps are written here, so that a small model can follow them. A response
ends with "Answer: …", and its own verifier reads that.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

LEGS_OPTIONS = {"min_animals": 2, "max_animals": 4, "max_instances": 12}
TASKS: dict[str, dict[str, Any]] = {
    "chain_sum": {"min_terms": 3, "max_terms": 5, "min_digits": 1, "max_digits": 2},
    "gcd": {"min_value": 10, "max_value": 150},
    "leg_counting": LEGS_OPTIONS,
    "letter_counting": {"min_words": 4, "max_words": 8},
    "spell_backward": {"min_word_len": 4, "max_word_len": 10},
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
    """Euclid's divisions."""
    large, small = sorted(metadata["numbers"], reverse=True)
    steps = []
    while small:
        steps.append(f"{large} = {large // small} * {small} + {large % small}")
        large, small = small, large % small
    return ". ".join(steps)


def leg_counting(metadata: dict[str, Any]) -> str:
    """Legs by animal, and their running total."""
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    total, steps = 0, []
    for animal, count in metadata["animals"].items():
        legs = count * ANIMALS[animal]
        steps.append(f"{animal} {count} * {ANIMALS[animal]} = {legs}, {total} + {legs} = {total + legs}")
        total += legs
    return ". ".join(steps)


def letter_counting(metadata: dict[str, Any]) -> str:
    """The count after each word."""
    total, steps = 0, []
    for word in metadata["span"]:
        total += word.lower().count(metadata["target_letter"])
        steps.append(f"{word} {total}")
    return ". ".join(steps)


def spell_backward(metadata: dict[str, Any]) -> str:
    """The letters numbered, so that the last one is known."""
    return " ".join(f"{letter}{number}" for number, letter in enumerate(metadata["word"], 1))


WORKED: dict[str, Callable[[dict[str, Any]], str]] = {
    "chain_sum": chain_sum,
    "gcd": gcd,
    "leg_counting": leg_counting,
    "letter_counting": letter_counting,
    "spell_backward": spell_backward,
}


def lessons(task: str, count: int, seed: int) -> Iterator[Lesson]:
    """Problems of one task with their solutions."""
    import reasoning_gym

    for entry in reasoning_gym.create_dataset(task, size=count, seed=seed, **TASKS[task]):
        solution = f"{WORKED[task](entry['metadata'])}. Answer: {entry['answer']}"
        yield Lesson(task, entry["question"], solution, entry["answer"])


def wrong(lesson: Lesson, generator: random.Random) -> str:
    """The solution with one character of its steps or answer changed, and all that follows left as it was: what a
    judge is taught to doubt."""
    kind = str.isdigit if any(map(str.isdigit, lesson.answer)) else str.isalpha
    places = [place for place, letter in enumerate(lesson.answer) if kind(letter)]
    place = generator.choice(places)
    others = "0123456789" if lesson.answer[place].isdigit() else "abcdefghijklmnopqrstuvwxyz"
    other = generator.choice([letter for letter in others if letter != lesson.answer[place]])
    answer = lesson.answer[:place] + other + lesson.answer[place + 1 :]
    return lesson.solution[: -len(lesson.answer)] + answer
