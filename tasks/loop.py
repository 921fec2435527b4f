"""The training loop of one worker, the same for both stages: draw, roll out, minimise, validate, save.

``tasks/train.py`` starts it on every worker through Ray Train. The loss of a step is the mean over the response tokens of
the global batch: the token count is summed over workers first, every micro-batch adds its part of the sum, and gradients
are summed. A row's weight multiplies its tokens' losses and their count.

Shape legend: N response positions of a micro-batch, T response positions of a rollout.
"""

import math
import os
import resource
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from infra.manifest import load_manifest
from infra.models import ModelRef, load_model, local_folder
from infra.store import open_store
from kernels.noise import sequence_key
from kernels.rollout import Rollout, Stats
from tasks.batches import Order, Sequence, chance, collate, micro_batches, prompt_of, read_data, row_sequence
from tasks.checkpoint import Best, State, load, load_state, save, save_state
from tasks.config.train import TrainConfig
from tasks.methods import cross_entropy, method_of
from tasks.student import Student, World, check_projection, export, full


class Plan(BaseModel):
    """What every worker is told."""

    root: str
    rows: list[str]  # manifests with tables ``kept`` and ``charged``
    student: ModelRef
    teacher: ModelRef | None
    train: TrainConfig
    seed: int
    stage_name: str
    online_teacher_tokens: int | None = None
    threads: int = 0
    device: str = "cpu"
    sharded: bool = False  # FSDP2; without it every worker holds the whole student

    @property
    def dtype(self) -> str:
        """Of the teacher, and of the finished student."""
        return "bfloat16" if self.device == "cuda" and self.train.precision != "float32" else "float32"


@dataclass(frozen=True)
class Draw:
    """One sequence of a global batch: a kept row, or a prompt to continue."""

    on_policy: bool
    item: int
    visit: int


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of the step that follows ``step`` steps: a linear rise, then a cosine down to its end at the last."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    part = (step - config.warmup_steps) / max(1, config.steps - 1 - config.warmup_steps)
    low = config.final_learning_rate_share
    return config.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, part))))


class Loop:
    """A worker's models, data and state. Every worker calls the same methods in the same order."""

    def __init__(self, plan: Plan, world: World) -> None:
        self.plan, self.world, self.config = plan, world, plan.train
        store = open_store(plan.root)
        self.folder = local_folder(store, plan.student)
        self.student = Student(self.folder, plan.train, world, seed=plan.seed, sharded=plan.sharded)
        teacher, vocabulary = None, plan.student.vocab_size
        if plan.teacher:
            teacher = load_model(local_folder(store, plan.teacher), plan.dtype).to(world.device).requires_grad_(False)
            check_projection(teacher, "teacher")
            vocabulary = min(vocabulary, plan.teacher.vocab_size)
        self.method = method_of(self.config.method, teacher, vocabulary)
        self.data = read_data(
            store,
            [load_manifest(store, path) for path in plan.rows],
            seed=plan.seed,
            validation_share=self.config.validation_share,
            max_length=self.config.max_length,
            max_new_tokens=self.method.max_new_tokens,
        )
        if not self.data.rows.num_rows:
            raise ValueError(
                f"no training rows of at most {self.config.max_length} tokens (left out: {self.data.left_out}): raise "
                f"train.max_length, lower train.validation_share, or keep more annotations"
            )
        if self.method.on_policy_share and not self.data.prompts.num_rows:
            raise ValueError(
                f"no prompts to roll out (left out: {self.data.left_out}): raise train.max_length, or lower "
                f"train.method.max_new_tokens"
            )
        self.rows = Order(self.data.rows.num_rows, plan.seed, f"{plan.stage_name} rows")
        self.prompts = Order(self.data.prompts.num_rows, plan.seed, f"{plan.stage_name} prompts")
        self.optimizer = torch.optim.AdamW(
            self.student.trained().values(), betas=self.config.betas, weight_decay=self.config.weight_decay
        )
        self.state = State(positions=[[0] * self.method.max_new_tokens for _ in range(4)])
        self.saved_at = 0

    def draw(self) -> list[Draw]:
        """The global batch of the coming step, the same on every worker: by the seed, the step and the cursor."""
        state, room = self.state, self.config.batch_size
        if self.plan.online_teacher_tokens is not None:
            # A rollout is allowed while even the longest fits under the cap.
            left = self.plan.online_teacher_tokens - state.teacher_tokens
            room = max(0, left // max(1, self.method.max_new_tokens))
        draws = []
        for slot in range(self.config.batch_size):
            wanted = chance(self.plan.seed, self.plan.stage_name, state.step, slot) < self.method.on_policy_share
            if wanted and room:
                room -= 1
                draws.append(Draw(True, *self.prompts.at(state.prompts_drawn)))
                state.prompts_drawn += 1
            else:
                state.capped += wanted
                draws.append(Draw(False, *self.rows.at(state.rows_drawn)))
                state.rows_drawn += 1
        return draws

    def roll_out(self, draws: list[Draw]) -> tuple[list[Sequence], Rollout | None]:
        """The drawn prompts continued by the current student. Collective under FSDP, also without prompts."""
        named = [prompt_of(self.data.prompts, draw.item) for draw in draws]
        keys = [
            sequence_key(self.plan.seed, self.plan.stage_name, name, draw.visit)
            for (name, _), draw in zip(named, draws, strict=True)
        ]
        with self.student.whole() as model:
            if not draws:
                return [], None
            rollout = self.method.rollout(model, [prompt for _, prompt in named], keys, self.plan.student.eos_token_ids)
        assert rollout.teacher_hidden is not None
        return [
            Sequence(name, prompt, tokens.cpu(), on_policy=True, teacher_hidden_TG=hidden_TG)
            for (name, prompt), tokens, hidden_TG in zip(named, rollout.tokens, rollout.teacher_hidden, strict=True)
        ], rollout

    def step(self) -> dict[str, Any]:
        """One optimiser step; its row of the curve. ValueError where the loss is not finite, before weights change."""
        state, config, world = self.state, self.config, self.world
        started = time.monotonic()
        rate = learning_rate(config, state.step)
        # Dropout, where a model has any, depends on the step and the worker alone.
        torch.manual_seed(sequence_key(self.plan.seed, "dropout", state.step, world.rank))
        draws = self.draw()
        # Workers take turns, rollouts first: each gets its share of the slow ones.
        mine = sorted(draws, key=lambda draw: not draw.on_policy)[world.rank :: world.size]
        rollout_started = time.monotonic()
        rolled, rollout = [], None
        if self.method.on_policy_share:
            rolled, rollout = self.roll_out([draw for draw in mine if draw.on_policy])
        sequences = rolled + [row_sequence(self.data.rows, draw.item) for draw in mine if not draw.on_policy]
        rollout_seconds = time.monotonic() - rollout_started

        counts = world.sum(self._counts(sequences, rollout))
        on_weight, off_weight, tokens, rollouts, rollout_tokens, ended = counts[:6].tolist()
        losses = self._gradients(sequences, on_weight + off_weight)
        self.student.sum_gradients()
        gradient_norm = torch.nn.utils.clip_grad_norm_(self.student.trained().values(), config.clip_norm)
        norm = full(gradient_norm).item()
        loss_on, loss_off = world.sum(losses).tolist()
        if not math.isfinite(loss_on + loss_off + norm):
            raise ValueError(self._explain(draws, loss_on + loss_off, norm))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()

        step_positions = counts[6:].view(4, self.method.max_new_tokens)
        state.positions = (torch.tensor(state.positions) + step_positions.long()).tolist()
        state.teacher_tokens += int(rollout_tokens)
        state.step += 1
        seconds = time.monotonic() - started
        state.spend("rollout", rollout_seconds)
        state.spend("forward_backward", seconds - rollout_seconds)
        total = on_weight + off_weight
        row = {
            "step": state.step,
            "loss": (loss_on + loss_off) / total if total else 0.0,
            "loss_on_policy": loss_on / on_weight if on_weight else None,
            "loss_off_policy": loss_off / off_weight if off_weight else None,
            "validation_loss": None,
            "learning_rate": rate,
            "gradient_norm": norm,
            "tokens": int(tokens),
            "seconds": seconds,
            "rollout_seconds": rollout_seconds,
            "intervention_rate": float(step_positions[1].sum()) / rollout_tokens if rollouts else None,
            "response_length": rollout_tokens / rollouts if rollouts else None,
            "eos_rate": ended / rollouts if rollouts else None,
            "teacher_tokens": int(rollout_tokens),
        }
        state.steps.append(row)
        return row

    def _counts(self, sequences: list[Sequence], rollout: Rollout | None) -> Tensor:
        """Weighted tokens on and off policy, tokens, rollouts, their tokens, how many ended themselves; then by position
        emitted, interventions, agreeing and cuts."""
        on = [sequence for sequence in sequences if sequence.on_policy]
        off = [sequence for sequence in sequences if not sequence.on_policy]
        eos = set(self.plan.student.eos_token_ids)
        scalars = [
            sum(sequence.weight * len(sequence.response) for sequence in on),
            sum(sequence.weight * len(sequence.response) for sequence in off),
            sum(len(sequence.response) for sequence in sequences),
            len(on),
            sum(len(sequence.response) for sequence in on),
            sum(int(sequence.response[-1]) in eos for sequence in on),
        ]
        positions_4T = torch.zeros(4, self.method.max_new_tokens, dtype=torch.float64)
        if rollout:
            stats: Stats = rollout.stats
            for row, counts_T in enumerate((stats.emitted_T, stats.interventions_T, stats.agreeing_T, stats.cuts_T)):
                positions_4T[row, : len(counts_T)] = counts_T
        return torch.cat([torch.tensor(scalars, dtype=torch.float64), positions_4T.flatten()])

    def _gradients(self, sequences: list[Sequence], total_weight: float) -> Tensor:
        """Accumulate this worker's gradients; its weighted sums of losses on and off policy."""
        self.student.train()
        sums = torch.zeros(2, dtype=torch.float64)
        for part in self._parts(sequences, self.config.batch_size):
            batch = collate(part, self.world.device)
            batch.weights_N.div_(total_weight or 1.0)
            loss, losses_N = self.student(batch, partial(self.method.loss, sequences=part))
            self.student.backward(loss)
            weighted_N = losses_N.double() * batch.weights_N * total_weight
            sums += torch.stack([weighted_N[batch.on_policy_N].sum(), weighted_N[~batch.on_policy_N].sum()]).cpu()
        return sums

    def _parts(self, sequences: list[Sequence], over_all: int) -> Any:
        """Micro-batches, as many on every worker, for ``over_all`` sequences of all workers."""
        count = math.ceil(math.ceil(over_all / self.world.size) / self.config.micro_batch)
        return micro_batches(sequences, self.config.micro_batch, count)

    @torch.no_grad()
    def validate(self) -> float | None:
        """Cross entropy per response token of the validation rows, in nats; None without such rows. Collective."""
        table, started = self.data.validation, time.monotonic()
        if not table.num_rows:
            return None
        self.student.eval()
        mine = [row_sequence(table, index) for index in range(self.world.rank, table.num_rows, self.world.size)]
        sums = torch.zeros(2, dtype=torch.float64)
        for part in self._parts(mine, table.num_rows):
            batch = collate(part, self.world.device)
            _, losses_N = self.student(batch, cross_entropy)
            sums += torch.stack([losses_N.double().sum().cpu(), torch.tensor(float(len(losses_N)))])
        self.student.reshard()
        loss, tokens = self.world.sum(sums).tolist()
        self.state.spend("validation", time.monotonic() - started)
        return loss / tokens

    def keep_best(self, loss: float | None) -> None:
        """Remember this step's weights if they validate best so far. Collective."""
        best = self.state.best
        if loss is None or (best and loss >= best.loss):
            return
        weights = self._weights() if self.config.keep == "best" else {}
        self.state.best = Best(self.state.step, loss, weights)

    def _weights(self) -> dict[str, Tensor]:
        """A copy of what learns, on the first worker. Collective."""
        whole = {name: full(parameter) for name, parameter in self.student.trained().items()}
        return {name: tensor.clone() for name, tensor in whole.items()} if self.world.rank == 0 else {}

    def finish(self, folder: Path) -> None:
        """The last checkpoint: the finished student, the curve and the counters. Collective."""
        state = self.state
        kept = state.best.weights if state.best and self.config.keep == "best" else None
        weights = self._weights() if kept is None else kept
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if self.plan.device == "cuda":
            used = torch.cuda.max_memory_allocated()
        state.peak_bytes = int(max(state.peak_bytes, self.world.max(used)))
        sizes = {"rows": self.data.rows, "validation_rows": self.data.validation, "prompts": self.data.prompts}
        state.data = {name: table.num_rows for name, table in sizes.items()} | self.data.left_out
        state.finished = True
        if self.world.rank == 0:
            export(self.folder, weights, self.config.lora, self.plan.dtype, folder / "student")
            save_state(folder, state)

    def _explain(self, draws: list[Draw], loss: float, norm: float) -> str:
        tables = {True: self.data.prompts["prompt_id"], False: self.data.rows["row_id"]}
        names = ", ".join(tables[draw.on_policy][draw.item].as_py() for draw in draws)
        return (
            f"step {self.state.step + 1}: loss {loss}, gradient norm {norm} on rows and prompts {names}; last good "
            f"checkpoint: step {self.saved_at}; lower train.learning_rate, or look at these rows"
        )


def start(plan: Plan, world: World, resume: Path | None) -> Loop | None:
    """The loop before its next step, continued from a checkpoint's folder if there is one; None if that one is done."""
    if resume and load_state(resume).finished:
        return None
    loop = Loop(plan, world)
    if resume:
        loop.state = load(resume, loop.student, loop.optimizer)
        loop.saved_at = loop.state.step
    else:
        loop.state.start_loss = loop.validate()
    return loop


def proceed(loop: Loop, report: Callable[[Path, int], None], show: Callable[[dict[str, Any]], None]) -> None:
    """All remaining steps. ``report`` keeps a folder as the checkpoint of a step, ``show`` is given each step's row.

    The last checkpoint holds the finished student. Collective: every worker reports the same steps.
    """
    state, config = loop.state, loop.config
    while state.step < config.steps:
        row = loop.step()
        last = state.step == config.steps
        if last or state.step % config.validate_every == 0:
            row["validation_loss"] = loop.validate()
            loop.keep_best(row["validation_loss"])
        show(row)
        if not last and state.step % config.checkpoint_every == 0:
            started = time.monotonic()
            with tempfile.TemporaryDirectory() as folder:
                save(Path(folder), state, loop.student, loop.optimizer)
                report(Path(folder), state.step)
            loop.saved_at = state.step
            state.spend("checkpoint", time.monotonic() - started)
    with tempfile.TemporaryDirectory() as folder:
        loop.finish(Path(folder))
        report(Path(folder), state.step)


def train(config: dict[str, Any]) -> None:
    """What Ray Train runs on every worker: ``config`` has the ``plan`` and the ``relay``, an actor that takes rows."""
    import ray.train
    import ray.train.torch

    plan, context = Plan.model_validate(config["plan"]), ray.train.get_context()
    torch.set_num_threads(plan.threads or max(1, (os.cpu_count() or 1) // context.get_local_world_size()))
    world = World(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())

    def report(folder: Path, step: int) -> None:
        checkpoint = ray.train.Checkpoint.from_directory(folder) if world.rank == 0 else None
        ray.train.report({"step": step}, checkpoint=checkpoint)

    def show(row: dict[str, Any]) -> None:
        if world.rank == 0:
            config["relay"].put.remote(row)

    checkpoint = ray.train.get_checkpoint()
    with checkpoint.as_directory() if checkpoint else nullcontext() as folder:
        loop = start(plan, world, Path(folder) if folder else None)
    if loop:
        proceed(loop, report, show)
