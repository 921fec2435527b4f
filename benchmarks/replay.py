"""What blocks would have cost: the decoder's arithmetic replayed over positions whose outcome is known.

A rollout tells, for every position of every row, whether the student's and the teacher's draw stood. With it the
number of forwards of any block length and drafter follows exactly, and with a forward's cost its time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kernels.rollout import Rollout
from kernels.rules import Role

Cost = Callable[[int], float]
BLOCKS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64)


@dataclass(frozen=True)
class Count:
    """Forwards by model: (tokens fed) of each call; and the positions settled one after the other."""

    drafter: list[int]
    scorer: list[int]
    positions: int
    rows: int  # scored rows summed over the scorer's calls

    def seconds(self, drafter: Cost, scorer: Cost, position: float = 0.0) -> float:
        """Time with a forward's cost by its number of tokens, and a cost for each position settled."""
        return sum(map(drafter, self.drafter)) + sum(map(scorer, self.scorer)) + position * self.positions


def stood(rollout: Rollout, role: Role) -> list[list[bool]]:
    """By row and position: whether this model's draw was emitted."""
    rows = []
    for wrote_T, agrees_T in zip(rollout.teacher_wrote, rollout.agrees, strict=True):
        own_T = wrote_T if role == "teacher" else ~wrote_T
        rows.append((own_T | agrees_T).tolist())
    return rows


def replay(rows: Sequence[Sequence[bool]], block: int) -> Count:
    """Blocks of ``block`` positions for a batch of rows; a row is cut after the first position that did not stand."""
    left, drafter, scorer, positions, scored = [list(row) for row in rows], [], [], 0, 0
    while left:
        width = min(block, max(map(len, left)))
        drafter += [len(left)] * width
        scorer.append(len(left) * width)
        scored += len(left)
        settled = [_settled(row, width) for row in left]
        positions += max(settled)
        left = [row[count:] for row, count in zip(left, settled, strict=True) if len(row) > count]
    return Count(drafter, scorer, positions, scored)


def _settled(row: Sequence[bool], width: int) -> int:
    for count, stands in enumerate(row[:width], 1):
        if not stands:
            return count
    return min(width, len(row))


@dataclass(frozen=True)
class Best:
    """The fastest fixed plan."""

    seconds: float
    block: int
    drafter: Role


def optimum(rollouts: Sequence[Rollout], costs: dict[Role, Cost], position: float = 0.0) -> Best:
    """The least time over block lengths and drafters, for these rollouts one after the other."""
    plans = []
    for role, other in (("student", "teacher"), ("teacher", "student")):
        drafter: Role = "student" if role == "student" else "teacher"
        scorer: Role = "teacher" if other == "teacher" else "student"
        rows = [stood(rollout, drafter) for rollout in rollouts]
        for block in BLOCKS:
            seconds = sum(replay(part, block).seconds(costs[drafter], costs[scorer], position) for part in rows)
            plans.append(Best(seconds, block, drafter))
    return min(plans, key=lambda plan: plan.seconds)
