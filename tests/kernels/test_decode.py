"""Blockwise decoding emits the reference's tokens: exactly in float64, up to near ties in float32."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from kernels.decode import Pace, Rollout, Sampling, alone, blockwise, reference
from kernels.gate import Adaptive, Coin, Constant, ExponentialDecay, ExponentialGrowth, InTopK, LinearDecay
from kernels.margin import first_difference, margin
from kernels.noise import sequence_key

torch.set_num_threads(1)

VOCAB = 60
GATES = [
    ExponentialDecay(),
    ExponentialDecay(rate=0.5, floor=0.02),
    LinearDecay(length=12),
    ExponentialGrowth(rate=0.05),
    Constant(value=0.0),
    Constant(value=0.1),
    Coin(teacher_share=0.2),
    Coin(teacher_share=0.5),
    Adaptive(factor=1.5, window=3),
    InTopK(k=3),
]


def model(config, seed: int, dtype: torch.dtype = torch.float64):
    """A random model whose distributions are neither flat nor certain."""
    kinds = {LlamaConfig: LlamaForCausalLM, GPT2Config: GPT2LMHeadModel, Gemma2Config: Gemma2ForCausalLM}
    torch.manual_seed(seed)
    made = kinds[type(config)](config).to(dtype)
    for p in made.parameters():
        if p.ndim == 2:
            p.data *= 8
    return made.eval()


def llama(**changes) -> LlamaConfig:
    return LlamaConfig(
        **{
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": VOCAB,
            **changes,
        }
    )


def near(teacher, distance: float, seed: int = 1):
    """A copy of the teacher with noise of this relative size in its weights: agreement falls with distance."""
    student = type(teacher)(teacher.config).to(teacher.dtype)
    student.load_state_dict(teacher.state_dict())
    generator = torch.Generator().manual_seed(seed)
    for p in student.parameters():
        p.data += distance * p.data.std(unbiased=False) * torch.randn(p.shape, generator=generator).to(p.dtype)
    return student.eval()


TEACHER = model(llama(), 0)
STUDENTS = {distance: near(TEACHER, distance) for distance in (0.0, 0.001, 0.01, 0.05, 0.2, 1.0)}
DISTANCES = [0.001, 0.01, 0.05, 0.2, 1.0]  # without 0: where JSD = tau = 0, rounding decides who writes the same token


def make_prompts(lengths: list[int], seed: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(VOCAB, (n,), generator=generator) for n in lengths]
    return prompts, torch.tensor([sequence_key(seed, "row", i) for i in range(len(lengths))])


def assert_same(got: Rollout, want: Rollout, cuts: bool = False) -> None:
    """Equal tokens, writers and counts; equal numbers up to rounding."""
    for row, tokens in enumerate(want.tokens):
        assert got.tokens[row].tolist() == tokens.tolist()
        assert got.teacher_wrote[row].tolist() == want.teacher_wrote[row].tolist()
        torch.testing.assert_close(got.jsd[row], want.jsd[row])
        if want.teacher_hidden is not None:
            torch.testing.assert_close(got.teacher_hidden[row], want.teacher_hidden[row])
    for name in ("emitted_T", "interventions_T", "agreeing_T") + (("cuts_T",) if cuts else ()):
        assert torch.equal(getattr(got.stats, name), getattr(want.stats, name)), name


def assert_forwards(got: Rollout, want: Rollout, drafter: str | None) -> None:
    """Per token both models run once at every emitted position; in blocks both give the same positions."""
    longest = len(want.stats.emitted_T)
    for counts_T in want.stats.by_position(longest)[4:]:
        assert torch.equal(counts_T, want.stats.emitted_T)
    starts_T, covers_T, teacher_starts_T, teacher_covers_T = got.stats.by_position(longest)[4:]
    assert torch.equal(covers_T, teacher_covers_T)
    assert (covers_T >= got.stats.emitted_T).all()
    if drafter:
        assert torch.equal(starts_T if drafter == "student" else teacher_starts_T, covers_T)
    for forwards, sum_ in ((got.stats.student, starts_T.sum()), (got.stats.teacher, teacher_starts_T.sum())):
        assert sum_ <= forwards.rows


def check(lengths, limits, eos_ids, distance, gate, seed, block, slots, drafter, **more) -> None:
    prompts, keys = make_prompts(lengths, seed)
    arguments = STUDENTS[distance], TEACHER, prompts, keys, gate
    settings_ = {"max_new_tokens": limits, "eos_ids": eos_ids, "keep_teacher_hidden": True, **more}
    want = reference(*arguments, **settings_)
    got = blockwise(*arguments, **settings_, block=block, slots=slots, drafter=drafter)
    assert_same(got, want, cuts=drafter == "student")
    assert_forwards(got, want, drafter)
    for tokens, limit in zip(want.tokens, limits, strict=True):
        assert len(tokens) == limit or int(tokens[-1]) in eos_ids
        assert not set(tokens[:-1].tolist()) & set(eos_ids)


# Limits beyond the longest block, or it would never be drafted.
rows = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 20)), min_size=1, max_size=16)
cases = {
    "rows": rows,
    "eos_ids": st.sets(st.integers(0, VOCAB - 1), max_size=6),
    "distance": st.sampled_from(DISTANCES),
    "seed": st.integers(0, 2**31),
    "block": st.none() | st.integers(1, 16),
    "slots": st.none() | st.integers(1, 16),
    "drafter": st.sampled_from([None, "student", "teacher"]),
}


def run_case(rows, eos_ids, **case) -> None:
    check([length for length, _ in rows], [limit for _, limit in rows], sorted(eos_ids), **case)


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: type(gate).__name__)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(case=st.fixed_dictionaries(cases))
def test_blockwise_is_the_reference(gate, case):
    """Both paddings with it: the reference pads rows on the left, blocks are fed from buffers padded on the right."""
    run_case(gate=gate, **case)


@pytest.mark.long
@pytest.mark.parametrize("gate", GATES, ids=lambda gate: type(gate).__name__)
@settings(max_examples=300, deadline=None)
@given(case=st.fixed_dictionaries(cases))
def test_blockwise_is_the_reference_long(gate, case):
    run_case(gate=gate, **case)


@pytest.mark.parametrize("drafter", ["student", "teacher"])
@pytest.mark.parametrize("block", [15, 16])
def test_the_longest_blocks_are_drafted_whole_and_change_nothing(block, drafter):
    prompts, keys = make_prompts([3, 1, 9, 5], block)
    for distance, gate in ((0.001, ExponentialDecay()), (0.2, Constant(value=0.1)), (0.05, Coin(teacher_share=0.5))):
        arguments = STUDENTS[distance], TEACHER, prompts, keys, gate
        limits = {"max_new_tokens": [40, 20, 33, 40], "eos_ids": []}
        want = reference(*arguments, **limits)
        widths: list[int] = []
        scorer = TEACHER if drafter == "student" else STUDENTS[distance]
        hook = scorer.register_forward_pre_hook(
            lambda model, args, fed, widths=widths: widths.append(fed["input_ids"].shape[1]), with_kwargs=True
        )
        got = blockwise(*arguments, **limits, block=block, drafter=drafter)
        hook.remove()
        assert_same(got, want, cuts=drafter == "student")
        assert widths[1] == max(widths) == block  # behind the prompts, of at most 9 tokens


@settings(max_examples=8, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31), block=st.none() | st.integers(1, 8), distance=st.sampled_from(DISTANCES))
def test_tempered_draws_of_speculative_kd(seed, block, distance):
    sampling = {"student_sampling": Sampling(0.5, 0.5), "teacher_sampling": Sampling(0.2, 0.5)}
    check([3, 1, 6], [10, 12, 8], [0, 1], distance, InTopK(k=5), seed, block, None, None, **sampling)


@pytest.mark.parametrize("decode", [reference, blockwise])
def test_results_do_not_depend_on_the_batch(decode):
    prompts, keys = make_prompts([1, 7, 3, 9, 2], 5)
    limits = [9, 4, 12, 1, 12]
    arguments = {"eos_ids": [3, 4], "keep_teacher_hidden": True}
    together = decode(STUDENTS[0.2], TEACHER, prompts, keys, Constant(value=0.1), max_new_tokens=limits, **arguments)
    for i in range(5):
        alone = decode(
            STUDENTS[0.2], TEACHER, [prompts[i]], keys[[i]], Constant(value=0.1), max_new_tokens=limits[i], **arguments
        )
        assert alone.tokens[0].tolist() == together.tokens[i].tolist()
        torch.testing.assert_close(alone.teacher_hidden[0], together.teacher_hidden[i])


@settings(max_examples=12, deadline=None, derandomize=True)
@given(rows=rows, eos_ids=st.sets(st.integers(0, VOCAB - 1), max_size=6), seed=st.integers(0, 2**31))
def test_alone_is_the_reference_where_the_teacher_never_writes(rows, eos_ids, seed):
    prompts, keys = make_prompts([length for length, _ in rows], seed)
    settings_ = {"max_new_tokens": [limit for _, limit in rows], "eos_ids": sorted(eos_ids)}
    want = reference(STUDENTS[1.0], TEACHER, prompts, keys, Constant(value=1.0), **settings_)
    got = alone(STUDENTS[1.0], prompts, keys, **settings_)
    assert [tokens.tolist() for tokens in got.tokens] == [tokens.tolist() for tokens in want.tokens]
    assert got.stats.student == want.stats.student
    assert got.stats.teacher.calls == 0
    assert got.stats.intervention_rate == 0.0
    assert got.teacher_hidden is None


class DraftedEos(Constant):
    """A gate that counts the drafted EOS which the teacher replaces."""

    replaced = 0

    def teacher_writes(self, sight):
        teacher = Constant.teacher_writes(self, sight)
        type(self).replaced += int((teacher & (sight.draft_B < 20)).sum())
        return teacher


def test_eos_inside_blocks_and_drafted_eos_replaced():
    eos_ids, gate = list(range(20)), DraftedEos(value=0.05)
    before = DraftedEos.replaced
    for seed in range(6):
        check([2, 5, 1, 3], [16] * 4, eos_ids, 1.0, gate, seed, 6, None, "student")
    assert DraftedEos.replaced - before > 10


def test_hidden_states_give_the_teachers_distributions():
    prompts, keys = make_prompts([4, 2, 6], 8)
    got = blockwise(
        STUDENTS[0.05], TEACHER, prompts, keys, ExponentialDecay(), max_new_tokens=12, eos_ids=[0], slots=2, block=4,
        keep_teacher_hidden=True,
    )  # fmt: skip
    for prompt, tokens, hidden in zip(prompts, got.tokens, got.teacher_hidden, strict=True):
        full = TEACHER(torch.cat([prompt, tokens])[None]).logits[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(TEACHER.lm_head(hidden), full)
        assert hidden.shape == (len(tokens), 32)
        hidden.requires_grad_()  # no inference tensors: a loss must be able to use them


def test_identical_models_never_cut():
    prompts, keys = make_prompts([3, 5, 2, 4], 2)
    got = blockwise(
        STUDENTS[0.0], TEACHER, prompts, keys, ExponentialDecay(rate=0.2), max_new_tokens=32, eos_ids=[], block=8
    )
    assert got.stats.cuts_T.sum() == 0
    assert got.stats.agreement == 1.0
    assert got.stats.teacher_forwards_per_token == 1 / 8
    assert got.stats.student.rows == got.stats.tokens == 4 * 32


def test_teacher_drafts_stand_where_the_teacher_writes_everything():
    prompts, keys = make_prompts([3, 5], 2)
    arguments = STUDENTS[1.0], TEACHER, prompts, keys, Constant(value=0.0)
    got = blockwise(*arguments, max_new_tokens=32, eos_ids=[], block=8, drafter="teacher")
    assert got.stats.cuts_T.sum() == 0
    assert got.stats.student.calls == 4
    costs = {"student": lambda n: 1.0, "teacher": lambda n: 1.0}
    adaptive = blockwise(*arguments, max_new_tokens=32, eos_ids=[], pace=Pace(costs))
    assert adaptive.stats.student.calls < 16  # the roles swapped by themselves
    assert [t.tolist() for t in adaptive.tokens] == [t.tolist() for t in got.tokens]


def test_waiting_rows_join():
    prompts, keys = make_prompts([3, 1, 5, 2, 4, 6, 1], 3)
    limits = [20, 2, 5, 1, 9, 3, 12]
    got = blockwise(
        STUDENTS[0.05], TEACHER, prompts, keys, ExponentialDecay(), max_new_tokens=limits, eos_ids=[], slots=2, block=1
    )
    assert [len(t) for t in got.tokens] == limits
    assert got.stats.student.calls == 32  # row 0 beside rows 1 to 5, then row 6 alone
    assert got.stats.student.rows == sum(limits)


def saw(pace: Pace, rows: int, block: int, student_stood: int, teacher_stood: int, written: int = 0) -> None:
    pace.saw_block([written] * rows, [block] * rows, [student_stood] * rows, [teacher_stood] * rows, block, 0.0)


def test_pace_choices():
    pace = Pace({"student": lambda n: 0.2, "teacher": lambda n: 1.0})
    plans = []
    for stood in (40, 36, 30, 20, 1):
        for _ in range(30):
            saw(pace, 4, 40, stood, 4)
        plans.append(pace.choose([(0, 100)] * 8))
    assert all(a[0] > b[0] for a, b in pairwise(plans))
    assert plans[0][0] >= 16
    assert plans[-1] == (1, "student")  # drafts that hardly stand: the per-token loop
    assert pace.choose([(0, 100)], block=7, drafter="teacher") == (7, "teacher")


def test_pace_knows_how_far_the_rows_are():
    pace = Pace({"student": lambda n: 0.2, "teacher": lambda n: 1.0})
    for _ in range(30):
        saw(pace, 4, 40, 40, 4, written=0)
        saw(pace, 4, 40, 8, 40, written=64)
    early, late = pace.choose([(3, 100)] * 8), pace.choose([(70, 100)] * 8)
    assert early[1] == "student"
    assert early[0] >= 16
    assert late[1] == "teacher"  # the student's draws fall, the teacher's stand
    assert pace.acceptance("student", 40) == pytest.approx(pace.acceptance("student", 0), abs=0.1)  # not seen yet
    assert pace.choose([(3, 2)] * 8)[0] <= 2  # never past the last row's end


def test_pace_learns_costs():
    pace, chosen = Pace(), []
    for _ in range(40):
        block, role = pace.choose([(0, 200)] * 4)
        chosen.append(block)
        for _ in range(block):
            pace.saw_forward(role, 4, 0.04 + 0.001 * 4)
        pace.saw_forward("teacher" if role == "student" else "student", 4 * block, 0.1 + 0.002 * 4 * block)
        saw(pace, 4, 20, 19, 19)
    assert pace.lines["teacher"].fit == pytest.approx((0.1, 0.002), rel=1e-3)
    exact = Pace({"student": lambda n: 0.04 + 0.001 * n, "teacher": lambda n: 0.1 + 0.002 * n})
    exact.settled = pace.settled
    assert chosen[-1] == exact.choose([(0, 200)] * 4)[0] > 4


def test_other_architectures_and_unequal_widths():
    gpt = {"n_layer": 2, "n_head": 2, "vocab_size": VOCAB, "n_positions": 24, "bos_token_id": 0, "eos_token_id": 0}
    gemma = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16,
        "num_key_value_heads": 1, "sliding_window": 5, "final_logit_softcapping": 8.0, "query_pre_attn_scalar": 16,
        "attn_implementation": "sdpa",
    }  # fmt: skip
    pairs = [
        # Learned positions that end exactly with the longest row; a student of another width.
        (GPT2Config(n_embd=16, **gpt), GPT2Config(n_embd=32, **gpt)),
        # A sliding window shorter than the rows; padded vocabularies of different sizes; soft-capped logits.
        (llama(vocab_size=VOCAB + 8), Gemma2Config(vocab_size=VOCAB + 3, **gemma)),
    ]
    prompts, keys = make_prompts([9, 12, 1], 4)
    for small, large in pairs:
        student, teacher = model(small, 1), model(large, 2)
        arguments = student, teacher, prompts, keys, Coin(teacher_share=0.5)
        more = {"max_new_tokens": 12, "eos_ids": [0], "vocab_size": VOCAB, "keep_teacher_hidden": True}
        want = reference(*arguments, **more)
        assert 0 < want.stats.intervention_rate < 1
        for drafter in ("student", "teacher"):
            assert_same(blockwise(*arguments, **more, block=5, drafter=drafter, slots=2), want)


def test_eager_attention():
    # Not float64: eager attention takes its softmax in float32, where a float64 mask is minus infinity.
    teacher = model(llama(attn_implementation="eager"), 0, torch.float32)
    prompts, keys = make_prompts([4, 2], 4)
    arguments = near(teacher, 0.05), teacher, prompts, keys, ExponentialDecay()
    want = reference(*arguments, max_new_tokens=10, eos_ids=[])
    got = blockwise(*arguments, max_new_tokens=10, eos_ids=[], block=4)
    assert [t.tolist() for t in got.tokens] == [t.tolist() for t in want.tokens]


def test_modes_are_restored():
    student = near(TEACHER, 0.05)
    student.train()
    student.model.layers[0].eval()
    modes = [m.training for m in student.modules()]
    prompts, keys = make_prompts([4], 4)
    for decode in (reference, blockwise):
        decode(student, TEACHER, prompts, keys, ExponentialDecay(), max_new_tokens=2, eos_ids=[])
        assert [m.training for m in student.modules()] == modes
        assert not TEACHER.training
    assert not TEACHER.lm_head._forward_pre_hooks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_differs_at_near_ties_only(dtype):
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.05}[dtype]
    teacher = model(llama(), 0).to(dtype)
    student, gate = near(teacher, 0.1), Constant(value=0.05)
    prompts, keys = make_prompts([3, 8, 5, 2, 6, 4, 7, 1] * 2, 9)
    arguments = student, teacher, prompts, keys, gate
    want = reference(*arguments, max_new_tokens=64, eos_ids=[])
    got = blockwise(*arguments, max_new_tokens=64, eos_ids=[], block=6)
    mismatches = 0
    for prompt, key, a, b in zip(prompts, keys.tolist(), want.tokens, got.tokens, strict=True):
        position = first_difference(a, b)
        if position is not None:
            mismatches += 1
            assert margin(student, teacher, prompt, a, key, gate, position).near(tolerance)
    assert (mismatches > 0) == (dtype == torch.bfloat16)
    # The check can fail: most positions are no near ties at all.
    margins = [margin(student, teacher, prompts[0], want.tokens[0], int(keys[0]), gate, t) for t in range(0, 64, 8)]
    assert sum(m.near(1e-3) for m in margins) <= 2


def test_margin_finds_the_tie():
    prompts, keys = make_prompts([3], 9)
    want = reference(STUDENTS[0.2], TEACHER, prompts, keys, Constant(value=0.1), max_new_tokens=4, eos_ids=[])
    tied = Constant(value=float(want.jsd[0][2]))
    assert margin(STUDENTS[0.2], TEACHER, prompts[0], want.tokens[0], int(keys[0]), tied, 2).gate < 1e-12
    assert first_difference(torch.tensor([1, 2]), torch.tensor([1, 2, 3])) == 2
    assert first_difference(torch.tensor([1, 2]), torch.tensor([1, 2])) is None


def test_mistakes_are_answered_with_the_fix():
    prompts, keys = make_prompts([3, 2], 1)
    good = {"max_new_tokens": 4, "eos_ids": [0]}

    def refused(match: str, decode=blockwise, prompts=prompts, keys=keys, teacher=TEACHER, **changes) -> None:
        with pytest.raises(ValueError, match=match):
            decode(STUDENTS[0.2], teacher, prompts, keys, ExponentialDecay(), **{**good, **changes})

    for decode in (reference, blockwise):
        refused("at least one token", decode, prompts=[prompts[0], torch.tensor([], dtype=torch.int64)])
        refused("as many keys", decode, keys=keys[:1])
        refused("as many keys", decode, max_new_tokens=[1, 2, 3])
        refused("at least 1", decode, max_new_tokens=[1, 0])
        refused("sequence_key", decode, keys=keys.double())
        refused("vocab_size", decode, teacher=model(llama(vocab_size=VOCAB + 4), 0))
    refused("at least 1", block=0)
    refused("at least 1", slots=0)
    broken = near(TEACHER, 0.0)
    broken.lm_head.weight.data[5] = torch.nan
    refused("not finite", teacher=broken)
    refused("sdpa", teacher=model(llama(attn_implementation="flex_attention"), 0))
    for sampling in ({"temperature": 0.0}, {"top_p": 0.0}):
        with pytest.raises(ValueError, match="needs"):
            Sampling(**sampling)
