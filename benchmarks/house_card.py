"""Model cards of the house models. Used by ``python -m benchmarks.house``."""

from benchmarks.house_model import BATCH, COLD, DRILLED, MEASURED, SHAPES

CARD = """---
library_name: transformers
tags: [benchmark]
---
# House model: {role}

{parameters:,} parameters, Llama's shape ({layers} layers, width {width}), made by `python -m benchmarks.house` for the
comparison of methods (`python -m benchmarks.methods`) and of no use elsewhere. {taught}

{problems:,} problems a task and their answers come from reasoning-gym, worked solutions from
`benchmarks/lessons.py`. Problems of training and of the runs that use the model come from other seeds; ranges are
small, so that some may be equal.

Right answers to {count} problems of each task from seeds of their own, at temperature {temperature}:

| {tasks} |
|{lines}|
| {shares} |
"""
JUDGES = """
How well it tells right from wrong answers of teacher and student at temperature 0.8 (AUROC of `p_true`): {}.
"""


def card(role: str, parameters: int, found: dict[str, float], told: dict[str, float]) -> str:
    """A role's card: shares of right answers by task, and how well a judge tells right from wrong, where it is one."""
    shape = SHAPES[role]
    if shape.judge_steps:
        taught = (
            "It is the teacher at an earlier step, then taught to tell right answers from wrong ones in the words of"
            f" the signal `p_true`, on answers that teacher and student wrote ({shape.judge_steps} steps)."
        )
    elif shape.drill_steps:
        taught = (
            f"It was drilled in single steps of solutions to {DRILLED:,} further problems a task ({shape.drill_steps}"
            f" steps of {BATCH} rows), a whole solution among {1 + 1 / shape.worked:.0f} rows: it can calculate and"
            " hardly knows how to go about a problem."
        )
    else:
        taught = (
            f"Taught until {100 * shape.enough:.0f} % of answers to each task were right, {shape.steps} steps at most."
        )
    text = CARD.format(
        role=role,
        parameters=parameters,
        layers=shape.layers,
        width=shape.width,
        problems=shape.problems,
        taught=taught,
        count=MEASURED,
        temperature=COLD,
        tasks=" | ".join(found),
        lines="---|" * (len(found) - 1) + "---",
        shares=" | ".join(f"{100 * share:.1f} %" for share in found.values()),
    )
    return text + (JUDGES.format(", ".join(f"{task} {value:.2f}" for task, value in told.items())) if told else "")
