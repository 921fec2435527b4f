"""Methods: what each minimises, on which sequences (method.md, sections 1 and 4). p is the teacher, q the student.

A method says how likely a sequence of a batch is rolled out, how a rollout is written, and the loss of a micro-batch;
the loop does the rest. A new method is a class, an entry in ``tasks/catalogue.py`` and its settings.

Shape legend: N response positions of a micro-batch, H student width, G teacher width, V vocabulary.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels import decode, gate
from kernels.codec import decode as decode_rows
from kernels.divergence import Divergence, named
from kernels.fused import fused_cross_entropy, fused_divergence, fused_topk_divergence
from kernels.rollout import Rollout
from kernels.rules import Role
from tasks.batches import Batch, Sequence, collate
from tasks.config import methods as config
from tasks.student import Head, Loss, head_of, hidden_states
from tasks.vllm_decode import InVllm

# A loss of the response positions of these sequences; the batch is theirs.
Part = Callable[[Tensor, Head, Batch, list[Sequence]], Loss]


class Method:
    """Cross entropy on annotated rows, the base of all methods: −log q(y_t), the end-of-sequence token included."""

    on_policy_share = 0.0
    max_new_tokens = 0
    teacher: Any = None
    stored = False  # whether annotated rows bring the teacher's distributions along
    # What may ask a sharded teacher is within it: workers then ask together.
    together: Callable[[], AbstractContextManager[None]] = staticmethod(nullcontext)

    def loss(self, hidden_NH: Tensor, head: Head, batch: Batch, sequences: list[Sequence]) -> Loss:
        """(Σ weight · loss, loss by position) in nats; ``batch`` is the collated ``sequences``."""
        return cross_entropy(hidden_NH, head, batch)

    def validate(self, hidden_NH: Tensor, head: Head, batch: Batch, sequences: list[Sequence]) -> tuple[Tensor, ...]:
        """Of annotated rows, by position [N]: the loss that chooses the best weights, then what else the method goes
        by. Not the cross entropy for all: a mode-seeking divergence may raise it while the student comes closer."""
        return (self.loss(hidden_NH, head, batch, sequences)[1],)

    def rollout(self, student: Any, prompts: list[Tensor], keys: list[int], eos_ids: list[int]) -> Rollout:
        """Continue the prompts with the current student; ``keys`` name each sequence's noise."""
        raise NotImplementedError(f"{type(self).__name__} trains on annotated rows only")


def cross_entropy(hidden_NH: Tensor, head: Head, batch: Batch) -> Loss:
    return fused_cross_entropy(
        hidden_NH, head.weight_VH, batch.targets_N, batch.weights_N, bias_V=head.bias_V, softcap=head.softcap
    )


def apart(
    hidden_NH: Tensor, head: Head, batch: Batch, sequences: list[Sequence], *, rolled: Part, annotated: Part
) -> Loss:
    """One loss on the sequences that were rolled out, another on annotated rows."""
    return split(hidden_NH, head, batch, sequences, lambda sequence: sequence.on_policy, rolled, annotated)


def split(
    hidden_NH: Tensor,
    head: Head,
    batch: Batch,
    sequences: list[Sequence],
    kind: Callable[[Sequence], bool],
    first: Part,
    second: Part,
) -> Loss:
    """One loss on the sequences of a kind, another on all others."""
    losses_N = torch.zeros_like(batch.weights_N, dtype=hidden_NH.dtype)
    total = hidden_NH.sum() * 0.0  # a batch without one of the two still has a gradient
    kinds = torch.tensor([kind(sequence) for sequence in sequences], dtype=torch.bool)
    lengths = torch.tensor([len(sequence.response) for sequence in sequences], dtype=torch.int64)
    kind_N = kinds.repeat_interleave(lengths).to(batch.where_N.device)
    for own, loss_of in ((True, first), (False, second)):
        chosen = [sequence for sequence in sequences if kind(sequence) is own]
        if chosen:
            where_N = kind_N == own
            loss, part_N = loss_of(hidden_NH[where_N], head, batch.only(where_N), chosen)
            total, losses_N[where_N] = total + loss, part_N.to(losses_N.dtype)
    return total, losses_N


class Divergent(Method):
    """D(p, q) at every response position of each sequence.

    The teacher's side comes from its hidden states, which a rollout brings along; other sequences it reads once. With
    ``stored``, that of annotated rows comes from their compressed distributions, and without rollouts the teacher may
    be None. Where the models' logits are padded to unequal widths, both are cut to the ids they share.
    """

    def __init__(self, teacher: Any, divergence: Divergence, vocabulary: int, stored: bool = False) -> None:
        self.teacher, self.divergence, self.vocabulary, self.stored = teacher, divergence, vocabulary, stored

    def loss(self, hidden_NH: Tensor, head: Head, batch: Batch, sequences: list[Sequence]) -> Loss:
        if not self.stored:
            return self._live(hidden_NH, head, batch, sequences)
        return apart(hidden_NH, head, batch, sequences, rolled=self._live, annotated=self._from_stored)

    def _from_stored(self, hidden_NH: Tensor, head: Head, batch: Batch, sequences: list[Sequence]) -> Loss:
        missing = [sequence.name for sequence in sequences if sequence.distributions is None]
        if missing:
            raise ValueError(
                f"{len(missing)} rows have no stored distributions ({missing[0]} first): set sampling.distributions"
            )
        rows = decode_rows([sequence.distributions for sequence in sequences if sequence.distributions])
        if rows.ids_NK.max() >= self.vocabulary:
            raise ValueError(f"stored distributions name tokens beyond the {self.vocabulary} that both models share")
        q, device = head.first(self.vocabulary), hidden_NH.device
        sampled = rows.importance_NK is not None
        return fused_topk_divergence(
            hidden_NH,
            q.weight_VH,
            rows.ids_NK.to(device),
            rows.logprobs_NK.to(device),
            None if sampled else rows.log_tail_N.to(device),
            batch.weights_N,
            self.divergence,
            importance_NK=rows.importance_NK.to(device) if rows.importance_NK is not None else None,
            student_bias_V=q.bias_V,
            student_softcap=q.softcap,
        )

    def _live(self, hidden_NH: Tensor, head: Head, batch: Batch, sequences: list[Sequence]) -> Loss:
        q, p = head.first(self.vocabulary), head_of(self.teacher).first(self.vocabulary)
        return fused_divergence(
            hidden_NH,
            q.weight_VH,
            self.teacher_hidden(sequences),
            p.weight_VH,
            batch.weights_N,
            self.divergence,
            student_bias_V=q.bias_V,
            teacher_bias_V=p.bias_V,
            student_softcap=q.softcap,
            teacher_softcap=p.softcap,
        )

    @torch.no_grad()
    def token_logprobs(
        self, hidden_NH: Tensor, head: Head, batch: Batch, sequences: list[Sequence]
    ) -> tuple[Tensor, Tensor]:
        """(log p, log q) of each response token [N]; ``hidden_NH`` is the student's."""
        p, q = head_of(self.teacher).first(self.vocabulary), head.first(self.vocabulary)
        _, minus_log_p_N = cross_entropy(self.teacher_hidden(sequences), p, batch)
        _, minus_log_q_N = cross_entropy(hidden_NH, q, batch)
        return -minus_log_p_N, -minus_log_q_N

    @torch.no_grad()
    def teacher_hidden(self, sequences: list[Sequence]) -> Tensor:
        """What the teacher's projection sees at the response positions of all sequences, in their order [N, G]."""
        unread = [sequence for sequence in sequences if sequence.teacher_hidden_TG is None]
        batch = collate(unread, self.teacher.device)
        read_NG = hidden_states(self.teacher, batch.ids_BL).flatten(0, 1)[batch.where_N] if unread else None
        parts, start = [], 0
        for sequence in sequences:
            hidden_TG = sequence.teacher_hidden_TG
            if hidden_TG is None:
                assert read_NG is not None
                hidden_TG = read_NG[start : start + len(sequence.response)]
                start += len(sequence.response)
            parts.append(hidden_TG)
        weight_VG = head_of(self.teacher).weight_VH
        return torch.cat([weight_VG.new_empty(0, weight_VG.shape[1]), *parts])


class Kd(Divergent):
    """KL(p ‖ q) on annotated rows, with a share of cross entropy."""

    def __init__(self, settings: config.Kd, teacher: Any, vocabulary: int) -> None:
        super().__init__(teacher, named("forward_kl"), vocabulary, settings.annotated == "stored")
        self.cross_entropy_share = settings.cross_entropy_share

    def loss(self, hidden_NH: Tensor, head: Head, batch: Batch, sequences: list[Sequence]) -> Loss:
        share = self.cross_entropy_share
        loss, losses_N = super().loss(hidden_NH, head, batch, sequences)
        if share:
            hard, hard_N = cross_entropy(hidden_NH, head, batch)
            loss, losses_N = (1 - share) * loss + share * hard, (1 - share) * losses_N + share * hard_N
        return loss, losses_N


def with_soft_labels(others: Part, share: float, vocabulary: int) -> Part:
    """The loss of a batch in which a mentor wrote some rows: share · KL(mentor ‖ q) + (1 − share) · cross entropy on
    these (Mentor-KD, Lee et al. 2024), ``others`` on the rest."""
    labelled = Kd(config.Kd(annotated="stored", cross_entropy_share=1 - share), None, vocabulary)

    def loss(hidden_NH: Tensor, head: Head, batch: Batch, sequences: list[Sequence]) -> Loss:
        return split(hidden_NH, head, batch, sequences, lambda sequence: sequence.soft, labelled.loss, others)

    return loss


class OnPolicy(Divergent):
    """D(p ‖ q) on what the student writes by itself, mixed with annotated rows: ImitKD, GKD."""

    def __init__(
        self,
        settings: config.OnPolicy | config.Minillm | config.Distillm,
        teacher: Any,
        vocabulary: int,
        divergence: config.Divergence,
    ) -> None:
        family = named(divergence.name, alpha=divergence.alpha, beta=divergence.beta)
        super().__init__(teacher, family, vocabulary, settings.annotated == "stored")
        self.on_policy_share, self.max_new_tokens = settings.on_policy_share, settings.max_new_tokens
        self.sampling = decode.Sampling(settings.temperature)

    def rollout(self, student: Any, prompts: list[Tensor], keys: list[int], eos_ids: list[int]) -> Rollout:
        return decode.alone(
            student,
            prompts,
            torch.tensor(keys),
            max_new_tokens=self.max_new_tokens,
            eos_ids=eos_ids,
            sampling=self.sampling,
            vocab_size=self.vocabulary,
        )


class Together(OnPolicy):
    """D(p ‖ q) on what student and teacher write together: SWITCH (Koo et al. 2025), speculative KD."""

    def __init__(
        self,
        settings: config.Switch | config.Skd | config.Minillm,
        teacher: Any,
        vocabulary: int,
        divergence: config.Divergence,
        chosen: gate.Gate,
    ) -> None:
        super().__init__(settings, teacher, vocabulary, divergence)
        self.gate, self.teacher_sampling = chosen, self.sampling
        drafter: Role | None = "student" if settings.block else None
        # What a rollout learns about speed and acceptance serves the next one.
        self.decode: Callable[..., Rollout] = partial(
            decode.blockwise, block=settings.block, slots=settings.slots, drafter=drafter, pace=decode.Pace()
        )
        if isinstance(settings, config.Skd):
            self.sampling = decode.Sampling(settings.temperature, settings.top_p)
            self.teacher_sampling = decode.Sampling(settings.teacher_temperature, settings.teacher_top_p)
        elif isinstance(settings, config.Switch) and settings.decoder == "reference":
            self.decode = decode.reference
        elif isinstance(settings, config.Switch) and settings.decoder == "vllm":
            self.decode = InVllm(self.decode, settings.block, settings.sync_every)

    def rollout(self, student: Any, prompts: list[Tensor], keys: list[int], eos_ids: list[int]) -> Rollout:
        return self.decode(
            student,
            self.teacher,
            prompts,
            torch.tensor(keys),
            self.gate,
            max_new_tokens=self.max_new_tokens,
            eos_ids=eos_ids,
            keep_teacher_hidden=True,
            student_sampling=self.sampling,
            teacher_sampling=self.teacher_sampling,
            vocab_size=self.vocabulary,
        )


class Opd(OnPolicy):
    """On-policy distillation: Σ A_t · (−log q(y_t)) with A_t = log p(y_t) − log q(y_t), held fixed: in expectation the
    gradient of KL(q ‖ p) at single steps. The importance weight q / q_drawn is 1, as settings see to it that q draws.
    What is reported is the estimate of that divergence, −A_t."""

    def loss(self, hidden_NH: Tensor, head: Head, batch: Batch, sequences: list[Sequence]) -> Loss:
        log_p_N, log_q_N = self.token_logprobs(hidden_NH, head, batch, sequences)
        pull_N = torch.where(batch.on_policy_N, log_p_N - log_q_N, 1.0)
        pulled = replace(batch, weights_N=batch.weights_N * pull_N)
        surrogate, _ = cross_entropy(hidden_NH, head.first(self.vocabulary), pulled)
        return surrogate, torch.where(batch.on_policy_N, log_q_N - log_p_N, -log_q_N)
