"""DistiLLM (Ko et al. 2024): a skewed divergence, and a replay buffer in place of most rollouts (method.md, section 4).

φ is the share of a batch that the student writes. Of it, 1 − step / steps is written anew and goes into the buffer (all
of it until the buffer is full), the rest is replayed. φ grows when the validation cross entropy has risen: then the
student's own text is what it is worst at.

Shape legend: N response positions of a micro-batch, H student width.
"""

from typing import Any

import torch
from torch import Tensor

from tasks.batches import Batch, Sequence, chance, prompt_of
from tasks.checkpoint import State
from tasks.config import methods as config
from tasks.feed import Feed, Load, Source
from tasks.methods import OnPolicy, cross_entropy
from tasks.plan import Plan
from tasks.pool import everyone
from tasks.student import Head, Student


class Distillm(OnPolicy):
    """D(p ‖ q) on annotated rows and on what the student writes or wrote."""

    def __init__(self, settings: config.Distillm, teacher: Any, vocabulary: int) -> None:
        super().__init__(settings, teacher, vocabulary, settings.divergence)
        self.settings = settings

    def validate(self, hidden_NH: Tensor, head: Head, batch: Batch, sequences: list[Sequence]) -> tuple[Tensor, ...]:
        """The divergence, and the cross entropy that φ goes by."""
        return *super().validate(hidden_NH, head, batch, sequences), cross_entropy(hidden_NH, head, batch)[1]


class Replay(Feed):
    """DistiLLM's batches. The state's pool is the buffer. ValueError where φ would have nothing to go by."""

    method: Distillm

    def __init__(self, plan: Plan, method: Distillm) -> None:
        super().__init__(plan, method)
        self.settings = method.settings
        if not self.data.validation.num_rows:
            raise ValueError(
                "train.method distillm goes by the validation loss, and no kept row was set aside for it: raise "
                "train.validation_share, or keep more annotations"
            )

    def phi(self, state: State) -> float:
        return min(1.0, self.settings.first_share + state.phi_steps * self.settings.share_step)

    def validated(self, state: State, losses: list[float]) -> None:
        _, cross_entropy = losses
        if state.phi_loss is None:
            state.phi_loss = cross_entropy
        elif cross_entropy >= state.phi_loss + self.settings.rise:
            state.phi_loss, state.phi_steps = cross_entropy, state.phi_steps + 1

    def source(self, state: State, coin: float) -> Source:
        phi, full = self.phi(state), len(state.pool) >= self.settings.capacity
        if coin < phi * (1 - state.step / self.plan.train.steps) or (coin < phi and not full):
            return "prompt"
        return "pool" if coin < phi else "row"

    def pooled(self, state: State, slot: int) -> int:
        draw = chance(self.plan.seed, self.plan.stage_name, "replay", state.step, slot)
        return int(draw * len(state.pool))

    def load(self, state: State, student: Student) -> Load:
        load = super().load(state, student)
        prompts = [prompt_of(self.data.prompts, draw.item) for draw in load.draws if draw.source == "prompt"]
        mine = [sequence.response[None] for sequence in load.written]
        for prompt, tokens_1T in zip(
            prompts, everyone(student.world, mine, len(prompts), self.method.max_new_tokens), strict=True
        ):
            state.pool.append(Sequence(*prompt, tokens_1T[0].to(torch.int64), on_policy=True))
        state.pool = state.pool[-self.settings.capacity :]
        return load
