"""Signals on real text: runs that differ in signals only, and a report that finds what is in the figures."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import real_text, results_page
from benchmarks.real_text import Cell
from tasks.config import RunConfig


def test_arms_differ_in_signals_only() -> None:
    assert len({cell.name for cell in real_text.grid()}) == len(real_text.grid())
    for data in real_text.FILES:
        one, other = (real_text.settings(Cell(data, arm, 2), Path("/data")) for arm in real_text.SIGNALS)
        both = [RunConfig.model_validate(settings).model_dump(exclude={"name", "signals"}) for settings in (one, other)]
        assert both[0] == both[1]
        assert (one["seed"], one["signals"]["select"]["rule"], other["signals"]["keep"]["rule"]) == (
            2,
            "signals",
            "all",
        )
        assert one["models"]["student"]["layers"] == real_text.LAYERS


def write(folder: Path, cell: Cell, final: float) -> None:
    """A cell's file; the same prompts are hard in all cells."""
    hard = np.random.default_rng(0).normal(size=40)
    means = {"base": 5.0, "teacher": 30.0, "warmup": 10.0, "final": final}
    marks = {label: {f"p{number}": mean + hard[number] for number in range(40)} for label, mean in means.items()}
    result: dict[str, Any] = {"arm": vars(cell), "teacher_tokens": 1000, "rouge_l": marks, "loss": marks}
    (folder / f"{cell.name}.json").write_text(json.dumps(result))


def test_the_report_finds_the_difference_on_seeds_that_both_arms_have(tmp_path: Path) -> None:
    for seed in (1, 2):
        write(tmp_path, Cell("dolly", "all", seed), 15.0 + seed)
        write(tmp_path, Cell("dolly", "none", seed), 14.0)
    write(tmp_path, Cell("dolly", "all", 3), 90.0)
    write(tmp_path, Cell("gsm8k", "all", 1), 90.0)
    rows = real_text.summary(real_text.load(tmp_path))
    assert [(row["data"], row["metric"], row["seeds"]) for row in rows] == [
        ("dolly", "rouge_l", [1, 2]),
        ("dolly", "loss", [1, 2]),
    ]
    assert rows[0]["difference"] == pytest.approx(2.5)
    low, high = rows[0]["interval"]
    assert (low, high) == pytest.approx((2, 3))
    assert rows[0]["teacher"] - rows[0]["base"] == pytest.approx(25)
    assert "| dolly | ROUGE-L |" in results_page.real(rows)
    assert "+2.50 | 2.00 to 3.00 | 2 | 1.00 |" in results_page.real(rows)
