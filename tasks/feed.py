"""The feed: which sequences make a global batch, kept rows and rollouts, and what is counted of them.

Everything drawn is a function of the seed, the step and the cursor in the state, so a resumed run draws the same.

Shape legend: T response positions of a rollout.
"""

from collections import deque
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from infra.manifest import load_manifest
from infra.store import open_store
from kernels.noise import sequence_key
from kernels.rollout import Stats
from tasks.batches import Order, Sequence, chance, prompt_of, read_data, row_sequence
from tasks.checkpoint import State
from tasks.methods import Method
from tasks.plan import Plan
from tasks.student import Student


@dataclass(frozen=True)
class Draw:
    """One sequence of a global batch: a kept row, or a prompt to continue; it came up ``visit`` times before."""

    on_policy: bool
    item: int
    visit: int


@dataclass
class Load:
    """What a step trains on."""

    draws: list[Draw]  # of all workers
    mine: list[Draw]
    sequences: list[Sequence]  # of this worker
    cursor: tuple[int, int, int]  # rows drawn, prompts drawn, capped: behind this step
    stats: Stats | None = None


class Feed:
    """A stage's data and where its sequences come from. ValueError where nothing is left to train on."""

    def __init__(self, plan: Plan, method: Method) -> None:
        self.plan, self.method = plan, method
        store, config = open_store(plan.root), plan.train
        self.data = data = read_data(
            store,
            [load_manifest(store, path) for path in plan.rows],
            seed=plan.seed,
            validation_share=config.validation_share,
            max_length=config.max_length,
            max_new_tokens=method.max_new_tokens,
            stored=method.stored,
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

    def sizes(self) -> dict[str, int]:
        """Rows and prompts, used and left out."""
        tables = {"rows": self.data.rows, "validation_rows": self.data.validation, "prompts": self.data.prompts}
        return {name: table.num_rows for name, table in tables.items()} | self.data.left_out

    def draw(self, state: State) -> list[Draw]:
        """The coming step's global batch, the same on every worker; moves the state's cursor.

        Once the cap on teacher tokens could be overrun by even one more rollout, only rows are drawn.
        """
        plan, size = self.plan, self.plan.train.batch_size
        room = size
        if plan.online_teacher_tokens is not None:
            left = plan.online_teacher_tokens - state.teacher_tokens
            room = max(0, left // max(1, self.method.max_new_tokens))
        draws = []
        for slot in range(size):
            wanted = chance(plan.seed, plan.stage_name, state.step, slot) < self.method.on_policy_share
            if wanted and room:
                room -= 1
                draws.append(Draw(True, *self.prompts.at(state.prompts_drawn)))
                state.prompts_drawn += 1
            else:
                state.capped += wanted
                draws.append(Draw(False, *self.rows.at(state.rows_drawn)))
                state.rows_drawn += 1
        return draws

    def names(self, draws: list[Draw]) -> list[str]:
        """Prompt ids of rollouts, row ids of rows."""
        columns = {True: self.data.prompts["prompt_id"], False: self.data.rows["row_id"]}
        return [columns[draw.on_policy][draw.item].as_py() for draw in draws]

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
            mine = sorted(draws, key=lambda draw: not draw.on_policy)[student.world.rank :: student.world.size]
            rows = [row_sequence(self.data.rows, draw.item) for draw in mine if not draw.on_policy]
            cursor = (ahead.rows_drawn, ahead.prompts_drawn, ahead.capped)
            self.ready.append(Load(draws, mine, rows, cursor))
            ahead.step += 1
            # What the rollouts will cost is not known yet: at most this.
            ahead.teacher_tokens += self.method.max_new_tokens * sum(draw.on_policy for draw in draws)
        if self.method.on_policy_share:
            self._roll_out(student)

    def _roll_out(self, student: Student) -> None:
        """Continue this worker's prompts of all batches that are being made, in one go."""
        wanted = [[draw for draw in load.mine if draw.on_policy] for load in self.ready]
        draws = [draw for part in wanted for draw in part]
        prompts = [prompt_of(self.data.prompts, draw.item) for draw in draws]
        keys = [
            sequence_key(self.plan.seed, self.plan.stage_name, name, draw.visit)
            for (name, _), draw in zip(prompts, draws, strict=True)
        ]
        with student.whole() as model:
            if not prompts:
                return
            eos_ids = self.plan.student.eos_token_ids
            rollout = self.method.rollout(model, [prompt for _, prompt in prompts], keys, eos_ids)
        left = iter(prompts)
        for load, part in zip(self.ready, rollout.split([len(part) for part in wanted]), strict=True):
            hidden: list[Any] = part.teacher_hidden or [None] * len(part.tokens)
            rolled = [
                Sequence(*next(left), tokens.cpu(), on_policy=True, teacher_hidden_TG=hidden_TG)
                for tokens, hidden_TG in zip(part.tokens, hidden, strict=True)
            ]
            load.sequences, load.stats = rolled + load.sequences, part.stats

    def counts(self, load: Load) -> Tensor:
        """What a step sums over workers, as one vector: weighted tokens on and off policy, tokens, rollouts, their
        tokens, how many ended themselves; then, by position, emitted, interventions, agreeing and cuts [4 x T]."""
        sequences, stats = load.sequences, load.stats
        on = [sequence for sequence in sequences if sequence.on_policy]
        eos = set(self.plan.student.eos_token_ids)
        scalars = [
            sum(sequence.weight * len(sequence.response) for sequence in on),
            sum(sequence.weight * len(sequence.response) for sequence in sequences if not sequence.on_policy),
            sum(len(sequence.response) for sequence in sequences),
            len(on),
            sum(len(sequence.response) for sequence in on),
            sum(int(sequence.response[-1]) in eos for sequence in on),
        ]
        positions_4T = torch.zeros(4, self.method.max_new_tokens, dtype=torch.float64)
        if stats:
            for row, counts_T in enumerate((stats.emitted_T, stats.interventions_T, stats.agreeing_T, stats.cuts_T)):
                positions_4T[row, : len(counts_T)] = counts_T
        return torch.cat([torch.tensor(scalars, dtype=torch.float64), positions_4T.flatten()])
