"""SWITCH decoding in blocks: the tokens of `reference`, with one forward of the costly model for many of them.

Method.md, section 2. One model, the drafter, draws a block of γ tokens from its own noise; the other scores the block
in one forward; then the rules settle position by position who writes, exactly as per token. A row's block is cut after
the first token that differs from the draft, since what was drafted and scored behind it followed another prefix. The
student drafts, unless its drafts hardly ever stand: then the teacher may, and the rules are the same.

Rows stand in slots; a finished row leaves and a waiting one joins. Both caches hold a row's tokens but the last, which
is fed next.

Shapes: N sequences, B rows seated, G positions of a block, V vocabulary, D the teacher's width.
"""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kernels.gate import Gate
from kernels.pace import Pace
from kernels.packed import packed
from kernels.rollout import Record, Rollout
from kernels.rows import Rows, rows_of
from kernels.rules import Head, Role, Rules, Sampling, evaluating, watch_head


@dataclass
class _Draft:
    """A block as its drafter made it; each list has one entry per position."""

    tokens: list[Tensor] = field(default_factory=list)
    logprobs: list[Tensor] = field(default_factory=list)
    noise: list[Tensor] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class _Seated:
    """The rows of one block, int64 [B] each."""

    longest: int  # the largest start
    seq: Tensor
    written: Tensor  # tokens so far
    token: Tensor  # the last of them (or of the prompt), fed first
    start: Tensor  # its slot
    last: Tensor  # the slot of the last token the row may have


@torch.no_grad()
def blockwise(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    prompts: Sequence[Tensor],
    keys_B: Tensor,
    gate: Gate,
    *,
    max_new_tokens: int | Sequence[int],
    eos_ids: Sequence[int],
    keep_teacher_hidden: bool = False,
    student_sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    teacher_sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    vocab_size: int | None = None,
    block: int | None = None,
    slots: int | None = None,
    drafter: Role | None = None,
    pace: Pace | None = None,
) -> Rollout:
    """`reference` in blocks: same arguments, same tokens, fewer forwards.

    `block` is γ (None: adaptive, down to the per-token loop), `slots` the most rows at once (None: all), `drafter`
    who drafts (None: adaptive), and `pace` what earlier rollouts of these models have learned about costs and
    acceptance. Models need "sdpa" or "eager" attention.
    """
    if (block is not None and block < 1) or (slots is not None and slots < 1):
        raise ValueError(f"block ({block}) and slots ({slots}) must be at least 1, or None")
    rules = Rules.of(
        student,
        teacher,
        prompts,
        keys_B,
        gate,
        max_new_tokens,
        eos_ids,
        student_sampling,
        teacher_sampling,
        vocab_size,
    )
    with evaluating(student, teacher), packed(student, teacher), watch_head(teacher) as head:
        table = _Table(student, teacher, prompts, rules, min(slots or len(prompts), len(prompts)), head)
        table.keep_hidden = keep_teacher_hidden
        pace = pace or Pace()
        while table.seq:
            table.block(*pace.choose(table.progress(), block, drafter), pace)
    return table.record.finish(table.written, table.models["student"].forwards, table.models["teacher"].forwards)


class _Table:
    """The rows at work: row b of both caches belongs to sequence `seq[b]`."""

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        prompts: Sequence[Tensor],
        rules: Rules,
        slots: int,
        head: Head,
    ):
        self.rules, self.head, self.keep_hidden = rules, head, False
        self.device = rules.limits_N.device
        self.prompts = [prompt.to(self.device) for prompt in prompts]
        self.limits = rules.limits_N.tolist()
        self.written = [0] * len(prompts)
        self.token = [int(prompt[-1]) for prompt in prompts]  # each sequence's last token
        self.record = Record(rules.limits_N, rules.dtype)
        capacity = max(len(prompt) + limit for prompt, limit in zip(prompts, self.limits, strict=True))
        self.models: dict[Role, Rows] = {
            "student": rows_of(student, slots, capacity),
            "teacher": rows_of(teacher, slots, capacity),
        }
        self.waiting = deque(range(slots, len(prompts)))
        self.seq = list(range(slots))
        self._prefill(list(range(slots)))

    def progress(self) -> list[tuple[int, int]]:
        """(tokens written, tokens to go), by row."""
        return [(self.written[s], self.limits[s] - self.written[s]) for s in self.seq]

    def block(self, width: int, drafter: Role, pace: Pace) -> None:
        """Draft, score and settle one block of all rows; then let finished rows leave."""
        began = time.perf_counter()
        scorer: Role = "teacher" if drafter == "student" else "student"
        rows = self._rows()
        draft, seconds = self._draft(rows, width, drafter)
        for spent in seconds:
            pace.saw_forward(drafter, len(self.seq), spent)
        model = self.models[scorer]
        fed_BG = torch.stack([rows.token, *draft.tokens[:-1]], 1)
        logits_BGV = model.extend(fed_BG, rows.start, rows.last, rows.longest)
        pace.saw_forward(scorer, fed_BG.numel(), model.seconds)
        written, limits = [self.written[s] for s in self.seq], [self.limits[s] for s in self.seq]
        model.forwards.ran(written, fed_BG.shape[1], limits)
        for j in range(fed_BG.shape[1]):
            self.models[drafter].forwards.ran([t + j for t in written], 1, limits)
        if scorer == "teacher":
            draft.hidden = list(self.head.input_BQD.unbind(1))
        outcome_4B, ended_B = self._settle(rows, draft, logits_BGV, drafter, scorer)
        settled, student_stood, teacher_stood, token = outcome_4B.tolist()
        overhead = time.perf_counter() - began - sum(seconds) - model.seconds
        pace.saw_block(written, settled, student_stood, teacher_stood, len(draft.tokens), overhead)
        for row, sequence in enumerate(self.seq):
            self.written[sequence] += settled[row]
            self.token[sequence] = token[row]
        self._leave(ended_B.nonzero()[:, 0].tolist())

    def _rows(self) -> _Seated:
        start = [len(self.prompts[s]) + self.written[s] - 1 for s in self.seq]
        last = [len(self.prompts[s]) + self.limits[s] - 1 for s in self.seq]
        columns = [self.seq, [self.written[s] for s in self.seq], [self.token[s] for s in self.seq], start, last]
        return _Seated(max(start), *torch.tensor(columns, device=self.device).unbind())

    def _draft(self, rows: _Seated, width: int, drafter: Role) -> tuple[_Draft, list[float]]:
        """At most `width` positions: none behind the last row's end; and the seconds of each forward."""
        draft, seconds, rules = _Draft(), [], self.rules
        model, token_B, ended_B = self.models[drafter], rows.token, torch.zeros_like(rows.token, dtype=torch.bool)
        for j in range(width):
            t_B, start_B = rows.written + j, torch.minimum(rows.start + j, rows.last)
            logits_BV = model.extend(token_B[:, None], start_B, rows.last, rows.longest + j)[:, 0]
            seconds.append(model.seconds)
            logprobs_BV = rules.logprobs(logits_BV)
            noise_BV = rules.noise(drafter, rows.seq, t_B, logprobs_BV.shape[1])
            token_B = rules.draw(drafter, logprobs_BV, noise_BV)
            draft.tokens.append(token_B)
            draft.logprobs.append(logprobs_BV)
            draft.noise.append(noise_BV)
            if drafter == "teacher":
                draft.hidden.append(self.head.input_BQD[:, -1])
            ended_B |= rules.ends(token_B, rows.seq, t_B)
            if ended_B.all():
                break
        return draft, seconds

    def _settle(
        self, rows: _Seated, draft: _Draft, logits_BGV: Tensor, drafter: Role, scorer: Role
    ) -> tuple[Tensor, Tensor]:
        """Decide position by position until every row is cut or ended.

        Four integers for each row [4, B], the positions settled, those where the student's and the teacher's draw
        stood, and the last token; and the rows [B] that ended.
        """
        rules, record = self.rules, self.record
        live_B = torch.ones_like(rows.seq, dtype=torch.bool)
        ended_B, last_B = ~live_B, rows.token
        counts_3B = torch.zeros(3, len(self.seq), dtype=torch.int64, device=self.device)
        for j, draft_B in enumerate(draft.tokens):
            t_B, scored_BV, noise_BV = rows.written + j, rules.logprobs(logits_BGV[:, j]), draft.noise[j]
            if rules.gate.own_teacher_noise:
                noise_BV = rules.noise(scorer, rows.seq, t_B, scored_BV.shape[1])
            logprobs = {drafter: draft.logprobs[j], scorer: scored_BV}
            draws = {drafter: draft_B, scorer: rules.draw(scorer, scored_BV, noise_BV)}
            token_B = rules.settle(
                record,
                rows.seq,
                t_B,
                logprobs["teacher"],
                logprobs["student"],
                draws["teacher"],
                draws["student"],
            )
            record.keep_cut(rows.seq, t_B, token_B != draft_B)
            if self.keep_hidden:
                record.keep_hidden(rows.seq, t_B, draft.hidden[j])
            last_B = torch.where(live_B, token_B, last_B)
            stood = token_B == draws["student"], token_B == draws["teacher"]
            counts_3B += live_B & torch.stack([live_B, *stood])
            ended_B |= live_B & rules.ends(token_B, rows.seq, t_B)
            live_B &= (token_B == draft_B) & ~ended_B
            if not live_B.any():
                break
        return torch.cat([counts_3B, last_B[None]]), ended_B

    def _leave(self, holes: list[int]) -> None:
        """Waiting sequences take the rows of finished ones; rows from the end close the gaps that remain."""
        taken = holes[: len(self.waiting)]
        for row in taken:
            self.seq[row] = self.waiting.popleft()
        self._prefill(taken)
        for row in reversed(holes[len(taken) :]):
            end = len(self.seq) - 1
            if row != end:
                self.seq[row] = self.seq[end]
                for model in self.models.values():
                    model.move(end, row)
            self.seq.pop()

    def _prefill(self, rows: list[int]) -> None:
        if rows:
            for model in self.models.values():
                model.prefill([self.prompts[self.seq[row]][:-1] for row in rows], rows)
