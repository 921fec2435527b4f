"""The pace of blockwise decoding: how long a block, and which model drafts it. It never changes a token.

Where the drafter's token stands with probability a, a block of γ positions emits (1 - a^γ) / (1 - a) tokens a row and
costs γ forwards of one token by the drafter and one of γ tokens by the other model. Both are learned while decoding:
a from the positions settled lately, apart by how far into the response they are, since SWITCH's threshold decays; a
forward's seconds as a line in its number of tokens. γ = 1 is the per-token loop.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from kernels.rules import Role

_BLOCKS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32)
_FIRST = (4, 1, 4)  # the first blocks tell a forward's fixed cost from its cost per token
_PROBE_EVERY = 64  # so one misleading measurement does not last
_WORTHWHILE = 1.03  # rows drift apart in blocks, and the last one is waited for: a smaller gain is none
_SPAN, _SPANS = 8, 16  # acceptance is kept for this many spans of this many positions; the last is open
_MEMORY = 200  # settled positions over which the acceptance of a span is averaged
_PRIOR = 10  # how many of them what is known of the span before counts for

Cost = Callable[[int], float]


@dataclass
class _Line:
    """seconds = base + slope · tokens, least squares with forgetting."""

    keep: float = 0.95
    sums: list[float] = field(default_factory=lambda: [0.0] * 5)  # 1, x, x², y, xy

    def saw(self, tokens: int, seconds: float) -> None:
        new = (1.0, tokens, tokens * tokens, seconds, tokens * seconds)
        self.sums = [self.keep * old + term for old, term in zip(self.sums, new, strict=True)]

    @property
    def fit(self) -> tuple[float, float] | None:
        """(base, slope), both at least 0; None until two different sizes were seen."""
        n, x, xx, y, xy = self.sums
        spread = n * xx - x * x
        if spread <= 1e-9 * n * xx:
            return None
        slope = min(max(0.0, (n * xy - x * y) / spread), y / x)
        return (y - slope * x) / n, slope

    def mean(self) -> tuple[float, float]:
        """Average (tokens, seconds)."""
        return self.sums[1] / self.sums[0], self.sums[3] / self.sums[0]


class Pace:
    """Chooses blocks; keep one across rollouts of the same pair of models and it starts with what it has learned.

    `costs` gives, for "student" and "teacher", the seconds (or any unit) of a forward by its number of tokens, rows
    times width; then nothing is measured.
    """

    def __init__(self, costs: Mapping[Role, Cost] | None = None, longest: int = _BLOCKS[-1]):
        self.costs, self.longest = costs, longest
        self.lines: dict[Role, _Line] = {"student": _Line(), "teacher": _Line()}
        self.overhead = 0.0  # seconds a position beside the forwards
        self.blocks = 0
        # By span: positions settled, and where the student's and the teacher's draw stood.
        self.settled = [{"all": 0.0, "student": 0.0, "teacher": 0.0} for _ in range(_SPANS)]

    def acceptance(self, role: Role, position: int) -> float:
        """The share of positions here where this model's draw is emitted; it starts from a hopeful 0.9."""
        share = 0.9
        for span in self.settled[: _span(position) + 1]:
            share = (_PRIOR * share + span[role]) / (_PRIOR + span["all"])
        return share

    def choose(
        self, rows: Sequence[tuple[int, int]], block: int | None = None, drafter: Role | None = None
    ) -> tuple[int, Role]:
        """(γ, drafter) for rows, each with (tokens written, tokens to go); γ or drafter may be given."""
        limit = min(max(left for _, left in rows), self.longest if block is None else block)
        if block is None and self.costs is None and self.blocks < len(_FIRST):
            return min(limit, _FIRST[self.blocks]), drafter or "student"
        blocks = [b for b in _BLOCKS if b <= limit] if block is None else [limit]
        roles: tuple[Role, ...] = ("student", "teacher") if drafter is None else (drafter,)
        rates = {
            (b, role): rate for role in roles for b, rate in zip(blocks, self.rates(rows, blocks, role), strict=True)
        }
        best, role = max(rates, key=lambda plan: rates[plan])
        if block is None and rates[best, role] < _WORTHWHILE * rates[1, roles[0]]:
            best, role = 1, roles[0]
        if block is None and self.costs is None and self.blocks % _PROBE_EVERY == 0:
            best = min(limit, 2 * best)
        return best, role

    def rates(self, rows: Sequence[tuple[int, int]], blocks: Sequence[int], drafter: Role) -> list[float]:
        """Expected tokens per second of each length of block."""
        other: Role = "teacher" if drafter == "student" else "student"
        alike = Counter((_span(written), left) for written, left in rows)
        share = {span: min(self.acceptance(drafter, span * _SPAN), 1 - 1e-6) for span, _ in alike}
        rates = []
        for block in blocks:
            tokens = sum(
                count * (1 - share[span] ** min(block, left)) / (1 - share[span])
                for (span, left), count in alike.items()
            )
            drafting = block * (self.cost(drafter, len(rows)) + self.overhead)
            rates.append(tokens / (drafting + self.cost(other, len(rows) * block)))
        return rates

    def cost(self, role: Role, tokens: int) -> float:
        """Seconds of a forward."""
        if self.costs is not None:
            return self.costs[role](tokens)
        line = self.lines[role]
        if line.fit is None:
            # This model only drafted so far: suppose that it grows like the other.
            other = self.lines["teacher" if role == "student" else "student"]
            if not line.sums[0] or other.fit is None:
                return 1.0
            (seen, seconds), (base, slope) = line.mean(), other.fit
            return seconds * (base + slope * tokens) / (base + slope * seen)
        base, slope = line.fit
        return base + slope * tokens

    def saw_forward(self, role: Role, tokens: int, seconds: float) -> None:
        self.lines[role].saw(tokens, seconds)

    def saw_block(
        self,
        written: Sequence[int],
        settled: Sequence[int],
        student_stood: Sequence[int],
        teacher_stood: Sequence[int],
        width: int,
        overhead: float,
    ) -> None:
        """What became of a block of `width`, by row: the tokens before it, the positions settled, and how many of them
        have each model's draw; and the seconds that it took beside the forwards.
        """
        for row in zip(written, settled, student_stood, teacher_stood, strict=True):
            span, fade = self.settled[_span(row[0])], max(0.0, 1 - row[1] / _MEMORY)
            for name, count in zip(span, row[1:], strict=True):
                span[name] = fade * span[name] + count
        self.overhead += (overhead / width - self.overhead) * (0.2 if self.blocks else 1.0)
        self.blocks += 1


def _span(position: int) -> int:
    return min(position // _SPAN, _SPANS - 1)
