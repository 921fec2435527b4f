"""Measure: the metrics of an evaluation alone, with intervals. Table ``metrics``, facts ``metrics``.

python -m tasks.measure --spec SPEC.json
"""

from infra.parts import read_rows
from tasks.config.base import Config
from tasks.config.evaluate import EvaluateConfig
from tasks.metrics import EVALUATION_COLUMNS, LOSS_COLUMNS, as_table, measure
from tasks.stage import Stage, main


class MeasureSettings(Config):
    """How the input ``evaluate`` is summed up."""

    evaluate: EvaluateConfig
    """Intervals."""
    seed: int = 0
    """Seed of the run; resamples follow it."""


def run(stage: Stage[MeasureSettings]) -> None:
    found = stage.input("evaluate")
    answers = read_rows(stage.store, found, "evaluations", EVALUATION_COLUMNS)
    losses = read_rows(stage.store, found, "losses", LOSS_COLUMNS)
    results = measure(answers, losses, stage.settings.evaluate, stage.settings.seed)
    stage.write_table("metrics", as_table(results))
    labels = [label for metric in ("loss", "rouge_l", "accuracy") for label in results.known(metric)]
    stage.facts.update(metrics={label: results.metrics[label] for label in labels}, heldout=results.problems)
    stage.progress(1, 1, "steps", last=True)


if __name__ == "__main__":
    main(MeasureSettings, run)
