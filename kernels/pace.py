"""The pace of blockwise decoding: how long a block, and which model drafts it. It never changes a token.

Where the drafter's token stands with probability a, a block of γ positions emits (1 - a^γ) / (1 - a) tokens a row and
costs γ forwards of one token by the drafter and one of γ tokens by the other model. Both are learned while decoding:
a from the positions settled lately, a forward's seconds as a line in its number of tokens. γ = 1 is the per-token loop.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from kernels.rules import Role

_BLOCKS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32)
_FIRST = (4, 1, 4)  # the first blocks tell a forward's fixed cost from its cost per token
_PROBE_EVERY = 64  # so one misleading measurement does not last
_WORTHWHILE = 1.03  # rows drift apart in blocks, and the last one is waited for: a smaller gain is none
_MEMORY = 200  # positions over which the acceptance is averaged

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
        # Suppose a few positions seen already, or a lucky start would make a very long block.
        self.seen, self.stood = 10.0, {"student": 9.0, "teacher": 9.0}

    def acceptance(self, role: Role) -> float:
        """The recent share of positions where this model's draw was emitted."""
        return self.stood[role] / self.seen

    def choose(self, left: Sequence[int], block: int | None = None, drafter: Role | None = None) -> tuple[int, Role]:
        """(γ, drafter) for rows with `left` tokens to go; either may be given."""
        limit = min(max(left), self.longest if block is None else block)
        if block is None and self.costs is None and self.blocks < len(_FIRST):
            return min(limit, _FIRST[self.blocks]), drafter or "student"
        blocks = [b for b in _BLOCKS if b <= limit] if block is None else [limit]
        roles: tuple[Role, ...] = ("student", "teacher") if drafter is None else (drafter,)
        lefts = Counter(left)
        best, role = max(((b, role) for role in roles for b in blocks), key=lambda plan: self.rate(lefts, *plan))
        if block is None and self.rate(lefts, best, role) < _WORTHWHILE * self.rate(lefts, 1, roles[0]):
            best, role = 1, roles[0]
        if block is None and self.costs is None and self.blocks % _PROBE_EVERY == 0:
            best = min(limit, 2 * best)
        return best, role

    def rate(self, left: Mapping[int, int], block: int, drafter: Role) -> float:
        """Expected tokens per second; `left` counts rows by their tokens to go."""
        a, rows = min(self.acceptance(drafter), 1 - 1e-6), sum(left.values())
        tokens = sum(count * (1 - a ** min(block, most)) / (1 - a) for most, count in left.items())
        other: Role = "teacher" if drafter == "student" else "student"
        seconds = block * (self.cost(drafter, rows) + self.overhead) + self.cost(other, rows * block)
        return tokens / seconds

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

    def saw_block(self, positions: int, student_stood: int, teacher_stood: int, width: int, overhead: float) -> None:
        """`positions` were settled, this many with each model's draw; `overhead` seconds went beside the forwards."""
        fade = max(0.0, 1 - positions / _MEMORY)
        self.seen = fade * self.seen + positions
        self.stood["student"] = fade * self.stood["student"] + student_stood
        self.stood["teacher"] = fade * self.stood["teacher"] + teacher_stood
        self.overhead += (overhead / width - self.overhead) * (0.2 if self.blocks else 1.0)
        self.blocks += 1
