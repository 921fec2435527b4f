"""MiniLLM (Gu et al. 2024): policy gradient on what student and teacher write together (method.md, section 4).

Every ``epochs`` · ``collected_batches`` steps a collection is rolled out, each token drawn from 0.8 q + 0.2 p, scored
by both models, and gone through ``epochs`` times. The gradient's long part is PPO's clipped objective, q over the law
that drew the token being the importance weight; its single-step part is KL(q ‖ p) at every position, without one.

Shape legend: N response positions of a micro-batch, H student width, T response positions of a sequence.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kernels import gate
from kernels.divergence import log_mixture
from kernels.policy import clipped_N, returns_T, rewards_N, whiten_N
from kernels.rollout import Stats
from kernels.rules import evaluating
from tasks.batches import Batch, Order, Sequence, collate, prompt_of
from tasks.checkpoint import State
from tasks.config import methods as config
from tasks.feed import Feed, Load, Source
from tasks.methods import Kd, Together, apart, cross_entropy
from tasks.plan import Plan
from tasks.pool import everyone
from tasks.student import Head, Loss, Student, head_of, hidden_states


class Minillm(Together):
    """What is reported: of rollouts, the clipped objective plus KL(q ‖ p); of annotated rows, the language-modelling
    term; of validation rows, KL(q ‖ p)."""

    def __init__(self, settings: config.Minillm, teacher: Any, vocabulary: int) -> None:
        coin = gate.Coin(teacher_share=settings.teacher_share)
        super().__init__(settings, teacher, vocabulary, config.Divergence(name="reverse_kl"), coin)
        self.settings = settings
        term = config.Kd(cross_entropy_share=settings.cross_entropy_share, annotated=settings.annotated)
        self.language = Kd(term, teacher, vocabulary)

    def loss(self, hidden_NH: Tensor, head: Head, batch: Batch, sequences: list[Sequence]) -> Loss:
        return apart(hidden_NH, head, batch, sequences, rolled=self._policy, annotated=self._language)

    def validate(self, hidden_NH: Tensor, head: Head, batch: Batch, sequences: list[Sequence]) -> tuple[Tensor, ...]:
        return (super().loss(hidden_NH, head, batch, sequences)[1],)

    def _policy(self, hidden_NH: Tensor, head: Head, batch: Batch, sequences: list[Sequence]) -> Loss:
        q = head.first(self.vocabulary)
        drawn = [sequence.drawn_2T for sequence in sequences if sequence.drawn_2T is not None]
        log_b_N, advantages_N = torch.cat(drawn, 1).to(hidden_NH.device)
        with torch.no_grad():
            _, minus_log_q_N = cross_entropy(hidden_NH, q, batch)
            objective_N, pull_N = clipped_N(-minus_log_q_N, log_b_N, advantages_N, self.settings.clip)
        surrogate, _ = cross_entropy(hidden_NH, q, replace(batch, weights_N=batch.weights_N * pull_N))
        single, single_N = self._live(hidden_NH, head, batch, sequences)
        return surrogate + single, objective_N + single_N

    def _language(self, hidden_NH: Tensor, head: Head, batch: Batch, sequences: list[Sequence]) -> Loss:
        weight = self.settings.language_weight
        loss, losses_N = self.language.loss(hidden_NH, head, batch, sequences)
        return weight * loss, weight * losses_N

    @torch.no_grad()
    def score(self, student: Any, written: list[Sequence], size: int) -> list[Tensor]:
        """Tokens, log p and log q of each rollout, float64 [3, T] on the CPU; ``size`` rollouts are read at once."""
        scores: list[Tensor] = []
        with evaluating(student):
            for start in range(0, len(written), size):
                part = written[start : start + size]
                batch = collate(part, student.device)
                hidden_NH = hidden_states(student, batch.ids_BL).flatten(0, 1)[batch.where_N]
                logprobs = self.token_logprobs(hidden_NH, head_of(student), batch, part)
                scores_3N = torch.stack([batch.targets_N.double(), *(x_N.double() for x_N in logprobs)]).cpu()
                scores += scores_3N.split([len(sequence.response) for sequence in part], 1)
        return scores

    def judge(self, scores: list[Tensor]) -> list[Tensor]:
        """Of each rollout of a collection, the log-probability each token was drawn with, and its advantage: float32
        [2, T], from tokens, log p and log q [3, T]."""
        settings = self.settings
        _, log_p_N, log_q_N = torch.cat(scores, 1)
        lengths = [scores_3T.shape[1] for scores_3T in scores]
        rewards = rewards_N(log_p_N, log_q_N, scale=settings.reward_scale, limit=settings.reward_limit).split(lengths)
        returns = [returns_T(part_T, discount=settings.discount, own=settings.own_reward) for part_T in rewards]
        log_b_N = log_mixture(log_p_N, log_q_N, settings.teacher_share)
        return list(torch.stack([log_b_N, whiten_N(torch.cat(returns))]).float().split(lengths, 1))


class Collection(Feed):
    """MiniLLM's batches. The state's pool is the collection."""

    method: Minillm

    def __init__(self, plan: Plan, method: Minillm) -> None:
        super().__init__(plan, method)
        self.period = method.settings.epochs * method.settings.collected_batches

    def source(self, state: State, coin: float) -> Source:
        return "pool" if coin < self.method.on_policy_share else "row"

    def pooled(self, state: State, slot: int) -> int:
        number, step = divmod(state.step, self.period)
        order = Order(len(state.pool), self.plan.seed, f"{self.plan.stage_name} collection {number}")
        return order.at(step * self.plan.train.batch_size + slot)[0]

    def load(self, state: State, student: Student) -> Load:
        written: list[Sequence] = []
        stats = None
        if state.step % self.period == 0:
            written, stats = self._collect(state, student)
        load = super().load(state, student)
        load.written, load.stats = written, stats
        return load

    def _collect(self, state: State, student: Student) -> tuple[list[Sequence], Stats | None]:
        """Roll out and score the next collection; what this worker wrote of it.

        Once a whole one could overrun the cap on teacher tokens there are only rows.
        """
        train, world = self.plan.train, student.world
        sequences = self.method.settings.collected_batches * train.batch_size * self.method.on_policy_share
        count = max(1, round(sequences)) if sequences else 0
        state.pool = []
        if not count or self.room(state) < count:
            return [], None
        draws = [self.next_prompt(state) for _ in range(count)]
        written: list[Sequence] = []
        scores: list[Tensor] = []
        stats = None
        with student.whole() as model, self.method.together():
            if mine := draws[world.rank :: world.size]:
                written, rollout = self.write(model, mine)
                scores, stats = self.method.score(model, written, train.micro_batch), rollout.stats
        scores = everyone(world, scores, count, self.method.max_new_tokens)
        for draw, (tokens_T, _, _), drawn_2T in zip(draws, scores, self.method.judge(scores), strict=True):
            name, prompt = prompt_of(self.data.prompts, draw.item)
            response = tokens_T.to(torch.int64)
            state.pool.append(Sequence(name, prompt, response, on_policy=True, drawn_2T=drawn_2T))
        return written, stats
