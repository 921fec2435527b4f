"""DistiLLM: where a batch comes from, what the buffer holds, when φ grows, and what is minimised."""

from pathlib import Path
from typing import Any

import pytest
import torch
from taught import Taught
from test_loop import ALONE, Toys, run_all

from kernels.divergence import divergence_N, skewed_kl
from tasks.batches import Sequence
from tasks.checkpoint import State
from tasks.distillm import Replay
from tasks.loop import Loop
from tasks.pool import load_pool, save_pool

DISTILLM = {"type": "distillm", "max_new_tokens": 10}


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Toys:
    return Taught(tmp_path_factory.mktemp("toys"))


def feed_of(toys: Toys, steps: int = 10, **method: Any) -> Replay:
    feed = Loop(toys.plan({**DISTILLM, **method}, steps=steps, validate_every=2), ALONE).feed
    assert isinstance(feed, Replay)
    return feed


def pool_of(count: int) -> list[Sequence]:
    return [Sequence(f"prompt-{i}", torch.tensor([1, i]), torch.tensor([i, 2]), on_policy=True) for i in range(count)]


def test_a_batch_is_written_replayed_or_annotated_by_phi(toys: Toys) -> None:
    feed = feed_of(toys, first_share=0.5, capacity=3)
    empty, full = State(step=4), State(step=4, pool=pool_of(3))
    # Four of ten steps are done: of φ = 0.5, 0.3 is written anew and 0.2 replayed.
    assert [feed.source(full, coin) for coin in (0.0, 0.299, 0.301, 0.499, 0.501, 0.999)] == [
        *("prompt", "prompt", "pool", "pool", "row", "row")
    ]
    # Until the buffer is full nothing is replayed.
    assert [feed.source(empty, coin) for coin in (0.0, 0.301, 0.499, 0.501)] == ["prompt", "prompt", "prompt", "row"]
    assert feed_of(toys).source(full, 0.0) == "row"
    assert feed.source(State(step=0, pool=pool_of(3)), 0.499) == "prompt"


def test_phi_grows_with_the_validation_cross_entropy(toys: Toys) -> None:
    feed, state = feed_of(toys), State()
    found = []
    for cross_entropy in (2.0, 2.05, 1.0, 2.1, 2.15, 2.1999, 2.2):
        feed.validated(state, [9.0, cross_entropy])
        found.append(feed.phi(state))
    assert found == pytest.approx([0.0, 0.0, 0.0, 0.1, 0.1, 0.1, 0.2])
    for step in range(20):
        feed.validated(state, [9.0, 10.0 + step])
    assert feed.phi(state) == 1.0


def test_the_buffer_holds_the_last_that_were_written(toys: Toys) -> None:
    loop = Loop(toys.plan({**DISTILLM, "first_share": 1.0, "capacity": 6}, steps=4, validate_every=2), ALONE)
    written = []
    for _ in range(3):
        load = loop.feed.load(loop.state, loop.student)
        written += load.written
        loop.state.step += 1
        assert len(load.sequences) == 8
    assert len(written) > 8
    assert [sequence.name for sequence in loop.state.pool] == [sequence.name for sequence in written[-6:]]
    for kept, sequence in zip(loop.state.pool, written[-6:], strict=True):
        assert kept.prompt.equal(sequence.prompt)
        assert kept.response.equal(sequence.response)
        assert kept.on_policy


def test_rows_rollouts_and_replays_make_a_batch_and_only_rollouts_are_charged(toys: Toys) -> None:
    method = {**DISTILLM, "first_share": 0.8, "capacity": 5}
    loop = Loop(toys.plan(method, {"online_teacher_tokens": 150}, steps=12), ALONE)
    rows = [loop.step() for _ in range(12)]
    state = loop.state
    assert sum(row["pooled"] for row in rows) > 10
    assert sum(row["rollouts"] + row["pooled"] for row in rows) + state.rows_drawn == 12 * 8
    assert sum(row["rollouts"] for row in rows) == state.prompts_drawn
    assert 0 < state.teacher_tokens == sum(state.positions[0]) <= 150
    assert state.capped > 0
    assert rows[-1]["loss_on_policy"] > 0
    assert rows[-1]["phi"] == 0.8


def test_replays_are_scored_by_the_teacher_over_the_vocabulary(toys: Toys) -> None:
    divergence = {"name": "skewed_kl", "alpha": 0.1}
    method = {**DISTILLM, "first_share": 1.0, "capacity": 4, "divergence": divergence}
    loop = Loop(toys.plan(method, steps=6), ALONE)
    loop.step()
    loop.state.step = 5
    student, teacher = loop.student.model, loop.method.teacher
    load = loop.feed.load(loop.state, loop.student)
    replayed = [draw for draw in load.draws if draw.source == "pool"]
    assert len(replayed) > 3
    assert all(sequence.teacher_hidden_TG is None for sequence in load.sequences[len(load.written) :])
    total, tokens = 0.0, 0
    for sequence in load.sequences:
        whole, start = torch.cat([sequence.prompt, sequence.response])[None], len(sequence.prompt) - 1
        with torch.no_grad():
            p_TV, q_TV = (model(whole).logits[0, start:-1].double() for model in (teacher, student))
        total, tokens = total + divergence_N(p_TV, q_TV, skewed_kl(0.1)).sum().item(), tokens + len(sequence.response)
    assert loop._gradients(load.sequences, tokens).sum().item() == pytest.approx(total, rel=1e-4)


def test_phi_grows_in_a_training_that_overshoots_and_the_student_learns(toys: Toys, tmp_path: Path) -> None:
    wild = {"steps": 12, "validate_every": 2, "learning_rate": 0.5, "final_learning_rate_share": 1.0}
    loop, _ = run_all(toys.plan({**DISTILLM, "capacity": 5}, **wild), tmp_path / "wild")
    curve = [row["phi"] for row in loop.state.steps]
    assert curve[0] == 0.0
    assert curve == sorted(curve)
    assert loop.state.phi_steps > 0
    assert loop.state.prompts_drawn > 0

    calm = {"steps": 60, "validate_every": 20, "checkpoint_every": 100}
    loop, _ = run_all(toys.plan({**DISTILLM, "first_share": 0.5, "capacity": 20}, **calm), tmp_path / "calm")
    assert loop.state.best
    assert loop.state.start_loss
    assert loop.state.best.loss < 0.75 * loop.state.start_loss
    assert sum(row["pooled"] for row in loop.state.steps) > 30


def test_no_validation_rows_are_refused(toys: Toys) -> None:
    with pytest.raises(ValueError, match=r"distillm goes by the validation loss.*raise train.validation_share"):
        Loop(toys.plan(DISTILLM, validation_share=1e-9), ALONE)


def test_a_pool_is_read_back_as_it_was(tmp_path: Path) -> None:
    pool = pool_of(3)
    pool.append(Sequence("x", torch.tensor([5]), torch.tensor([6, 7, 8]), on_policy=True, drawn_2T=torch.randn(2, 3)))
    save_pool(tmp_path / "pool.parquet", pool)
    for left, right in zip(load_pool(tmp_path / "pool.parquet"), pool, strict=True):
        assert left.name == right.name
        assert left.on_policy
        assert left.prompt.equal(right.prompt)
        assert left.response.equal(right.response)
        assert (left.drawn_2T is None) == (right.drawn_2T is None)
        assert left.drawn_2T is None or left.drawn_2T.equal(right.drawn_2T)
