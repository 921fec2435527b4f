"""The training loop in this process: what may change a result, and what may not."""

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from toys import commit_inputs, kept_rows, save_model, stage_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from infra.models import load_model
from infra.store import LocalStore
from kernels.codec import encode_top
from tasks.batches import row_sequence
from tasks.checkpoint import load, save
from tasks.feed import Feed
from tasks.loop import Loop, proceed, start
from tasks.plan import Plan
from tasks.student import World, full
from tasks.train import plan_of

torch.set_num_threads(1)
ALONE = World(0, 1, torch.device("cpu"))
SWITCH = {"type": "switch", "max_new_tokens": 10, "block": 4}
MINILLM = {"type": "minillm", "max_new_tokens": 10, "block": 4, "collected_batches": 2, "epochs": 2}
DISTILLM = {"type": "distillm", "max_new_tokens": 10, "first_share": 0.8, "capacity": 6}
METHODS = [{"type": "sft"}, SWITCH, MINILLM, DISTILLM]


class Toys:
    """A store with a student, a teacher and 48 rows, and plans on them."""

    def __init__(self, root: Path) -> None:
        self.store = LocalStore(root)
        student = save_model(self.store, "student", seed=1)
        teacher = save_model(self.store, "teacher", seed=2, hidden=64, spread=0.2)
        tied = save_model(self.store, "tied", seed=3, tie_word_embeddings=True)
        self.models = {"student": student, "teacher": teacher, "twin": student, "tied": tied}
        self.inputs = commit_inputs(self.store, self.models, kept_rows(48))

    def plan(self, method: dict[str, Any] | None = None, settings: dict[str, Any] | None = None, **train: Any) -> Plan:
        defaults = {"steps": 6, "validate_every": 3, "checkpoint_every": 2, "learning_rate": 1e-2, "warmup_steps": 2}
        values = defaults | {"method": method or {"type": "sft"}} | train
        return plan_of(stage_of(self.store, self.inputs, values, **(settings or {})))


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Toys:
    return Toys(tmp_path_factory.mktemp("toys"))


def weights(loop: Loop) -> dict[str, Tensor]:
    return {name: full(parameter).clone() for name, parameter in loop.student.trained().items()}


def gradients(loop: Loop) -> dict[str, Tensor]:
    """A tenth of the first step's: Adam's first moment. Its weights would magnify the rounding of gradients near 0."""
    return {name: full(loop.optimizer.state[p]["exp_avg"]) for name, p in loop.student.trained().items()}


def check_equal(left: dict[str, Tensor], right: dict[str, Tensor], **tolerance: float) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, right[name], **(tolerance or {"rtol": 0, "atol": 0}), msg=name)


def run_all(plan: Plan, folder: Path, resume: Path | None = None) -> tuple[Loop, list[Path]]:
    """Every step; the kept checkpoints, the last of which holds the student."""
    loop, kept = start(plan, ALONE, resume), []
    assert loop

    def report(source: Path, step: int) -> None:
        kept.append(folder / f"step-{step}")
        shutil.copytree(source, kept[-1])

    proceed(loop, report, lambda row: None)
    return loop, kept


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method["type"])
def test_micro_batch_changes_nothing(toys: Toys, method: dict[str, Any]) -> None:
    loops = [Loop(toys.plan(method, micro_batch=size), ALONE) for size in (8, 2, 1)]
    rows = [loop.step() for loop in loops]
    for loop, row in zip(loops[1:], rows[1:], strict=True):
        assert row["loss"] == pytest.approx(rows[0]["loss"], rel=1e-6)
        assert row["tokens"] == rows[0]["tokens"]
        check_equal(gradients(loop), gradients(loops[0]), rtol=1e-4, atol=1e-8)


def test_loss_is_the_weighted_mean_over_response_tokens(tmp_path: Path, toys: Toys) -> None:
    rows = kept_rows(8)
    column = pa.array([1.0, 0.25, 2.0, 1.0, 0.5, 0.0, 1.0, 3.0], pa.float32())
    store = LocalStore(tmp_path)
    student = save_model(store, "student", seed=1)
    inputs = commit_inputs(
        store, {"student": student}, rows.set_column(rows.column_names.index("weight"), "weight", column)
    )
    train = {"method": {"type": "sft"}, "validation_share": 0.0, "batch_size": 8, "micro_batch": 2}
    loop = Loop(plan_of(stage_of(store, inputs, train)), ALONE)
    model, total, count = loop.student.model, 0.0, 0.0
    for index in range(8):
        sequence = row_sequence(loop.feed.data.rows, index)
        whole = torch.cat([sequence.prompt, sequence.response])
        logits = model(input_ids=whole[None]).logits[0, len(sequence.prompt) - 1 : -1]
        losses = torch.nn.functional.cross_entropy(logits, sequence.response, reduction="sum")
        total, count = total + sequence.weight * losses.item(), count + sequence.weight * len(sequence.response)
    assert loop.step()["loss"] == pytest.approx(total / count, rel=1e-5)


def test_sft_learns_and_the_students_folder_is_plain(toys: Toys, tmp_path: Path) -> None:
    loop, kept = run_all(toys.plan(steps=60, validate_every=20, checkpoint_every=100), tmp_path)
    assert loop.state.best
    assert loop.state.start_loss
    assert loop.state.best.loss < 0.5 * loop.state.start_loss
    assert loop.state.steps[-1]["loss"] < 0.5 * loop.state.steps[0]["loss"]
    model = AutoModelForCausalLM.from_pretrained(kept[-1] / "student")
    tokenizer = AutoTokenizer.from_pretrained(kept[-1] / "student")
    assert tokenizer("w5 w6").input_ids == [5, 6]
    assert model.generation_config.eos_token_id == 2
    # The served model is the one that was validated best.
    sums = [0.0, 0.0]
    for index in range(loop.feed.data.validation.num_rows):
        sequence = row_sequence(loop.feed.data.validation, index)
        whole = torch.cat([sequence.prompt, sequence.response])
        logits = model(input_ids=whole[None]).logits[0, len(sequence.prompt) - 1 : -1]
        sums[0] += torch.nn.functional.cross_entropy(logits, sequence.response, reduction="sum").item()
        sums[1] += len(sequence.response)
    assert sums[0] / sums[1] == pytest.approx(loop.state.best.loss, rel=1e-5)


def test_best_or_last_weights_are_kept(toys: Toys, tmp_path: Path) -> None:
    students = {}
    for keep in ("best", "last"):
        # So large a rate that the student is worse at the end than before.
        plan = toys.plan(keep=keep, steps=9, learning_rate=0.3, validate_every=1, final_learning_rate_share=1.0)
        loop, kept = run_all(plan, tmp_path / keep)
        students[keep] = load_file(kept[-1] / "student" / "model.safetensors")
        assert loop.state.best
        assert loop.state.best.loss == min(row["validation_loss"] for row in loop.state.steps)
        assert loop.state.best.step < 9
    last = weights(loop)
    check_equal(last, {name: students["last"][name] for name in last})
    assert any((students["best"][name] != weight).any() for name, weight in last.items())


def test_switch_records_who_wrote_what(toys: Toys) -> None:
    loop = Loop(toys.plan({**SWITCH, "on_policy_share": 0.5}), ALONE)
    rows = [loop.step() for _ in range(4)]
    emitted, interventions, agreeing, cuts, drafted, covered, scored, read = loop.state.positions
    assert sum(emitted) == loop.state.teacher_tokens == sum(row["teacher_tokens"] for row in rows)
    assert 0 < sum(interventions) < sum(emitted)
    assert all(a <= i <= e for a, i, e in zip(agreeing, interventions, emitted, strict=True))
    # A position is cut only where the teacher wrote another token than the student's.
    assert sum(cuts) <= sum(interventions) - sum(agreeing)
    # The student drafts, so each of its forwards gives one position; the teacher reads the same ones in fewer.
    assert drafted == covered == read
    assert all(c >= e for c, e in zip(covered, emitted, strict=True))
    assert sum(emitted) / 4 <= sum(scored) < sum(emitted)
    assert loop.state.prompts_drawn + loop.state.rows_drawn == 4 * 8
    assert 0 < loop.state.prompts_drawn < 4 * 8
    for row in rows:
        assert row["loss"] > 0
        assert row["response_length"] is None or 1 <= row["response_length"] <= 10


def test_teacher_equal_to_student_leaves_nothing_to_learn(toys: Toys) -> None:
    loop = Loop(toys.plan({**SWITCH, "gate": {"type": "constant", "value": 0.0001}}, {"teacher": "twin"}), ALONE)
    row = loop.step()
    assert row["loss_on_policy"] == pytest.approx(0, abs=1e-6)
    assert row["loss_off_policy"] == pytest.approx(0, abs=1e-6)
    assert row["intervention_rate"] == 0.0


def test_cap_on_teacher_tokens_holds_and_is_recorded(toys: Toys) -> None:
    loop = Loop(toys.plan({**SWITCH, "on_policy_share": 1.0}, {"online_teacher_tokens": 95}), ALONE)
    rows = [loop.step() for _ in range(3)]
    assert 95 - 10 < loop.state.teacher_tokens <= 95
    assert loop.state.capped == loop.state.rows_drawn == 24 - loop.state.prompts_drawn
    assert rows[-1]["teacher_tokens"] == 0
    assert rows[-1]["loss_off_policy"] > 0
    assert rows[-1]["loss_on_policy"] is None


def test_rollouts_ahead_are_the_same_rollouts_of_an_older_student(toys: Toys, monkeypatch: Any) -> None:
    # A student that hardly moves writes the same, whenever it is asked.
    still = {"learning_rate": 1e-12, "steps": 5}
    loops = [Loop(toys.plan(SWITCH, rollouts_ahead=ahead, **still), ALONE) for ahead in (0, 2)]
    asked: list[int] = []
    write = loops[1].method.rollout
    monkeypatch.setattr(loops[1].method, "rollout", lambda *args: asked.append(len(args[1])) or write(*args))
    rows = [[loop.step() for _ in range(5)] for loop in loops]
    for strict, ahead in zip(*rows, strict=True):
        for name in ("loss", "tokens", "intervention_rate", "response_length", "eos_rate", "teacher_tokens"):
            assert ahead[name] == pytest.approx(strict[name], rel=1e-4), name
    # Not the forwards: a row that ended is drafted on beside rows that did not.
    assert loops[0].state.positions[:4] == loops[1].state.positions[:4]
    # Three steps are rolled out together, then the two that are left.
    assert len(asked) == 2
    assert sum(asked) == loops[0].state.prompts_drawn


@pytest.mark.parametrize("ahead", [0, 2])
def test_slots_bound_the_rows_at_once_and_change_nothing(toys: Toys, ahead: int) -> None:
    still = {"learning_rate": 1e-12, "steps": 3, "rollouts_ahead": ahead}
    method = {**SWITCH, "on_policy_share": 1.0}
    loops = [Loop(toys.plan({**method, "slots": slots}, **still), ALONE) for slots in (None, 3)]
    seen: list[list[int]] = [[], []]
    for loop, rows in zip(loops, seen, strict=True):
        loop.method.teacher.register_forward_pre_hook(
            lambda model, args, given, rows=rows: rows.append(len(given["input_ids"])), with_kwargs=True
        )
    for _ in range(3):
        one, other = (loop.step() for loop in loops)
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["tokens"] == other["tokens"]
    assert loops[0].state.positions[:4] == loops[1].state.positions[:4]
    assert [max(rows) for rows in seen] == [8 * (ahead + 1), 3]


def test_rollouts_ahead_keep_the_cap(toys: Toys) -> None:
    settings = {"online_teacher_tokens": 95}
    loop = Loop(toys.plan({**SWITCH, "on_policy_share": 1.0}, settings, rollouts_ahead=3), ALONE)
    for _ in range(4):
        loop.step()
    assert 0 < loop.state.teacher_tokens <= 95
    assert loop.state.capped == loop.state.rows_drawn == 32 - loop.state.prompts_drawn


@pytest.mark.parametrize(
    ("method", "ahead"),
    [*((method, 0) for method in METHODS), (SWITCH, 1)],
    ids=lambda value: value["type"] if isinstance(value, dict) else str(value),
)
@pytest.mark.parametrize("resumed_after", [2, 4])
def test_resumed_run_is_bitwise_the_uninterrupted_one(
    toys: Toys, tmp_path: Path, method: dict[str, Any], ahead: int, resumed_after: int
) -> None:
    plan = toys.plan(method, steps=7, rollouts_ahead=ahead)
    _, whole = run_all(plan, tmp_path / "whole")
    assert [folder.name for folder in whole] == ["step-2", "step-4", "step-6", "step-7"]
    done = resumed_after // 2
    _, resumed = run_all(plan, tmp_path / "resumed", whole[done - 1])
    assert [folder.name for folder in resumed] == [folder.name for folder in whole[done:]]
    for left, right in zip(whole[done:], resumed, strict=True):
        for file in sorted(path.relative_to(left) for path in left.rglob("*.safetensors")):
            assert (left / file).read_bytes() == (right / file).read_bytes(), file
        curves = [pq.read_table(folder / "steps.parquet") for folder in (left, right)]
        timeless = [name for name in curves[0].column_names if not name.endswith("seconds")]
        assert curves[0].select(timeless).equals(curves[1].select(timeless))
    assert pq.read_table(whole[-1] / "steps.parquet")["step"].to_pylist() == list(range(1, 8))
    assert start(plan, ALONE, whole[-1]) is None


def test_resumed_amid_rollouts_ahead_goes_on_with_the_same_draws(toys: Toys, tmp_path: Path, monkeypatch: Any) -> None:
    # Steps 1 to 3 are rolled out together, and the checkpoint of step 2 lies between: step 3 is rolled out anew, by the
    # student of step 2, which is younger than it might be. What is drawn, and with which noise, stays.
    plan = toys.plan(SWITCH, steps=7, rollouts_ahead=2)
    drawn: list[list[str]] = []
    fill = Feed._fill

    def watched(feed: Feed, *given: Any) -> None:
        fill(feed, *given)
        drawn.append([draw.name for load in feed.ready for draw in load.draws])

    monkeypatch.setattr(Feed, "_fill", watched)
    _, whole = run_all(plan, tmp_path / "whole")
    assert [len(names) for names in drawn] == [24, 24, 8]
    first, drawn[:] = [name for names in drawn for name in names], []
    loop, resumed = run_all(plan, tmp_path / "resumed", whole[0])
    assert [len(names) for names in drawn] == [8, 24, 8]
    assert [name for names in drawn for name in names] == first[16:]
    assert [folder.name for folder in resumed] == ["step-4", "step-6", "step-7"]
    assert [row["step"] for row in loop.state.steps] == list(range(1, 8))


def test_adapters_are_merged_into_a_plain_student(toys: Toys, tmp_path: Path) -> None:
    plan = toys.plan(lora={"rank": 4, "targets": ["q_proj", "v_proj"]}, learning_rate=5e-2, keep="last")
    loop, kept = run_all(plan, tmp_path)
    assert all("lora" in name for name in loop.student.trained())
    state = load_file(kept[0] / "weights.safetensors")
    assert state.keys() == loop.student.trained().keys()
    merged = load_file(kept[-1] / "student" / "model.safetensors")
    before = load_file(toys.store.root / "toys/student/model.safetensors")
    assert merged.keys() == before.keys()
    changed = {name for name in merged if (merged[name] != before[name]).any()}
    assert changed == {name for name in before if "q_proj" in name or "v_proj" in name}
    ids_BL = torch.tensor([[1, 5, 6, 7]])
    model = AutoModelForCausalLM.from_pretrained(kept[-1] / "student")
    loop.student.eval()
    torch.testing.assert_close(model(ids_BL).logits, loop.student.model(ids_BL).logits, rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_changes_nothing(toys: Toys) -> None:
    loops = [Loop(toys.plan(gradient_checkpointing=on), ALONE) for on in (False, True)]
    for loop in loops:
        loop.step()
    check_equal(weights(loops[0]), weights(loops[1]), rtol=1e-5, atol=1e-6)


def test_infinite_loss_stops_with_step_rows_and_last_checkpoint(toys: Toys, tmp_path: Path) -> None:
    plan = toys.plan(learning_rate=1e30, warmup_steps=0, validate_every=100)
    with pytest.raises(ValueError, match=r"step 2: loss nan, .* on row-\d+, row-\d+.*; last good checkpoint: step 0"):
        run_all(plan, tmp_path)


def test_kd_on_stored_distributions_learns_without_the_teacher(tmp_path: Path, monkeypatch: Any) -> None:
    store, rows, blobs = LocalStore(tmp_path), kept_rows(16), []
    models = {
        name: save_model(store, name, seed=7, spread=spread) for name, spread in (("student", 0.02), ("teacher", 0.2))
    }
    teacher = load_model(store.root / models["teacher"].path, "float32")
    for index in range(16):
        sequence = row_sequence(rows, index)
        with torch.no_grad():
            logits_LV = teacher(torch.cat([sequence.prompt, sequence.response])[None]).logits[0]
        logprobs_TV = logits_LV[len(sequence.prompt) - 1 : -1].log_softmax(-1)
        blobs.append(encode_top(logprobs_TV, mass=1.0, limit=255, min_prob=0.0, resolution=55))
    column = rows.column_names.index("distributions")
    inputs = commit_inputs(store, models, rows.set_column(column, "distributions", pa.array(blobs, pa.binary())))
    train = {"steps": 6, "learning_rate": 1e-2, "warmup_steps": 2, "validation_share": 0.0}
    live, stored = (
        plan_of(stage_of(store, inputs, {**train, "method": {"type": "kd", "annotated": source}}))
        for source in ("live", "stored")
    )
    first = Loop(live, ALONE).step()["loss"]
    monkeypatch.delattr("tasks.loop.load_teacher")
    loop = Loop(stored, ALONE)
    assert loop.method.teacher is None
    losses = [loop.step()["loss"] for _ in range(6)]
    assert losses[0] == pytest.approx(first, rel=0.02)
    assert losses[-1] < losses[0]


def test_no_rows_and_no_room_for_prompts_are_said(toys: Toys) -> None:
    with pytest.raises(ValueError, match=r"no prompts to roll out .*raise train.max_length"):
        Loop(toys.plan({**SWITCH, "max_new_tokens": 30}, max_length=31), ALONE)
    with pytest.raises(ValueError, match="no training rows of at most 16 tokens"):
        Loop(toys.plan(max_length=16, validation_share=0.999), ALONE)


def test_learning_rate_rises_and_falls(toys: Toys) -> None:
    plan = toys.plan(steps=10, warmup_steps=4, learning_rate=1.0, final_learning_rate_share=0.1)
    rates = [plan.learning_rate(step) for step in range(10)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[9] == pytest.approx(0.1)
    assert rates[4:] == sorted(rates[4:], reverse=True)


@pytest.fixture
def process_group(tmp_path: Path) -> Any:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("method", "student"),
    [*((method, "student") for method in METHODS[1:]), (SWITCH, "tied")],
    ids=lambda value: value["type"] if isinstance(value, dict) else value,
)
def test_sharded_student_learns_the_same(
    toys: Toys, tmp_path: Path, process_group: None, method: dict[str, Any], student: str
) -> None:
    plan = toys.plan(method, {"student": student}, micro_batch=4)
    plain, sharded = (Loop(plan.model_copy(update={"sharded": shard}), ALONE) for shard in (False, True))
    assert any("lm_head" in name for name in sharded.student.trained()) == (student != "tied")
    for loop in (plain, sharded):
        loop.state.start_loss = loop.validate()
        loop.step()
        loop.keep_best(loop.validate())
    assert sharded.state.start_loss == pytest.approx(plain.state.start_loss, rel=1e-6)
    check_equal(gradients(sharded), gradients(plain), rtol=1e-4, atol=1e-8)
    # A checkpoint of shards is whole, and goes back into shards.
    save(tmp_path, sharded.state, sharded.student, sharded.optimizer)
    again = Loop(sharded.plan, ALONE)
    again.state = load(tmp_path, again.student, again.optimizer)
    sharded.step(), again.step()
    check_equal(weights(again), weights(sharded))
