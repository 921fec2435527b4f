"""Verifiers: the final answer in a response, whether it is right, and ROUGE-L. Named as in ``prompts.verifier``.

    number         the last number; commas, $, %, trailing dots and zeros do not matter, 3/4 is 0.75
    choice         a letter A to J: \\boxed{B}, "the answer is B", (B), or the last letter that stands alone
    yes_no         yes or no, true or false: after "answer is", or the first word, or the last that occurs
    exact          the whole text, without regard to case, white space and outer punctuation
    math           an expression, compared by math-verify
    reasoning_gym  the task's own scorer, on the part of the text that has the known answer's form
    none           no check; texts agree as under ``exact``, in self-consistency by ROUGE-L (``tasks/clusters.py``)
    module:function   your own: (text, answer, entry) -> (final_answer, correct); answer and entry may be None

Every verifier takes any text: control characters, lone surrogates, a megabyte. What a reasoning model thinks, up to
``</think>``, is no part of its answer.
"""

import importlib
import json
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from tasks import forms
from tasks.child import Unanswered, ask

# math-verify's patterns take time on long texts.
MATH_CHARACTERS = 2_000
# The table of ROUGE-L has a cell for each pair of words.
ROUGE_CHARACTERS = 10_000

FORM_VERIFIERS: dict[str, Callable[[str], str | None]] = {
    "number": forms.number,
    "choice": forms.choice,
    "yes_no": forms.yes_no,
    "exact": forms.exact,
    "none": forms.exact,
}
UserVerifier = Callable[[str, str | None, dict[str, Any] | None], tuple[str | None, bool | None]]

# Tasks of reasoning-gym whose scorers hand the answer to Python's eval, by themselves or through sympy.
EVALUATING = {
    "binary_matrix",
    "countdown",
    "intermediate_integration",
    "n_queens",
    "polynomial_multiplication",
    "puzzle24",
    "simple_integration",
    "spiral_matrix",
    "string_insertion",
}
_FUNCTIONS = {
    "sin",
    "cos",
    "tan",
    "asin",
    "acos",
    "atan",
    "sinh",
    "cosh",
    "tanh",
    "exp",
    "log",
    "ln",
    "sqrt",
    "Abs",
    "Integral",
}


def harmless(answer: str) -> bool:
    """Whether an answer that will be evaluated only calculates: it calls nothing but mathematical functions, and names
    no attribute."""
    return (
        len(answer) <= 1000
        and re.fullmatch(r"[\w\s+\-*/^().,\[\]'\"=]*", answer) is not None
        and "__" not in answer
        and re.search(r"\.\s*[^\W\d]|[)\]'\"]\s*\(", answer) is None
        and all(name in _FUNCTIONS for name in re.findall(r"(\w*[^\W\d]\w*)\s*\(", answer))
    )


def math_answer(text: str) -> str | None:
    try:
        found = ask("math", "math_answer", forms.tail(text)[-MATH_CHARACTERS:])
    except Unanswered:
        return None
    if found is None:
        return None
    written, value = found
    return forms.number(written) if re.fullmatch(r"-?[\d.,]+", written) else value


def math_correct(text: str, answer: str) -> bool | None:
    try:
        return ask("math", "math_equal", forms.tail(text)[-MATH_CHARACTERS:], answer)
    except Unanswered:
        return False


def gym_correct(text: str, answer: str | None, entry: dict[str, Any]) -> bool:
    found = forms.find_form(entry["form"], text)
    if found is None or (entry["task"] in EVALUATING and not harmless(found)):
        return False
    expected = None if answer is None else forms.find_form(entry["form"], answer)
    # Some scorers read answers stricter than their question asks, or compare with what JSON cannot carry (tuples).
    if found == expected:
        return True
    # One scorer takes any text for false; and nothing but the known answer is a yes, a no or a whole number: not asking
    # saves starting the scorers' process.
    if entry["form"] == "verdict" or (entry["form"] == "number" and expected and expected.lstrip("-").isdigit()):
        return False
    try:
        score = ask("reasoning_gym", "score", entry["task"], entry["options"], found, answer, entry["metadata"])
    except Unanswered:
        return False
    return score > 0.999


@lru_cache(maxsize=16)
def user_verifier(name: str) -> UserVerifier:
    """The function ``module:function``. ValueError where it cannot be imported."""
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, SyntaxError, AttributeError, ValueError) as error:
        raise ValueError(
            f"prompts.verifier: {name!r} cannot be imported ({type(error).__name__}: {error}): give module:function of"
            " a module on PYTHONPATH"
        ) from error
    if not callable(found):
        raise ValueError(f"prompts.verifier: {name!r} is {type(found).__name__}, not a function")
    return found


def user_verdict(name: str, text: str, answer: str | None, entry: str | None) -> tuple[str | None, bool | None]:
    verdict = user_verifier(name)(text, answer, json.loads(entry) if entry else None)
    if not isinstance(verdict, tuple) or len(verdict) != 2:
        raise ValueError(f"prompts.verifier: {name!r} returned {verdict!r:.80}: return (final_answer, correct)")
    final, correct = verdict
    return None if final is None else str(final), None if correct is None else bool(correct)


def check_verifier(verifier: str) -> None:
    """ValueError, in one line, where a verifier does not exist."""
    if ":" in verifier:
        user_verifier(verifier)
    elif verifier not in (*FORM_VERIFIERS, "math", "reasoning_gym"):
        raise ValueError(
            f"verifier {verifier!r} is not known: use {', '.join(FORM_VERIFIERS)}, math or module:function"
        )


def final_answer(verifier: str, text: str, entry: str | None) -> str | None:
    """The normalised final answer, by which responses to one prompt are compared; None where none was found.

    ``entry`` is the prompt's column of that name. ValueError for an unknown verifier."""
    if verifier in FORM_VERIFIERS:
        return FORM_VERIFIERS[verifier](text)
    if verifier == "math":
        return math_answer(text)
    if verifier == "reasoning_gym":
        return forms.find_form(json.loads(entry or "{}").get("form", "text"), text)
    check_verifier(verifier)
    return user_verdict(verifier, text, None, entry)[0]


def is_correct(verifier: str, text: str, answer: str | None, entry: str | None) -> bool | None:
    """Whether the text's final answer is right; None where that cannot be known: no known answer, or one that the
    verifier cannot read. ValueError for an unknown verifier."""
    check_verifier(verifier)
    if ":" in verifier:
        return user_verdict(verifier, text, answer, entry)[1]
    if verifier == "reasoning_gym" and entry:
        return gym_correct(text, answer, json.loads(entry))
    if answer is None or verifier in ("none", "reasoning_gym"):
        return None
    if verifier == "math":
        return math_correct(text, answer)
    expected = FORM_VERIFIERS[verifier](answer)
    return None if expected is None else FORM_VERIFIERS[verifier](text) == expected


@lru_cache(maxsize=1)
def rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)


def rouge_l(text: str, references: Sequence[str]) -> float:
    """F1 of the longest common subsequence of stemmed words, 0 to 100, the best over the references; 0 without any.

    As in DistiLLM's evaluation; only Latin letters and digits count as words. The first 10,000 characters of each."""
    text = text[:ROUGE_CHARACTERS]
    scores = (rouge_scorer().score(reference[:ROUGE_CHARACTERS], text)["rougeL"] for reference in references)
    return 100 * max((score.fmeasure for score in scores), default=0.0)
