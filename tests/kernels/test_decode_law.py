"""The law of the emitted tokens: frequencies over many sequence keys against the exact probabilities of SWITCH."""

import math
from itertools import product

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kernels.decode import Sampling, blockwise, reference
from kernels.gate import Adaptive, Coin, Constant, ExponentialDecay, InTopK, divergences, jsd
from kernels.noise import draw, gumbel, sequence_key

torch.set_num_threads(1)

VOCAB, LENGTH, EOS, KEYS = 5, 3, 0, 6000
PROMPT = [1, 4]


def model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=VOCAB, bos_token_id=None, eos_token_id=EOS,
    )  # fmt: skip
    made = LlamaForCausalLM(config).double().eval()
    for p in made.parameters():
        if p.ndim == 2:
            p.data *= 12
    return made


STUDENT, TEACHER = model(0), model(1)


@torch.no_grad()
def next_logprobs(prefix: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """(log p, log q) behind the prompt and this prefix, each [V]."""
    ids = torch.tensor([[*PROMPT, *prefix]])
    return tuple(m(ids).logits[0, -1].log_softmax(-1) for m in (TEACHER, STUDENT))


def step_law(gate, prefix: tuple[int, ...], temperature: float) -> torch.Tensor:
    """P(next token | prefix), from the definition of each strategy and not from its code."""
    log_p, log_q = next_logprobs(prefix)
    t, p, q = len(prefix), log_p.exp(), log_q.exp()
    if isinstance(gate, Constant | ExponentialDecay):
        tau = gate.value if isinstance(gate, Constant) else gate.start * math.exp(-gate.rate * t)
        return q if jsd(log_p, log_q) <= tau else p
    if isinstance(gate, Coin):
        return (1 - gate.teacher_share) * q + gate.teacher_share * p
    if isinstance(gate, InTopK):
        student, teacher = ((x / temperature).softmax(-1) for x in (log_q, log_p))
        kept = torch.zeros(VOCAB, dtype=torch.bool).scatter(0, p.topk(gate.k).indices, True)
        return student * kept + student[~kept].sum() * teacher
    assert isinstance(gate, Adaptive)
    kls = [divergences(*next_logprobs(prefix[:i]))[1] for i in range(t + 1)]
    window = gate.window
    switched = any(kls[i] > gate.factor * sum(kls[i - window : i]) / window for i in range(window, t + 1))
    return p if switched else q


def exact_law(gate, temperature: float = 1.0) -> dict[tuple[int, ...], float]:
    """P(sequence): up to LENGTH tokens, ended by EOS."""
    law, open_ = {}, {(): 1.0}
    while open_:
        grown = {}
        for prefix, mass in open_.items():
            for token, p in enumerate(step_law(gate, prefix, temperature).tolist()):
                sequence = (*prefix, token)
                target = law if token == EOS or len(sequence) == LENGTH else grown
                target[sequence] = mass * p
        open_ = grown
    assert abs(sum(law.values()) - 1) < 1e-9
    return law


def p_value(seen: torch.Tensor, expected: torch.Tensor) -> float:
    """Chi-square; cells expecting fewer than 5 are pooled."""
    small = expected < 5
    seen = torch.cat([seen[~small], seen[small].sum()[None]])
    expected = torch.cat([expected[~small], expected[small].sum()[None]])
    if expected[-1] < 1:
        seen, expected = seen[:-1], expected[:-1]
    statistic = ((seen - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(seen) - 1) / 2, dtype=torch.float64), statistic / 2))


def frequencies(decode, gate, temperature: float, **more) -> dict[tuple[int, ...], int]:
    counts: dict[tuple[int, ...], int] = {}
    sampling = {f"{role}_sampling": Sampling(temperature) for role in ("student", "teacher")}
    for first in range(0, KEYS, 1500):
        keys = torch.tensor([sequence_key(0, "law", i) for i in range(first, first + 1500)])
        got = decode(
            STUDENT, TEACHER, [torch.tensor(PROMPT)] * 1500, keys, gate, max_new_tokens=LENGTH, eos_ids=[EOS],
            **sampling, **more,
        )  # fmt: skip
        for tokens in got.tokens:
            counts[tuple(tokens.tolist())] = counts.get(tuple(tokens.tolist()), 0) + 1
    return counts


@pytest.mark.parametrize(
    ("gate", "temperature"),
    [
        (Constant(value=0.1), 1.0),
        (ExponentialDecay(rate=1.15), 1.0),
        (Coin(teacher_share=0.3), 1.0),
        (Adaptive(factor=1.0, window=1), 1.0),
        (InTopK(k=2), 1.0),
        (InTopK(k=3), 0.7),
    ],
    ids=lambda x: type(x).__name__,
)
@pytest.mark.parametrize(
    ("decode", "more"),
    [
        (reference, {}),
        (blockwise, {"block": 3, "drafter": "student"}),
        (blockwise, {"block": 3, "drafter": "teacher", "slots": 700}),
    ],
    ids=["reference", "student drafts", "teacher drafts"],
)
def test_frequencies_follow_the_exact_law(gate, temperature, decode, more):
    law, counts = exact_law(gate, temperature), frequencies(decode, gate, temperature, **more)
    assert set(counts) <= set(law)
    seen = torch.tensor([counts.get(s, 0) for s in law], dtype=torch.float64)
    expected = torch.tensor(list(law.values()), dtype=torch.float64) * KEYS
    assert p_value(seen, expected) > 0.001


def test_the_test_can_tell():
    """The gates' laws differ by more than this many keys hide, and both writers occur."""
    laws = [exact_law(g) for g in (Constant(value=0.1), Constant(value=0.0), Constant(value=1.0), InTopK(k=2))]
    for a, b in product(laws, laws):
        if a is not b:
            seen, expected = (torch.tensor([x[s] for s in a], dtype=torch.float64) * KEYS for x in (a, b))
            assert p_value(seen, expected) < 1e-6


class SharesItsNoise(InTopK):
    own_teacher_noise = False


def test_a_gate_that_looks_at_the_draw_needs_noise_of_its_own():
    law, counts = exact_law(InTopK(k=2)), frequencies(reference, SharesItsNoise(k=2), 1.0)
    seen = torch.tensor([counts.get(s, 0) for s in law], dtype=torch.float64)
    assert p_value(seen, torch.tensor(list(law.values()), dtype=torch.float64) * KEYS) < 1e-6


def test_shared_noise_makes_close_models_draw_the_same():
    """P(same) = sum_v 1 / sum_w max(p_w / p_v, q_w / q_v) >= (1 - TV) / (1 + TV)."""
    generator = torch.Generator().manual_seed(3)
    n = 20000
    keys, positions = torch.full((n,), sequence_key(0)), torch.arange(n)
    noise = gumbel(keys, positions, 8, torch.float64)
    for distance in (0.05, 0.5, 2.0):
        p = torch.randn(8, dtype=torch.float64, generator=generator)
        q = p + distance * torch.randn(8, dtype=torch.float64, generator=generator)
        p, q = p.softmax(0), q.softmax(0)
        ratio = torch.maximum(p / p[:, None], q / q[:, None]).sum(1)
        same, tv = float((1 / ratio).sum()), float((p - q).abs().sum() / 2)
        assert same >= (1 - tv) / (1 + tv)
        seen = (draw(p.log().expand(n, 8), noise) == draw(q.log().expand(n, 8), noise)).double().mean().item()
        assert abs(seen - same) < 4 * (same * (1 - same) / n) ** 0.5 + 1e-3
