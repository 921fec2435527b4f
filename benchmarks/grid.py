"""The grid of runs that compares signals and methods: what a cell is, which there are, and in which order they run.

A cell is a whole run. All have the same settings but for a seed, a budget, and one setting that names the arm, so that
arms of one seed and budget share prompts, warm-up and teacher. The order makes a part of the grid worth reading: first
all signals and none, seed by seed, then every arm with all its seeds before the next.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.lessons import TASKS

SEEDS = (1, 2, 3)
# Chosen by plain fine-tuning, where the student learns and more from more, and by the time a cell takes.
BUDGET = 400
BUDGETS = (200, BUDGET, 800)
METHOD = "switch"
WARMUP_STEPS, STEPS, BATCH, LEARNING_RATE = 10, 60, 64, 2e-3

METHODS = ("switch", "sft", "gkd", "kd", "distillm", "minillm", "imitkd", "skd", "opd", "seqkd")
SIGNALS = ("all", "none", "consistency", "ta_student", "ta_teacher", "one-stage", "small-warmup")
# Of the queries, where others have a fifth.
SMALL_WARMUP = 0.05
# All signals, and the student's answer in the teacher's place where the TA trusts it clearly more.
STAND_IN = "stand-in"
# Threshold strategies and decays of SWITCH, as in the paper's tables.
GATES: dict[str, dict[str, Any]] = {
    "linear": {"type": "linear"},
    "growth": {"type": "exponential_growth"},
    "constant-0.2": {"type": "constant", "value": 0.2},
    "mix-in-0.2": {"type": "mix_in", "alpha": 0.2},
    "random-teacher": {"type": "random_teacher"},
    "decay-1/5": {"type": "exponential_decay", "rate": 1 / 5},
    "decay-1/15": {"type": "exponential_decay", "rate": 1 / 15},
    "decay-1/25": {"type": "exponential_decay", "rate": 1 / 25},
    "adaptive": {"type": "adaptive"},
}
# What the paper reports of its own pairs: share of tokens that the teacher wrote.
PUBLISHED_TEACHER_SHARE = {"decay-1/5": 0.78, "decay-1/10": 0.53, "decay-1/15": 0.19, "decay-1/25": 0.07}
CANDIDATES = 1200
LONGEST = 72
# Of what was taught the part in which the teacher is right about 7 to 9 times in 10.
RANGES: dict[str, dict[str, Any]] = {"chain_sum": {}, "gcd": {}, "leg_counting": {}, "products": {}}
LEARNT, HELDOUT = 600, 120
# Seeds of problems, far apart: reasoning-gym makes problem i of seed s as problem i + 1 of seed s - 1.
LEARNT_FROM, HELD_OUT = 3_000_000, 4_402_000
# Of gcd's held-out problems four are there twice.
DISTINCT = HELDOUT * len(RANGES) - 4


@dataclass(frozen=True, order=True)
class Arm:
    """What cells differ in beside their seed."""

    method: str = METHOD
    signals: str = "all"
    gate: str = "decay-1/10"
    budget: int = BUDGET

    @property
    def name(self) -> str:
        gate = "" if self.gate == "decay-1/10" else f"-{self.gate}"
        return f"{self.method}{gate}-{self.signals}-{self.budget}".replace("/", "-").replace(".", "-").replace("_", "-")

    def changes(self) -> dict[str, Any]:
        """Settings by path that make the arm: one for each thing in which it differs from the others."""
        found: dict[str, Any] = {"budget.queries": self.budget, "train.method": method(self.method)}
        if self.signals == "one-stage":
            # As many steps as both stages have.
            found |= {"budget.warmup_share": 0, "train.steps": WARMUP_STEPS + STEPS}
        elif self.signals == "small-warmup":
            found["budget.warmup_share"] = SMALL_WARMUP
        elif self.signals == STAND_IN:
            found["signals.keep.stand_in"] = {}
        else:
            found["signals.use"] = self.signals
        if self.gate in GATES:
            found["train.method"] = {**found["train.method"], "gate": GATES[self.gate]}
        return found


@dataclass(frozen=True)
class Cell:
    """One run."""

    arm: Arm
    seed: int

    @property
    def name(self) -> str:
        return f"{self.arm.name}-seed{self.seed}"


def method(name: str) -> dict[str, Any]:
    """A method with its paper's constants; rollouts as long as answers are."""
    longest = {} if name in ("sft", "seqkd", "kd") else {"max_new_tokens": LONGEST}
    return {"type": name, **longest}


def core() -> list[Arm]:
    """About 30 cells: signals against none, plain fine-tuning, the methods, then single signals."""
    return [
        Arm(),
        Arm(signals="none"),
        Arm(method="sft", signals="none"),
        *(Arm(method=name) for name in METHODS[1:6]),
        *(Arm(signals=name) for name in SIGNALS[2:6]),
    ]


def grid() -> list[Cell]:
    """All cells in their order."""
    arms = [
        *core(),
        *(Arm(method=name) for name in METHODS[6:]),
        # SWITCH's closest rival, where runs stand by default.
        Arm(method="gkd", signals="none"),
        Arm(signals="small-warmup"),
        Arm(signals=STAND_IN),
        *(Arm(gate=name) for name in GATES),
        *(Arm(signals=name, budget=budget) for budget in BUDGETS if budget != BUDGET for name in SIGNALS),
    ]
    first, rest = arms[:2], list(dict.fromkeys(arms[2:]))
    return [Cell(arm, seed) for seed in SEEDS for arm in first] + [Cell(arm, seed) for arm in rest for seed in SEEDS]


def settings(cell: Cell, house: Path) -> dict[str, Any]:
    """The run's settings."""
    models = {role: {"type": "huggingface", "id": str(house / role)} for role in ("teacher", "assistant", "student")}
    engine = {"max_model_len": 384, "kv_cache_gib": 0.25, "max_num_seqs": 256}
    # Both stages of all arms take equally many steps of equally many sequences.
    shared = {
        "batch_size": BATCH,
        "micro_batch": BATCH,
        "max_length": 192,
        "validate_every": 20,
        "checkpoint_every": STEPS,
    }
    data: dict[str, Any] = {
        "name": cell.name,
        "seed": cell.seed,
        "models": models,
        "prompts": {
            "sources": [{"type": "reasoning_gym", "seed": LEARNT_FROM, "tasks": problems(LEARNT)}],
            # The same in all cells, whatever their seed: there are no more than are used.
            "heldout_sources": [{"type": "reasoning_gym", "seed": HELD_OUT, "tasks": problems(HELDOUT)}],
            "heldout": DISTINCT,
            "max_prompt_tokens": 120,
            "near_duplicates": {"enabled": False},
        },
        "budget": {"queries": BUDGET, "warmup_share": 0.2},
        "sampling": {
            "teacher": {"temperature": 0.7, "max_tokens": LONGEST},
            "student": {"temperature": 0.7, "max_tokens": LONGEST, "samples": 5},
            "shard_size": 256,
        },
        "signals": {
            "candidates": CANDIDATES,
            "select": {"rule": "signals"},
            "keep": {"rule": "quantile", "threshold": 0.2},
        },
        "warmup": {**shared, "method": {"type": "sft"}, "steps": WARMUP_STEPS, "learning_rate": LEARNING_RATE / 2},
        "train": {**shared, "steps": STEPS, "learning_rate": LEARNING_RATE},
        "evaluate": {
            "seeds": [1, 2],
            "temperature": 0.7,
            "max_tokens": LONGEST,
            "reference": "teacher",
            "bootstrap": 500,
        },
        "promote": {"enabled": False},
        "engines": dict.fromkeys(("teacher", "assistant", "student"), engine),
        "device": "cpu",
    }
    for path, value in cell.arm.changes().items():
        *parts, last = path.split(".")
        place = data
        for part in parts:
            place = place.setdefault(part, {})
        place[last] = value
    return data


def problems(size: int) -> list[dict[str, Any]]:
    """So many of every task."""
    return [{"name": task, "size": size, "options": {**TASKS[task], **RANGES[task]}} for task in RANGES]
