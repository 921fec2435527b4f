"""The plan of a run: its stages, what is done, what it would take, and what stands in its way. Starts nothing."""

from dataclasses import asdict, dataclass, field
from typing import Any

from flows.distill import identities, story
from flows.estimate import Estimate, estimate
from flows.preflight import preflight, readable
from flows.record import load_record, run_id
from flows.story import Planner
from infra.store import open_store
from tasks.config import RunConfig


@dataclass
class PlannedStage:
    """One stage: whether its result stands, and what it takes if not (rows and tokens it writes, seconds)."""

    name: str
    fingerprint: str
    done: bool
    rows: int
    tokens: int
    seconds: float | None


@dataclass
class Plan:
    """What ``switchyard plan`` shows."""

    run: str
    root: str
    stages: list[PlannedStage] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    teacher_queries: int = 0
    teacher_tokens: int = 0
    teacher_money: str = ""
    memory_gib: float = 0.0
    disk_gib: float = 0.0

    @property
    def names(self) -> list[str]:
        return [stage.name for stage in self.stages]

    @property
    def seconds(self) -> float:
        return sum(stage.seconds or 0.0 for stage in self.stages if not stage.done)

    @property
    def summary(self) -> str:
        from flows.tables import duration

        left = sum(not stage.done for stage in self.stages)
        return (
            f"{left} of {len(self.stages)} stages to do, about {duration(self.seconds)}; "
            f"{self.teacher_queries:,} teacher queries in all, of at most {self.teacher_tokens:,} tokens"
            f"{self.teacher_money and ' and '}{self.teacher_money}; memory about {self.memory_gib:.1f} GiB, "
            f"disk about {self.disk_gib:.1f} GiB"
        )

    def facts(self) -> dict[str, Any]:
        return {**asdict(self), "seconds": self.seconds}


def plan_run(config: RunConfig, root: str) -> Plan:
    """The plan, with every problem that can be known before anything starts."""
    run = run_id(config)
    plan = Plan(run=run, root=root)
    plan.problems = readable(config, root)
    if plan.problems:
        # Without models, sources and store there is nothing to look at further.
        return plan
    known = load_record(open_store(root), run)
    planner = Planner(config, root, run, known.redo if known else {})
    story(planner, identities(config))
    needs: Estimate = estimate(config)
    for spec in planner.specs:
        cost = needs.stages.get(spec.stage)
        plan.stages.append(
            PlannedStage(
                name=spec.stage,
                fingerprint=spec.fingerprint,
                done=planner.store.exists(spec.manifest_path),
                rows=cost.rows if cost else 0,
                tokens=cost.tokens if cost else 0,
                seconds=cost.seconds if cost else None,
            )
        )
    plan.teacher_queries, plan.teacher_tokens = needs.teacher_queries, needs.teacher_tokens
    plan.teacher_money = needs.teacher_money
    plan.memory_gib, plan.disk_gib = needs.memory_gib, needs.disk_gib
    if not all(stage.done for stage in plan.stages):
        plan.problems = preflight(config, root, needs)
    return plan
