"""The rules by which annotations are kept: what is known of one by itself, and which of a prompt's stay."""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from kernels.calibration import Isotonic
from kernels.quantile import neighbours
from tasks.agreement import disagrees
from tasks.clusters import clustered
from tasks.config.signals import Keep, StandIn
from tasks.verify import final_answer, is_correct


def threshold(keep: Keep, parts: Callable[[], Iterable[np.ndarray]], fit: Isotonic | None = None) -> float:
    """The confidence from which an annotation is kept; ``parts()`` are the TA's confidences, part by part, which are
    read through ``fit`` where there is one."""
    if keep.rule == "absolute":
        return keep.threshold
    found = neighbours(parts, keep.threshold) if keep.rule == "quantile" else None
    if found is None:
        return 0.0
    # Ranks stay under a map that never falls, so that the two values can be mapped instead of all.
    low, high = fit(np.array([found.low, found.high])).tolist() if fit else (found.low, found.high)
    return low + (high - low) * found.way


def reason(keep: Keep, least: float, sample: dict[str, Any], confidence: float, other: bool) -> str:
    """Why one annotation is kept or dropped; ``other``: its final answer is not the TA's."""
    if not sample["text"].strip():
        return "empty"
    if keep.drop_truncated and sample["finish_reason"] == "length":
        return "truncated"
    if math.isnan(confidence):
        return "unscored"
    if other:
        return "disagreement"
    return "kept" if confidence >= least else "below_threshold"


def join(prompt: dict[str, Any], scores: list[dict[str, Any]], same_text: float) -> None:
    """Give the prompt's texts that say the same one final answer, where it has no verifier to find it. ``scores``: its
    own rows, of which an earlier one never depends on a later one."""
    if prompt["verifier"] == "none":
        for row, answer in zip(scores, clustered([row["text"] for row in scores], same_text), strict=True):
            row["final_answer"] = answer


def choose(keep: Keep, scores: list[dict[str, Any]], confidences: list[float]) -> None:
    """Of several kept annotations of a prompt leave one: of the most frequent final answer where that is the rule, and
    among these the one that the TA trusts most. The others are dropped as ``not_chosen``."""
    by_prompt: dict[str, list[int]] = {}
    for number, row in enumerate(scores):
        if row["kept"]:
            by_prompt.setdefault(row["prompt_id"], []).append(number)
    for numbers in by_prompt.values():
        standing = numbers
        if keep.answers == "majority":
            finals = {number: scores[number]["final_answer"] for number in numbers}
            # One that could not be extracted agrees with nothing, not with another of its kind either.
            counts = {**Counter(finals.values()), None: 0}
            most = max(counts[final] for final in finals.values())
            standing = [number for number, final in finals.items() if counts[final] == most]
        best = max(standing, key=lambda number: confidences[number])
        for number in set(numbers) - {best}:
            scores[number] |= {"kept": False, "reason": "not_chosen"}


def judged(
    keep: Keep, least: float, prompt: dict[str, Any], sample: dict[str, Any], confidence: float, answers: dict[str, Any]
) -> dict[str, Any]:
    """A sample's row of ``scores`` by itself; ``answers`` are the TA's own, where they have to agree."""
    final = final_answer(prompt["verifier"], sample["text"], prompt["entry"])
    other = keep.agreement is not None and disagrees(prompt, final, answers)
    why = reason(keep, least, sample, confidence, other)
    return {
        **{name: sample[name] for name in ("sample_id", "prompt_id", "text")},
        "source": prompt["source"],
        "final_answer": final,
        "correct": is_correct(prompt["verifier"], sample["text"], prompt["answer"], prompt["entry"]),
        "kept": why == "kept",
        "reason": why,
    }


def replaced(
    stand_in: StandIn, scores: list[dict[str, Any]], confidences: list[float], own: dict[str, Any], confidence: float
) -> bool:
    """Whether the student's text, by its own row and the TA's confidence in it, takes the place of all annotations of
    its prompt among ``scores``. Those that were kept are dropped then, as ``replaced``."""
    theirs = [number for number, row in enumerate(scores) if row["prompt_id"] == own["prompt_id"]]
    known = [confidences[number] for number in theirs if not math.isnan(confidences[number])]
    finals = [scores[number]["final_answer"] for number in theirs]
    if not own["kept"] or not known or own["final_answer"] in [None, *finals]:
        return False
    if confidence - max(known) < stand_in.margin:
        return False
    for number in theirs:
        if scores[number]["kept"]:
            scores[number] |= {"kept": False, "reason": "replaced"}
    return True
