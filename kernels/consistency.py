"""Self-consistency of one prompt's answers.

    python -m pytest tests/kernels/test_consistency.py

With n answers of which k are distinct, answer i occurring c_i times:

    unique = k          majority share = max_i c_i / n          entropy = −Σ_i (c_i/n) ln(c_i/n) / ln n   in [0, 1]

An answer that could not be extracted (None) agrees with nothing, not even with another None: five responses without an
answer are five unique answers, the most uncertain a student can be. It becomes the majority only where nothing was
extracted at all.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Consistency:
    """What one prompt's answers agree on."""

    unique: int
    majority_share: float
    entropy: float
    """Normalised to 0 (all agree) … 1 (all differ); 0 for a single answer."""
    majority_answer: str | None
    majority_index: int
    """First of the answers that is the majority answer."""


def tie_break(key: str, answer: str) -> bytes:
    """Orders answers of equal count. The key (the prompt's id) enters, or one answer would win every prompt's ties."""
    return hashlib.sha256(f"{key}\0{answer}".encode("utf-8", "surrogatepass")).digest()


def consistency(answers: Sequence[str | None], key: str) -> Consistency:
    """Agreement of n normalised answers to the prompt named ``key``. ValueError where there are none."""
    if not answers:
        raise ValueError("consistency of no answers: sample at least one")
    counts = Counter(answer for answer in answers if answer is not None)
    missing = len(answers) - counts.total()
    shares = np.array([*counts.values(), *[1] * missing]) / len(answers)
    majority = min(counts, key=lambda answer: (-counts[answer], tie_break(key, answer)), default=None)
    entropy = float(-(shares * np.log(shares)).sum() / np.log(len(answers))) if len(answers) > 1 else 0.0
    return Consistency(
        unique=len(shares),
        majority_share=(counts[majority] if majority is not None else 1) / len(answers),
        entropy=min(max(entropy, 0.0), 1.0),
        majority_answer=majority,
        majority_index=answers.index(majority),
    )
