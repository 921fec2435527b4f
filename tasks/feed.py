"""The feed: which sequences make a global batch, kept rows and rollouts, and what is counted of them.

Everything drawn is a function of the seed, the step and the state, so a resumed run draws the same. Methods that train
on a rollout more than once keep it in the state's pool; their feeds stand beside them.

Shape legend: T response positions of a rollout.
"""

import math
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import pyarrow.compute as pc
import torch
from torch import Tensor

from infra.manifest import load_manifest
from infra.store import open_store
from kernels.noise import sequence_key
from kernels.rollout import Rollout, Stats
from tasks.batches import Order, Sequence, chance, prompt_of, row_sequence
from tasks.checkpoint import State
from tasks.data import read_data
from tasks.methods import Method
from tasks.plan import Plan
from tasks.student import Student

Source = Literal["row", "prompt", "pool"]


@dataclass(frozen=True)
class Draw:
    """One sequence of a global batch: a kept row, a prompt to continue, or a rollout of the pool; it came up ``visit``
    times before."""

    source: Source
    name: str
    item: int
    visit: int = 0


@dataclass
class Load:
    """What a step trains on."""

    draws: list[Draw]  # of all workers
    mine: list[Draw]
    sequences: list[Sequence]  # of this worker
    cursor: tuple[int, int, int]  # rows drawn, prompts drawn, capped: behind this step
    written: list[Sequence] = field(default_factory=list)  # rolled out for this step, or at it, by this worker
    stats: Stats | None = None  # of these


class Feed:
    """A stage's data and where its sequences come from. ValueError where nothing is left to train on."""

    def __init__(self, plan: Plan, method: Method) -> None:
        self.plan, self.method = plan, method
        store, config = open_store(plan.root), plan.train
        self.data = data = read_data(
            store,
            [load_manifest(store, path) for path in plan.rows],
            [load_manifest(store, path) for path in plan.auxiliary],
            seed=plan.seed,
            validation_share=config.validation_share,
            max_length=config.max_length,
            max_new_tokens=method.max_new_tokens,
            stored=method.stored,
            soft=[load_manifest(store, path) for path in plan.soft_rows] if plan.soft_rows else None,
        )
        if not data.rows.num_rows:
            raise ValueError(
                f"no training rows of at most {config.max_length} tokens ({data.left_out}, validation: "
                f"{data.validation.num_rows}): raise train.max_length, or keep more annotations"
            )
        if method.on_policy_share and not data.prompts.num_rows:
            raise ValueError(
                f"no prompts to roll out ({data.left_out}): raise train.max_length, or lower "
                f"train.method.max_new_tokens"
            )
        self.rows = Order(data.rows.num_rows, plan.seed, f"{plan.stage_name} rows")
        self.prompts = Order(data.prompts.num_rows, plan.seed, f"{plan.stage_name} prompts")
        self.ready: deque[Load] = deque()
        self.asked: list[Draw] = []  # prompts of the last rollout

    def sizes(self) -> dict[str, int]:
        """Rows and prompts, used and left out."""
        tables = {"rows": self.data.rows, "validation_rows": self.data.validation, "prompts": self.data.prompts}
        counts = {name: table.num_rows for name, table in tables.items()}
        if self.plan.soft_rows:
            counts["soft_rows"] = pc.sum(self.data.rows["soft"]).as_py()
        return counts | self.data.left_out

    def source(self, state: State, coin: float) -> Source:
        """Where a sequence of the coming step is to come from; ``coin`` is uniform in [0, 1)."""
        return "prompt" if coin < self.method.on_policy_share else "row"

    def pooled(self, state: State, slot: int) -> int:
        """Which rollout of the pool the coming step takes in this place of its batch."""
        raise NotImplementedError(f"{type(self).__name__} keeps no rollouts")

    def validated(self, state: State, losses: list[float]) -> None:
        """Hear of a validation: the means of what the method measures."""

    def phi(self, state: State) -> float | None:
        """The share that the student writes, where it moves."""
        return None

    def room(self, state: State) -> float:
        """Rollouts that may still be started: once even one more could overrun the cap on teacher tokens, none."""
        if self.plan.online_teacher_tokens is None:
            return math.inf
        return (self.plan.online_teacher_tokens - state.teacher_tokens) // max(1, self.method.max_new_tokens)

    def draw(self, state: State) -> list[Draw]:
        """The coming step's global batch, the same on every worker; moves the state's cursor."""
        plan, room, draws = self.plan, self.room(state), []
        for slot in range(plan.train.batch_size):
            source = self.source(state, chance(plan.seed, plan.stage_name, state.step, slot))
            if (source == "prompt" and room < 1) or (source == "pool" and not state.pool):
                state.capped += 1
                source = "row"
            room -= source == "prompt"
            if source == "prompt":
                draws.append(self.next_prompt(state))
            elif source == "pool":
                item = self.pooled(state, slot)
                draws.append(Draw("pool", state.pool[item].name, item))
            else:
                item, visit = self.rows.at(state.rows_drawn)
                draws.append(Draw("row", self.data.rows["row_id"][item].as_py(), item, visit))
                state.rows_drawn += 1
        return draws

    def next_prompt(self, state: State) -> Draw:
        item, visit = self.prompts.at(state.prompts_drawn)
        state.prompts_drawn += 1
        return Draw("prompt", self.data.prompts["prompt_id"][item].as_py(), item, visit)

    def load(self, state: State, student: Student) -> Load:
        """The coming step's batch, and the state's cursor behind it. Collective, also for a worker without prompts.

        With ``rollouts_ahead`` the batches of some more steps are made with it, by the student as it is now.
        """
        if not self.ready:
            together = self.plan.train.rollouts_ahead + 1
            self._fill(state, student, min(together - state.step % together, self.plan.train.steps - state.step))
        load = self.ready.popleft()
        state.rows_drawn, state.prompts_drawn, state.capped = load.cursor
        return load

    def _fill(self, state: State, student: Student, steps: int) -> None:
        """Make the batches of so many steps; the state stays as it is."""
        ahead = replace(state)
        for _ in range(steps):
            draws = self.draw(ahead)
            # Workers take turns, rollouts first: each gets its share of the slow ones.
            mine = sorted(draws, key=lambda draw: draw.source != "prompt")[student.world.rank :: student.world.size]
            known = [
                state.pool[draw.item] if draw.source == "pool" else row_sequence(self.data.rows, draw.item)
                for draw in mine
                if draw.source != "prompt"
            ]
            self.ready.append(Load(draws, mine, known, (ahead.rows_drawn, ahead.prompts_drawn, ahead.capped)))
            ahead.step += 1
            # What the rollouts will cost is not known yet: at most this.
            ahead.teacher_tokens += self.method.max_new_tokens * sum(draw.source == "prompt" for draw in draws)
        if any(draw.source == "prompt" for load in self.ready for draw in load.draws):
            self._roll_out(student)

    def _roll_out(self, student: Student) -> None:
        """Continue this worker's prompts of all batches that are being made, in one go."""
        wanted = [[draw for draw in load.mine if draw.source == "prompt"] for load in self.ready]
        draws = [draw for part in wanted for draw in part]
        with student.whole() as model, self.method.together():
            if not draws:
                return
            written, rollout = self.write(model, draws)
        start = 0
        for load, part in zip(self.ready, rollout.split([len(part) for part in wanted]), strict=True):
            load.written, load.stats = written[start : start + len(part.tokens)], part.stats
            load.sequences = load.written + load.sequences
            start += len(part.tokens)

    def write(self, model: Any, draws: list[Draw]) -> tuple[list[Sequence], Rollout]:
        """These prompts, continued by the method."""
        self.asked = draws
        prompts = [prompt_of(self.data.prompts, draw.item) for draw in draws]
        keys = [sequence_key(self.plan.seed, self.plan.stage_name, draw.name, draw.visit) for draw in draws]
        rollout = self.method.rollout(model, [prompt for _, prompt in prompts], keys, self.plan.student.eos_token_ids)
        hidden: list[Any] = rollout.teacher_hidden or [None] * len(draws)
        written = [
            Sequence(name, prompt, tokens.cpu(), on_policy=True, teacher_hidden_TG=hidden_TG)
            for (name, prompt), tokens, hidden_TG in zip(prompts, rollout.tokens, hidden, strict=True)
        ]
        return written, rollout

    def counts(self, load: Load) -> Tensor:
        """What a step sums over workers, as one vector: weighted tokens on and off policy, tokens, sequences of the
        pool; rollouts, their tokens, how many ended themselves; then the rollouts' counts by position [8 x T]."""
        sequences, written, stats = load.sequences, load.written, load.stats
        eos = set(self.plan.student.eos_token_ids)
        weights = {
            kind: sum(sequence.weight * len(sequence.response) for sequence in sequences if sequence.on_policy is kind)
            for kind in (True, False)
        }
        scalars = [
            weights[True],
            weights[False],
            sum(len(sequence.response) for sequence in sequences),
            sum(draw.source == "pool" for draw in load.mine),
            len(written),
            sum(len(sequence.response) for sequence in written),
            sum(int(sequence.response[-1]) in eos for sequence in written),
        ]
        longest = self.method.max_new_tokens
        positions_8T = stats.by_position(longest).double() if stats else torch.zeros(8, longest, dtype=torch.float64)
        return torch.cat([torch.tensor(scalars, dtype=torch.float64), positions_8T.flatten()])
