"""Methods: what each minimises, on which sequences (method.md, sections 1 and 4). p is the teacher, q the student.

A method says how likely a sequence of a batch is rolled out, how a rollout is written, and the loss of a micro-batch;
the loop does the rest. A new method is a class here, an entry in ``method_of`` and its settings.

Shape legend: N response positions of a micro-batch, H student width, G teacher width, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels import decode, gate
from kernels.divergence import Divergence, named
from kernels.fused import fused_cross_entropy, fused_divergence
from kernels.rollout import Rollout
from kernels.rules import Role
from tasks.batches import Batch, Sequence, collate
from tasks.config import methods as config
from tasks.student import Head, Loss, head_of, hidden_states


class Method:
    """Cross entropy on annotated rows, the base of all methods: −log q(y_t), the end-of-sequence token included."""

    on_policy_share = 0.0
    max_new_tokens = 0

    def loss(self, hidden_NH: Tensor, head: Head, batch: Batch, sequences: list[Sequence]) -> Loss:
        """(Σ weight · loss, loss by position) in nats; ``batch`` is the collated ``sequences``."""
        return cross_entropy(hidden_NH, head, batch)

    def rollout(self, student: Any, prompts: list[Tensor], keys: list[int], eos_ids: list[int]) -> Rollout:
        """Continue the prompts with the current student; ``keys`` name each sequence's noise."""
        raise NotImplementedError(f"{type(self).__name__} trains on annotated rows only")


def cross_entropy(hidden_NH: Tensor, head: Head, batch: Batch) -> Loss:
    return fused_cross_entropy(
        hidden_NH, head.weight_VH, batch.targets_N, batch.weights_N, bias_V=head.bias_V, softcap=head.softcap
    )


class Divergent(Method):
    """D(p, q) at every response position of each sequence, the teacher's side from its hidden states: a rollout brings
    them along, for other sequences the teacher reads the sequence once.

    Where the models' logits are padded to unequal widths, both are cut to the ids they share.
    """

    def __init__(self, teacher: Any, divergence: Divergence, vocabulary: int) -> None:
        self.teacher, self.divergence, self.vocabulary = teacher, divergence, vocabulary

    def loss(self, hidden_NH: Tensor, head: Head, batch: Batch, sequences: list[Sequence]) -> Loss:
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
        super().__init__(teacher, named("forward_kl"), vocabulary)
        self.cross_entropy_share = settings.cross_entropy_share

    def loss(self, hidden_NH: Tensor, head: Head, batch: Batch, sequences: list[Sequence]) -> Loss:
        share = self.cross_entropy_share
        loss, losses_N = super().loss(hidden_NH, head, batch, sequences)
        if share:
            hard, hard_N = cross_entropy(hidden_NH, head, batch)
            loss, losses_N = (1 - share) * loss + share * hard, (1 - share) * losses_N + share * hard_N
        return loss, losses_N


class OnPolicy(Divergent):
    """D(p ‖ q) on what the student writes by itself, mixed with annotated rows: ImitKD, GKD."""

    def __init__(self, settings: config.OnPolicy, teacher: Any, vocabulary: int, divergence: config.Divergence) -> None:
        super().__init__(teacher, named(divergence.name, alpha=divergence.alpha, beta=divergence.beta), vocabulary)
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


class Switch(OnPolicy):
    """SWITCH (Koo et al. 2025): the student writes, the teacher takes over where the gate says so, and
    D(p ‖ q)(y | x) is minimised over every response position of the mixed sequence; the rest are annotated rows."""

    def __init__(self, settings: config.Switch, teacher: Any, vocabulary: int) -> None:
        super().__init__(settings, teacher, vocabulary, settings.divergence)
        self.gate = gate_of(settings)
        drafter: Role | None = "student" if settings.block else None
        self.decode: Callable[..., Rollout] = decode.reference
        if settings.decoder == "blockwise":
            # What a rollout learns about speed and acceptance serves the next one.
            self.decode = partial(decode.blockwise, block=settings.block, drafter=drafter, pace=decode.Pace())

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
            teacher_sampling=self.sampling,
            vocab_size=self.vocabulary,
        )


def gate_of(settings: config.Switch) -> gate.Gate:
    """The kernel's gate that the settings describe."""
    base, chosen = settings.jsd_log_base, settings.gate
    match chosen:
        case config.ExponentialDecay():
            return gate.ExponentialDecay(start=chosen.initial, rate=chosen.rate, floor=chosen.floor, log_base=base)
        case config.Linear():
            return gate.LinearDecay(length=settings.max_new_tokens, floor=chosen.floor, log_base=base)
        case config.ExponentialGrowth():
            return gate.ExponentialGrowth(rate=chosen.rate, floor=chosen.floor, log_base=base)
        case config.Constant():
            return gate.Constant(value=chosen.value, log_base=base)
        case config.MixIn():
            return gate.Coin(teacher_share=chosen.alpha)
        case config.RandomTeacher():
            return gate.Coin(teacher_share=chosen.probability)
        case config.Adaptive():
            return gate.Adaptive(factor=chosen.factor, window=chosen.window)


def method_of(settings: config.Method, teacher: Any, vocabulary: int) -> Method:
    """The method that the settings name; ``teacher`` is None for those that ask for no distributions."""
    match settings:
        case config.Sft() | config.Seqkd():
            return Method()
        case config.Kd():
            return Kd(settings, teacher, vocabulary)
        case config.Imitkd():
            return OnPolicy(settings, teacher, vocabulary, config.Divergence(name="forward_kl"))
        case config.Gkd():
            return OnPolicy(settings, teacher, vocabulary, settings.divergence)
        case config.Switch():
            return Switch(settings, teacher, vocabulary)
