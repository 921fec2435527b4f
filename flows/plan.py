"""The plan of a run: its stages, what is done, what it would take, and what stands in its way. Starts nothing."""

from dataclasses import asdict, dataclass, field
from typing import Any

from flows.cycle import NothingToDo, look
from flows.distill import story
from flows.estimate import Estimate, estimate
from flows.preflight import Checks, preflight, readable, sources_readable
from flows.record import load_record, rival_of, run_id
from flows.story import Planner
from infra.manifest import Manifest, load_manifest
from infra.store import Store, open_store
from tasks.config import RunConfig
from tasks.stage import one_line


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
    checks: dict[str, bool] = field(default_factory=dict)  # by name, whether nothing was found
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what the settings mean where that may surprise
    teacher_queries: int = 0
    nothing: str = ""  # why a recurring run would end at once
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
        from flows.artifacts import duration

        if self.nothing:
            return self.nothing
        left = sum(not stage.done for stage in self.stages)
        said = (
            f"{left} of {len(self.stages)} stages to do, about {duration(self.seconds)}; "
            f"{self.teacher_queries:,} teacher queries in all, of at most {self.teacher_tokens:,} tokens"
            f"{self.teacher_money and ' and '}{self.teacher_money}; memory about {self.memory_gib:.1f} GiB, "
            f"disk about {self.disk_gib:.1f} GiB"
        )
        return "\n".join([said, *self.notes])

    def made(self, store: Store, path: str) -> Manifest | None:
        """The manifest of a stage that is complete. One that is damaged stands in the way."""
        try:
            return load_manifest(store, path)
        except FileNotFoundError:
            return None
        except ValueError as error:
            line = f"--root: {one_line(error)}: switchyard verify {self.run} --repair forgets it"
            self.problems = list(dict.fromkeys([*self.problems, line]))
            return None

    def take(self, found: Checks) -> bool:
        """Note down what checks found; whether anything stands in the way."""
        self.checks |= {name: not problems for name, problems in found.items()}
        self.problems += [problem for problems in found.values() for problem in problems]
        return bool(self.problems)

    def facts(self) -> dict[str, Any]:
        return {**asdict(self), "seconds": self.seconds}


def notes(config: RunConfig) -> list[str]:
    """What signals do not decide, what several teachers do, and a mentor: a line each."""
    found = [] if config.warms_up else ["one stage: no warm-up, signals are those of the student as it comes"]
    silent = {"select": "prompts are drawn at random", "keep": "every whole annotation is kept"}
    chosen = {"select": config.signals.select.rule != "random", "keep": config.signals.keep.rule != "all"}
    if said := ", ".join(text for part, text in silent.items() if not chosen[part]):
        found.append(f"signals: {said}")
    if chosen["keep"] and config.trains_on_rollouts_alone:
        found.append(
            f"signals.keep: {config.train.method.type} starts rollouts from every prompt that was paid for, and trains "
            "on nothing else, so what is dropped changes the warm-up alone"
        )
    if peers := config.peers:
        review = f", peer review from {peers.review.threshold:g} on" if peers.review else ""
        routing = peers.routing.type.replace("_", " ")
        found.append(f"teachers: {', '.join(config.teachers)}; who answers: {routing}{review}")
        methods = (training.method for training in config.trainings.values())
        learn = [method.type for method in methods if method.compares]
        if learn:
            found.append(
                f"{' and '.join(dict.fromkeys(learn))}: distributions are those of models.teacher, the first teacher, "
                "also on what the others wrote"
            )
    if mentor := config.mentor:
        found.append(
            f"mentor: annotates up to {mentor.prompts:,} further prompts with soft labels, at no teacher query"
        )
    return found


def plan_run(config: RunConfig, root: str) -> Plan:
    """The plan, with every problem that can be known before anything starts."""
    plan = Plan(run=run_id(config), root=root)
    if plan.take(readable(config, root)):
        # Without models, sources and store there is nothing to look at further.
        return plan
    store = open_store(root)
    try:
        start = look(config, store)
        known = load_record(store, start.run)
        rival = rival_of(store, start.config, known)
    except NothingToDo as nothing:
        plan.nothing = str(nothing)
        return plan
    except ValueError as error:
        plan.problems = [one_line(error)]
        return plan
    config, plan.run = start.config, start.run
    if start.cycle and not start.cycle.prompts and plan.take({"prompts can be read": sources_readable(config)}):
        return plan
    planner = Planner(config, root, start.run, known.redo if known else {})
    story(planner, {**start.found, "promoted": rival})
    prompts = next(spec.manifest_path for spec in planner.specs if spec.stage == "prompts")
    made = plan.made(store, prompts)
    if made and (waits := made.facts.get("waits")):
        plan.nothing = f"nothing new: {waits}; they wait"
        return plan
    needs: Estimate = estimate(config)
    for spec in planner.specs:
        cost = needs.stages.get(spec.stage)
        plan.stages.append(
            PlannedStage(
                name=spec.stage,
                fingerprint=spec.fingerprint,
                done=plan.made(store, spec.manifest_path) is not None,
                rows=cost.rows if cost else 0,
                tokens=cost.tokens if cost else 0,
                seconds=cost.seconds if cost else None,
            )
        )
    plan.teacher_queries, plan.teacher_tokens = needs.teacher_queries, needs.teacher_tokens
    plan.teacher_money, plan.notes = needs.teacher_money, [*notes(config), *needs.notes]
    plan.memory_gib, plan.disk_gib = needs.memory_gib, needs.disk_gib
    if not all(stage.done for stage in plan.stages):
        plan.take(preflight(config, root, needs))
    return plan
