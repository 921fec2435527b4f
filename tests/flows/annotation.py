"""The sampling stage as the teacher's annotation, over hand-made prompts and within a budget."""

from pathlib import Path
from typing import Any

import pyarrow as pa

from infra.manifest import commit_manifest
from infra.models import ModelRef
from tasks import schemas
from tasks.sample import SampleSettings, run
from tasks.stage import Runtime, Stage, StageSpec

FACTOR = 1.5
MOST = 8  # tokens of an answer


class Annotation:
    """``engine``: how the teacher is served, an engine's settings or an endpoint's."""

    def __init__(
        self,
        root: Path,
        teacher: ModelRef,
        student: ModelRef,
        engine: dict[str, Any],
        prompts: int,
        caps: dict[str, Any],
    ) -> None:
        self.root = root
        models = self.made("models", {})
        models.facts["models"] = {"teacher": teacher.model_dump(), "student": student.model_dump()}
        rows = [self.prompt(number) for number in range(prompts)]
        made = self.made("prompts", {"prompts": pa.Table.from_pylist(rows, schema=schemas.PROMPT)})
        self.spec = StageSpec(
            stage="annotate",
            module="tasks.sample",
            settings={
                **{"role": "teacher", "engine": "teacher", "table": "prompts", "shard_size": 4, "caps": caps},
                **{"sampling": {"max_tokens": MOST}, "prompt_tokens": 64},
            },
            inputs={stage.spec.stage: commit_manifest(stage.store, stage.manifest).path for stage in (models, made)},
            root=str(root),
            runtime=Runtime(engines={"teacher": engine}, spending={"caps": caps, "factor": FACTOR}),
        )

    def prompt(self, number: int) -> dict[str, Any]:
        message = {"role": "user", "content": f"What is {number} + 1?"}
        return {"prompt_id": f"p{number}", "source": "sums", "messages": [message], "verifier": "number"}

    def made(self, name: str, tables: dict[str, pa.Table]) -> Stage[Any]:
        spec = StageSpec(stage=name, module=f"tasks.{name}", root=str(self.root))
        stage: Stage[Any] = Stage(spec, None)  # type: ignore[arg-type]
        for table, rows in tables.items():
            stage.write_table(table, rows)
        return stage

    def run(self) -> Stage[SampleSettings]:
        """One life of the stage; its manifest is not committed."""
        stage = Stage(self.spec, SampleSettings.model_validate(self.spec.settings))
        run(stage)
        return stage
