"""Calibration of the TA's confidence: what share of annotations with this confidence is correct.

It is fitted on annotations of validation prompts whose answer is known, the same that training sets aside, so no row
that is trained on says what its own confidence is worth.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from kernels.calibration import Isotonic, isotonic
from tasks.config.signals import Calibration
from tasks.verify import is_correct


class Fit(NamedTuple):
    """The map, and the sample ids it was fitted on."""

    map: Isotonic
    seen: frozenset[str]


def fitted(
    shards: Iterable[tuple[int, list[dict[str, Any]], pa.Table]],
    confidences_of: Callable[[int], np.ndarray],
    settings: Calibration,
    seed: int,
    validation_share: float,
) -> tuple[Fit | None, int]:
    """The calibration, None where too little is known, and how many annotations could be used.

    ``shards`` are (number, one prompt row per sample, samples); a shard's confidences are aligned with its samples.
    """
    # Imports torch, which a stage that only filters can do without.
    from tasks.batches import chance

    seen, confidences, marks = [], [], []
    for shard, prompts, samples in shards:
        columns = samples.select(["sample_id", "text"]).to_pylist()
        for prompt, sample, confidence in zip(prompts, columns, confidences_of(shard).tolist(), strict=True):
            if math.isnan(confidence) or chance(seed, "validation", prompt["prompt_id"]) >= validation_share:
                continue
            correct = is_correct(prompt["verifier"], sample["text"], prompt["answer"], prompt["entry"])
            if correct is not None:
                seen.append(sample["sample_id"])
                confidences.append(confidence)
                marks.append(correct)
    if len(seen) < settings.least:
        return None, len(seen)
    return Fit(isotonic(confidences, marks), frozenset(seen)), len(seen)
