"""MiniLLM: what is rolled out and when, what each token's advantage is, and what the gradient follows."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from taught import Taught
from test_loop import ALONE, Toys, run_all
from test_methods import llama
from torch import Tensor

from kernels import gate
from kernels.divergence import divergence_N, forward_kl
from tasks.batches import Sequence, collate
from tasks.catalogue import method_of
from tasks.config import methods as config
from tasks.loop import Loop
from tasks.minillm import Collection, Minillm
from tasks.student import head_of, hidden_states

MINILLM = {"type": "minillm", "max_new_tokens": 10, "block": 4, "collected_batches": 2, "epochs": 3}


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Toys:
    return Taught(tmp_path_factory.mktemp("toys"))


def logits_TV(model: Any, sequence: Sequence) -> Tensor:
    """At the response positions, float64."""
    whole, start = torch.cat([sequence.prompt, sequence.response])[None], len(sequence.prompt) - 1
    return model(whole).logits[0, start:-1].double()


def token_logprobs(model: Any, sequence: Sequence) -> Tensor:
    return logits_TV(model, sequence).log_softmax(-1).gather(-1, sequence.response[:, None])[:, 0]


def padded_advantages(log_p: list[Tensor], log_q: list[Tensor], settings: config.Minillm) -> list[Tensor]:
    """The paper's sums on padded tensors [M, T], masked wherever a row has ended."""
    lengths = torch.tensor([len(log_p_T) for log_p_T in log_p])
    mask_MT = torch.arange(int(lengths.max())) < lengths[:, None]
    rewards_MT = torch.zeros(mask_MT.shape, dtype=torch.float64)
    for row, (log_p_T, log_q_T) in enumerate(zip(log_p, log_q, strict=True)):
        rewards_MT[row, : len(log_p_T)] = ((log_p_T - log_q_T) / settings.reward_scale).clamp(
            -settings.reward_limit, settings.reward_limit
        )
    total_M, columns = torch.zeros(len(log_p), dtype=torch.float64), []
    for t in reversed(range(mask_MT.shape[1])):
        total_M = rewards_MT[:, t] + settings.discount * total_M
        columns.append(total_M / (lengths - t).clamp(min=1))
    returns_MT = torch.stack(columns[::-1], 1)
    valid_N = returns_MT[mask_MT]
    white_MT = (returns_MT - valid_N.mean()) / (valid_N.var(correction=0) + 1e-8).sqrt()
    return [white_MT[row, :length] for row, length in enumerate(lengths.tolist())]


def test_the_defaults_are_the_papers() -> None:
    method = method_of(config.Minillm(), llama(1), 50)
    assert isinstance(method, Minillm)
    assert method.gate == gate.Coin(teacher_share=0.2)
    settings = method.settings
    assert (settings.reward_scale, settings.reward_limit, settings.discount) == (0.5, 100.0, 0.95)
    assert (settings.clip, settings.epochs, settings.on_policy_share) == (0.2, 4, 1.0)
    assert (method.language.cross_entropy_share, settings.language_weight) == (0.5, 1.0)


def test_a_collection_is_weighed_as_the_paper_says(toys: Toys) -> None:
    loop = Loop(toys.plan(MINILLM, micro_batch=4), ALONE)
    load = loop.feed.load(loop.state, loop.student)
    assert len(load.written) == len(loop.state.pool) == 16
    # A mixture: some tokens come from the teacher, and no more than a coin of 0.2 would give.
    assert load.stats
    assert 0.05 < load.stats.intervention_rate < 0.4
    with torch.no_grad():
        log_p, log_q = (
            [token_logprobs(model, sequence) for sequence in loop.state.pool]
            for model in (loop.method.teacher, loop.student.model)
        )
    advantages = padded_advantages(log_p, log_q, config.Minillm())
    for sequence, written, log_p_T, log_q_T, advantages_T in zip(
        loop.state.pool, load.written, log_p, log_q, advantages, strict=True
    ):
        assert sequence.response.equal(written.response)
        assert sequence.drawn_2T is not None
        drawn_with_T = (0.8 * log_q_T.exp() + 0.2 * log_p_T.exp()).log()
        torch.testing.assert_close(sequence.drawn_2T[0].double(), drawn_with_T, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(sequence.drawn_2T[1].double(), advantages_T, rtol=1e-3, atol=1e-3)


def reference(student_TV: list[Tensor], teacher_TV: list[Tensor], sequences: list[Sequence], clip: float) -> Tensor:
    """The whole objective from logits, summed, by autograd in float64."""
    total = torch.zeros((), dtype=torch.float64)
    for q_TV, p_TV, sequence in zip(student_TV, teacher_TV, sequences, strict=True):
        assert sequence.drawn_2T is not None
        log_b_T, advantages_T = sequence.drawn_2T.double()
        log_q_TV, log_p_TV = q_TV.log_softmax(-1), p_TV.log_softmax(-1)
        ratio_T = (log_q_TV.gather(-1, sequence.response[:, None])[:, 0] - log_b_T).exp()
        held_T = ratio_T.clamp(1 - clip, 1 + clip)
        total = total + torch.maximum(-advantages_T * ratio_T, -advantages_T * held_T).sum()
        total = total + (log_q_TV.exp() * (log_q_TV - log_p_TV)).sum()
    return total


def test_the_gradient_is_that_of_the_clipped_objective_and_the_reverse_kl() -> None:
    student, teacher = llama(0), llama(1)
    method = method_of(config.Minillm(max_new_tokens=9, block=3), teacher, 50)
    assert isinstance(method, Minillm)
    prompts = [torch.tensor(ids) for ids in ([1, 5, 6], [1, 9], [3, 4, 4, 8])]
    rollout = method.rollout(student, prompts, [11, 12, 13], [2])
    written = [Sequence("", *pair, on_policy=True) for pair in zip(prompts, rollout.tokens, strict=True)]
    drawn = method.judge(method.score(student, written, 2))
    pool = [
        Sequence("", sequence.prompt, sequence.response, on_policy=True, drawn_2T=drawn_2T)
        for sequence, drawn_2T in zip(written, drawn, strict=True)
    ]
    # The student has moved on since: some ratios are beyond the clip.
    moved = llama(0)
    with torch.no_grad():
        moved.lm_head.weight.add_(0.05 * torch.randn(moved.lm_head.weight.shape))
    batch = collate(pool, torch.device("cpu"))
    hidden_NH = hidden_states(moved, batch.ids_BL).flatten(0, 1)[batch.where_N].detach().requires_grad_()
    loss, losses_N = method.loss(hidden_NH, head_of(moved), batch, pool)
    loss.backward()
    lengths = [len(sequence.response) for sequence in pool]
    leaf_NH = hidden_NH.detach().double().requires_grad_()
    student_TV = (leaf_NH @ moved.lm_head.weight.detach().double().T).split(lengths)
    with torch.no_grad():
        teacher_TV = [logits_TV(teacher, sequence) for sequence in pool]
    expected = reference(list(student_TV), teacher_TV, pool, 0.2)
    expected.backward()
    assert losses_N.sum().item() == pytest.approx(expected.item(), rel=1e-4)
    assert leaf_NH.grad is not None
    torch.testing.assert_close(hidden_NH.grad, leaf_NH.grad.float(), rtol=1e-3, atol=1e-4)


def test_annotated_rows_carry_the_language_modelling_term() -> None:
    student, teacher = llama(0), llama(1)
    method = method_of(config.Minillm(language_weight=0.5, cross_entropy_share=0.25), teacher, 50)
    row = Sequence("a", torch.tensor([1, 5]), torch.tensor([7, 8, 2]))
    batch = collate([row], torch.device("cpu"))
    hidden_NH = hidden_states(student, batch.ids_BL).flatten(0, 1)[batch.where_N]
    loss, _ = method.loss(hidden_NH, head_of(student), batch, [row])
    (validation_N,) = method.validate(hidden_NH, head_of(student), batch, [row])
    with torch.no_grad():
        q_TV, p_TV = logits_TV(student, row), logits_TV(teacher, row)
        kl, hard = divergence_N(p_TV, q_TV, forward_kl()).sum(), -token_logprobs(student, row).sum()
        reverse = (q_TV.softmax(-1) * (q_TV.log_softmax(-1) - p_TV.log_softmax(-1))).sum()
    assert loss.item() == pytest.approx(0.5 * (0.75 * kl + 0.25 * hard).item(), rel=1e-4)
    assert validation_N.sum().item() == pytest.approx(reverse.item(), rel=1e-4)


def test_a_collection_is_gone_through_epochs_times_then_the_next_is_rolled_out(toys: Toys) -> None:
    loop = Loop(toys.plan(MINILLM, steps=12), ALONE)
    assert isinstance(loop.feed, Collection)
    rows, uses, orders = [], Counter[int](), []
    for step in range(12):
        if step % 6 == 0:
            uses.clear()
        before = loop.state.pool
        rows.append(loop.step())
        assert (loop.state.pool is before) == (step % 6 != 0)
        # What a step takes is a function of seed and step.
        taken = [loop.feed.pooled(type(loop.state)(step=step, pool=loop.state.pool), slot) for slot in range(8)]
        uses.update(taken)
        orders.append(taken)
        if step % 6 == 5:
            assert set(uses.values()) == {3}
            assert len(uses) == 16
    assert [row["rollouts"] for row in rows] == [16, 0, 0, 0, 0, 0] * 2
    assert [row["pooled"] for row in rows] == [8] * 12
    assert loop.state.prompts_drawn == 32
    assert loop.state.teacher_tokens == sum(loop.state.positions[0])
    assert orders[0] + orders[1] != orders[2] + orders[3]


def test_rows_are_mixed_in_by_share_and_the_cap_leaves_only_rows(toys: Toys) -> None:
    loop = Loop(toys.plan({**MINILLM, "on_policy_share": 0.5}, steps=6), ALONE)
    rows = [loop.step() for _ in range(6)]
    assert rows[0]["rollouts"] == 8
    assert 0 < sum(row["pooled"] for row in rows) == 6 * 8 - loop.state.rows_drawn < 6 * 8
    capped = Loop(toys.plan(MINILLM, {"online_teacher_tokens": 159}, steps=6), ALONE)
    row = capped.step()
    assert (row["rollouts"], row["pooled"], capped.state.capped) == (0, 0, 8)
    assert row["loss_off_policy"] > 0


def test_a_teacher_equal_to_the_student_leaves_nothing_to_learn(toys: Toys) -> None:
    loop = Loop(toys.plan(MINILLM, {"teacher": "twin"}), ALONE)
    row = loop.step()
    # Rewards are rounding, about 1e-7, and whitening divides by no less than 1e-4.
    assert row["loss"] == pytest.approx(0, abs=1e-2)
    assert row["gradient_norm"] < 1e-2


def test_the_student_comes_closer_to_the_teacher(toys: Toys, tmp_path: Path) -> None:
    calm = {"steps": 72, "validate_every": 24, "checkpoint_every": 100, "learning_rate": 1e-2}
    loop, _ = run_all(toys.plan(MINILLM, **calm), tmp_path)
    assert loop.state.best
    assert loop.state.start_loss
    assert loop.state.best.loss < 0.75 * loop.state.start_loss
