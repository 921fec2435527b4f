"""What a decoder returns: per row the tokens, who wrote them and the teacher's hidden states; and the counts.

Shapes: N sequences, B rows of them, T response positions, D the teacher's width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor, nn


@dataclass
class Forwards:
    """How often one model ran while it decoded (prompts apart): a call serves `rows` rows of `positions` tokens."""

    calls: int = 0
    rows: int = 0  # summed over the calls: rows / emitted tokens is the model's forwards per token
    positions: int = 0  # summed over calls and rows
    prompt_positions: int = 0  # prefill, padding included
    # By response position, positions past a row's limit apart: rows of calls that begin there, and that give it.
    starts: Counter[int] = field(default_factory=Counter)
    covers: Counter[int] = field(default_factory=Counter)

    def ran(self, first: Sequence[int], width: int, limits: Sequence[int]) -> None:
        """Count a call that gave each row `width` positions, from these on."""
        self.calls += 1
        self.rows += len(first)
        self.positions += width * len(first)
        self.starts.update(t for t, limit in zip(first, limits, strict=True) if t < limit)
        for t, limit in zip(first, limits, strict=True):
            self.covers.update(range(t, min(t + width, limit)))

    def __add__(self, other: Forwards) -> Forwards:
        return Forwards(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass
class Stats:
    """Counts by response position (int64 [T], on the CPU) and forwards by model. Stats add up over rollouts."""

    emitted_T: Tensor
    interventions_T: Tensor  # the gate chose the teacher
    agreeing_T: Tensor  # interventions whose token is also the student's draw
    cuts_T: Tensor  # emitted tokens that differ from the draft; without blocks the student is the drafter
    student: Forwards = field(default_factory=Forwards)
    teacher: Forwards = field(default_factory=Forwards)

    @property
    def tokens(self) -> int:
        return int(self.emitted_T.sum())

    @property
    def intervention_rate(self) -> float:
        return float(self.interventions_T.sum()) / max(1, self.tokens)

    @property
    def agreement(self) -> float:
        """The share of positions where the student's draw stands: a student's block would not be cut there."""
        return 1.0 - float((self.interventions_T - self.agreeing_T).sum()) / max(1, self.tokens)

    @property
    def teacher_forwards_per_token(self) -> float:
        return self.teacher.rows / max(1, self.tokens)

    def by_position(self, longest: int) -> Tensor:
        """int64 [8, T], T = `longest`: emitted, interventions, agreeing, cuts; the student's starts and covers, and the
        teacher's."""
        counts_8T = torch.zeros(8, longest, dtype=torch.int64)
        for row, counts_T in enumerate((self.emitted_T, self.interventions_T, self.agreeing_T, self.cuts_T)):
            counts_8T[row, : len(counts_T)] = counts_T
        counters = self.student.starts, self.student.covers, self.teacher.starts, self.teacher.covers
        for row, counter in enumerate(counters, 4):
            counts_8T[row, list(counter)] = torch.tensor(list(counter.values()), dtype=torch.int64)
        return counts_8T

    def __add__(self, other: Stats) -> Stats:
        def add(x_T: Tensor, y_T: Tensor) -> Tensor:
            longest = max(len(x_T), len(y_T))
            return nn.functional.pad(x_T, (0, longest - len(x_T))) + nn.functional.pad(y_T, (0, longest - len(y_T)))

        return Stats(
            add(self.emitted_T, other.emitted_T),
            add(self.interventions_T, other.interventions_T),
            add(self.agreeing_T, other.agreeing_T),
            add(self.cuts_T, other.cuts_T),
            self.student + other.student,
            self.teacher + other.teacher,
        )


@dataclass
class Rollout:
    """One entry per prompt, in the prompts' order; the tensors of a row have its number of emitted tokens, T."""

    tokens: list[Tensor]  # int64 [T], the ending EOS included
    teacher_wrote: list[Tensor]  # bool [T]
    agrees: list[Tensor]  # bool [T], both models drew the same token
    cuts: list[Tensor]  # bool [T], the token is not the drafter's
    jsd: list[Tensor]  # [T], in the gate's log base
    teacher_hidden: list[Tensor] | None  # [T, D]: what the teacher's head turned into the distribution of token t
    stats: Stats

    def split(self, sizes: Sequence[int]) -> list[Rollout]:
        """Rollouts of so many rows each, in order. The forwards, which rows shared, all go to the first one."""
        parts: list[Rollout] = []
        start = 0
        for size in sizes:
            rows = slice(start, start + size)
            wrote, agrees, cuts = self.teacher_wrote[rows], self.agrees[rows], self.cuts[rows]
            stats = Stats(
                _by_position([torch.ones_like(flags_T) for flags_T in wrote]),
                _by_position(wrote),
                _by_position([wrote_T & agrees_T for wrote_T, agrees_T in zip(wrote, agrees, strict=True)]),
                _by_position(cuts),
            )
            if not parts:
                stats.student, stats.teacher = self.stats.student, self.stats.teacher
            hidden = None if self.teacher_hidden is None else self.teacher_hidden[rows]
            parts.append(Rollout(self.tokens[rows], wrote, agrees, cuts, self.jsd[rows], hidden, stats))
            start += size
        return parts


def _by_position(flags: list[Tensor]) -> Tensor:
    """How many of these rows [T] are true at each position."""
    counts_T = torch.zeros(max(map(len, flags), default=0), dtype=torch.int64)
    for flags_T in flags:
        counts_T[: len(flags_T)] += flags_T.cpu()
    return counts_T


class Record:
    """The rollout while it is written: one row per sequence.

    A decoder may write past the position where a row is cut: such entries are overwritten when the row gets there, or
    lie behind its end. Positions past the longest limit fall into one spare column.
    """

    def __init__(self, limits_N: Tensor, dtype: torch.dtype):
        sequences, longest, device = len(limits_N), int(limits_N.max()), limits_N.device
        self.longest = longest
        flags = torch.zeros(3, sequences, longest + 1, dtype=torch.bool, device=device)
        self.teacher_NT, self.agrees_NT, self.cut_NT = flags.unbind()
        self.tokens_NT = torch.zeros(sequences, longest + 1, dtype=torch.int64, device=device)
        self.jsd_NT = torch.zeros(sequences, longest + 1, dtype=dtype, device=device)
        self.kl_NT = torch.zeros_like(self.jsd_NT)
        self.hidden_NTD: Tensor | None = None

    def write(
        self,
        seq_B: Tensor,
        t_B: Tensor,
        token_B: Tensor,
        teacher_B: Tensor,
        agrees_B: Tensor,
        jsd_B: Tensor,
        kl_B: Tensor,
    ) -> None:
        """Position t of sequences seq; `agrees`: both models drew the same token."""
        at = seq_B, t_B.clamp(max=self.longest)
        self.tokens_NT[at], self.teacher_NT[at], self.agrees_NT[at] = token_B, teacher_B, agrees_B
        self.jsd_NT[at], self.kl_NT[at] = jsd_B, kl_B

    def keep_cut(self, seq_B: Tensor, t_B: Tensor, cut_B: Tensor) -> None:
        """Whether the token emitted at position t differs from the draft."""
        self.cut_NT[seq_B, t_B.clamp(max=self.longest)] = cut_B

    def keep_hidden(self, seq_B: Tensor, t_B: Tensor, hidden_BD: Tensor) -> None:
        if self.hidden_NTD is None:
            self.hidden_NTD = hidden_BD.new_zeros(*self.tokens_NT.shape, hidden_BD.shape[-1])
        self.hidden_NTD[seq_B, t_B.clamp(max=self.longest)] = hidden_BD

    def finish(self, lengths: list[int], student: Forwards, teacher: Forwards) -> Rollout:
        if any(self.jsd_NT[i, :n].isnan().any() for i, n in enumerate(lengths)):
            raise ValueError("the models' logits are not finite: check the weights and the dtype")
        cpu_lengths_N1 = torch.tensor(lengths)[:, None]
        valid_NT = torch.arange(self.longest) < cpu_lengths_N1
        hidden_NTD = self.hidden_NTD

        def count(flag_NT: Tensor) -> Tensor:
            return (flag_NT[:, :-1].cpu() & valid_NT).sum(0)

        def rows(x_NT: Tensor) -> list[Tensor]:
            return [x_NT[i, :n] for i, n in enumerate(lengths)]

        return Rollout(
            rows(self.tokens_NT),
            rows(self.teacher_NT),
            rows(self.agrees_NT),
            rows(self.cut_NT),
            rows(self.jsd_NT),
            None if hidden_NTD is None else rows(hidden_NTD),
            Stats(
                valid_NT.sum(0),
                count(self.teacher_NT),
                count(self.teacher_NT & self.agrees_NT),
                count(self.cut_NT),
                student,
                teacher,
            ),
        )
