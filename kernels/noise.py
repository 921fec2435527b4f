"""Counter-based Gumbel noise: every draw is a function of (sequence key, position, token), never of a stream.

A model's draw at a position is argmax_v (log P(v) + g_v) (the Gumbel-max trick), and g is a pure function of a 64-bit
sequence key, the position and v (method.md, section 2). So the noise does not depend on the batch a row sits in, on
block sizes or on who asks, and two models given the same noise mostly draw the same token when their distributions
are close. Integer arithmetic decides everything up to the last conversion, so all devices agree on the bits.

Shapes: B rows, V vocabulary.
"""

import hashlib
import json

import torch
from torch import Tensor

# Streams keep apart noises that must be independent of each other at the same position of the same sequence.
SHARED, TEACHER, COIN = 0, 1, 2


def _signed(bits: int) -> int:
    """The signed 64-bit integer with these bits: torch has no arithmetic on unsigned ones."""
    return bits - (1 << 64) if bits >> 63 else bits


# SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): a counter that steps by _STEP, and this finaliser of it.
_STEP = _signed(0x9E3779B97F4A7C15)
_ROUNDS = ((30, _signed(0xBF58476D1CE4E5B9)), (27, _signed(0x94D049BB133111EB)), (31, 1))


def sequence_key(run_seed: int, *parts: int | str) -> int:
    """A stable signed 64-bit key of a sequence.

    `parts` name the sequence: example, visit (epoch) and sample index at least, or the noise repeats every epoch.
    """
    text = json.dumps([run_seed, *parts])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)


def uniform(keys_B: Tensor, positions_B: Tensor, stream: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """One number in (0, 1) for each row: the coin of gates that toss one. Any shape; keys and positions broadcast."""
    return _unit_interval(_seed(keys_B, positions_B, stream), dtype)


def gumbel(
    keys_B: Tensor, positions_B: Tensor, vocab_size: int, dtype: torch.dtype = torch.float32, stream: int = SHARED
) -> Tensor:
    """Standard Gumbel noise [B, V]: g = -log E, E = -log1p(-u) is exponential, u has 53 bits.

    A small u makes a large g, so the tail that decides draws keeps u's full relative precision. `dtype` is float32 or
    float64; both round the same u. Finite always.
    """
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"noise of dtype {dtype} would lose its tail: ask for float32 or float64 and add in that")
    steps_V = torch.arange(1, vocab_size + 1, device=keys_B.device) * _STEP
    u_BV = _unit_interval(_mix(_seed(keys_B, positions_B, stream)[:, None] + steps_V), dtype)
    return u_BV.neg_().log1p_().neg_().log_().neg_()


def draw(logits_BV: Tensor, noise_BV: Tensor) -> Tensor:
    """Token ids [B]: a sample of softmax(logits) for each row, given its Gumbel noise. Logits need no normalising."""
    return (logits_BV + noise_BV).argmax(-1)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser, in place; the shifts are logical, which torch's shift of signed integers is not."""
    for shift, factor in _ROUNDS:
        x.bitwise_xor_((x >> shift).bitwise_and_((1 << (64 - shift)) - 1))
        if factor != 1:
            x.mul_(factor)
    return x


def _seed(keys_B: Tensor, positions_B: Tensor, stream: int) -> Tensor:
    """64 well-mixed bits of (key, stream, position): where the counter over the vocabulary starts."""
    assert keys_B.dtype == positions_B.dtype == torch.int64, "keys and positions are int64"
    row_B = _mix(keys_B + _signed((stream + 1) * _STEP % (1 << 64)))
    return _mix(row_B + (positions_B + 1) * _STEP)


def _unit_interval(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """The upper 53 bits as a number in (0, 1), in place on `bits`."""
    u = (bits >> 11).bitwise_and_((1 << 53) - 1).to(dtype).add_(0.5).mul_(2.0**-53)
    # Rounding may have reached 1, whose noise is minus infinity.
    return u.clamp_(max=1 - torch.finfo(dtype).eps / 2)
