"""The mentor's part of the story: it learns what was kept, and annotates what the teacher was not asked."""

from typing import Any

from flows.story import Pipeline


def mentor(
    pipeline: Pipeline, rows: dict[str, str], shared: dict[str, Any], *, models: str, prompts: str, select: str
) -> dict[str, str]:
    """The mentor's training on these rows, and what it then wrote, by stage."""
    config = pipeline.config
    assert config.mentor
    plain = config.mentor.model_dump(mode="json")
    trained = pipeline.stage(
        "mentor-train",
        "tasks.train",
        {
            "train": plain["train"],
            "seed": config.seed,
            "student": "mentor",
            "rows": [name.replace("_", "-") for name in rows],
            "stage_name": "mentor",
        },
        models=models,
        **rows,
    )
    written = pipeline.stage(
        "mentor-annotate",
        "tasks.sample",
        {
            "role": "mentor",
            "engine": "mentor",
            "weights": "mentor-train",
            "table": "candidates",
            "further": {"apart_from": "select", "count": config.mentor.prompts},
            "sampling": plain["sampling"],
            "distributions": plain["distributions"],
            "seed": config.seed,
            **shared,
        },
        models=models,
        prompts=prompts,
        mentor_train=trained,
        select=select,
    )
    return {"mentor_train": trained, "mentor_annotate": written}
