"""SWITCH decoding: `reference` (per token) and `blockwise` (the same tokens, in blocks); and a student `alone`."""

from kernels.alone import alone
from kernels.blockwise import blockwise
from kernels.pace import Pace
from kernels.reference import reference
from kernels.rollout import Forwards, Rollout, Stats
from kernels.rules import Sampling

__all__ = ["Forwards", "Pace", "Rollout", "Sampling", "Stats", "alone", "blockwise", "reference"]
