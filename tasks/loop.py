"""The training loop of one worker, the same for both stages: draw, roll out, minimise, validate, save.

``tasks/train.py`` starts it on every worker through Ray Train. The loss of a step is the mean over the response tokens
of the global batch: the token count is summed over workers first, every micro-batch adds its part of the sum, and
gradients are summed. A row's weight multiplies its tokens' losses and their count.

Shape legend: N response positions of a micro-batch, T response positions of a rollout.
"""

import logging
import math
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from infra.memory import keep_freed_memory
from infra.models import local_folder
from infra.store import open_store
from kernels.noise import sequence_key
from tasks.batches import Batch, Sequence, collate, micro_batches, row_lengths, row_sequence
from tasks.catalogue import feed_of, method_of
from tasks.checkpoint import Best, State, load, load_state, save, save_state
from tasks.methods import with_soft_labels
from tasks.parity import check
from tasks.plan import Plan
from tasks.resume import newest, seal, storage
from tasks.served_teacher import served_teacher
from tasks.student import Head, Loss, Objective, Student, World, export, full
from tasks.teacher import Lockstep, load_teacher


class Loop:
    """A worker's models, data and state. Every worker calls the same methods in the same order: all are collective."""

    def __init__(self, plan: Plan, world: World) -> None:
        self.plan, self.world, self.config = plan, world, plan.train
        store = open_store(plan.root)
        self.origin = local_folder(store, plan.student)
        self.student = Student(self.origin, plan.train, world, seed=plan.seed, sharded=plan.sharded, fsdp=plan.fsdp)
        teacher, vocabulary = None, plan.student.vocab_size
        if plan.teacher and plan.loads_teacher:
            if plan.teacher_place == "served":
                teacher = served_teacher(plan, world)
            else:
                folder = local_folder(store, plan.teacher)
                teacher = load_teacher(folder, plan.dtype, world, sharded=plan.teacher_place == "sharded")
        if plan.teacher:
            vocabulary = min(vocabulary, plan.teacher.vocab_size)
        self.method = method_of(self.config.method, teacher, vocabulary)
        if teacher is not None and plan.teacher_place == "sharded":
            self.method.together = Lockstep(teacher, world)
        self.loss: Callable[..., Loss] = self.method.loss
        if plan.soft_rows:
            self.loss = with_soft_labels(self.method.loss, plan.soft_share, plan.student.vocab_size)
        self.feed = feed_of(plan, self.method)
        self.optimizer = torch.optim.AdamW(
            self.student.trained().values(), betas=self.config.betas, weight_decay=self.config.weight_decay
        )
        self.state = State(positions=[[0] * self.method.max_new_tokens for _ in range(8)])
        self.saved_at = 0

    def step(self) -> dict[str, Any]:
        """One optimiser step; its row of the curve. ValueError where something is not finite, before weights change."""
        state, world, started = self.state, self.world, time.monotonic()
        # Dropout, where a model has any, depends on the step and the worker alone.
        torch.manual_seed(sequence_key(self.plan.seed, "dropout", state.step, world.rank))
        try:
            load = self.feed.load(state, self.student)
        except ValueError as error:
            names = ", ".join(draw.name for draw in self.feed.asked)
            raise ValueError(self._where(state.step + 1, f"{error} on {names}")) from error
        rollout_seconds = time.monotonic() - started

        counts = world.sum(self.feed.counts(load))
        on_weight, off_weight, tokens, pooled, rollouts, rollout_tokens, ended = counts[:7].tolist()
        weight = on_weight + off_weight
        try:
            sums = self._gradients(load.sequences, weight)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            size, rows = self.config.micro_batch, ", ".join(draw.name for draw in load.draws)
            raise MemoryError(f"step {state.step + 1}: out of memory at train.micro_batch {size} on {rows}") from error
        self.student.sum_gradients()
        norm = full(torch.nn.utils.clip_grad_norm_(self.student.trained().values(), self.config.clip_norm)).item()
        loss_on, loss_off = world.sum(sums).tolist()
        loss = (loss_on + loss_off) / weight if weight else 0.0
        if not math.isfinite(loss + norm):
            rows = ", ".join(draw.name for draw in load.draws)
            raise ValueError(self._where(state.step + 1, f"loss {loss}, gradient norm {norm} on {rows}"))
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.learning_rate(state.step)
        self.optimizer.step()
        self.optimizer.zero_grad()

        positions_8T = counts[7:].long().view(8, self.method.max_new_tokens)
        state.positions = (torch.tensor(state.positions) + positions_8T).tolist()
        state.teacher_tokens += int(rollout_tokens)
        state.step += 1
        seconds = time.monotonic() - started
        state.spend("rollout", rollout_seconds)
        state.spend("forward_backward", seconds - rollout_seconds)
        row = {
            "step": state.step,
            "loss": loss,
            "loss_on_policy": loss_on / on_weight if on_weight else None,
            "loss_off_policy": loss_off / off_weight if off_weight else None,
            "validation_loss": None,
            "learning_rate": self.plan.learning_rate(state.step - 1),
            "gradient_norm": norm,
            "tokens": int(tokens),
            "seconds": seconds,
            "rollout_seconds": rollout_seconds,
            "intervention_rate": int(positions_8T[1].sum()) / rollout_tokens if rollouts else None,
            "response_length": rollout_tokens / rollouts if rollouts else None,
            "eos_rate": ended / rollouts if rollouts else None,
            "teacher_tokens": int(rollout_tokens),
            "rollouts": int(rollouts),
            "pooled": int(pooled),
            "phi": self.feed.phi(state),
        }
        state.steps.append(row)
        return row

    def _gradients(self, sequences: list[Sequence], total_weight: float) -> Tensor:
        """Accumulate this worker's gradients; its weighted sums of losses, on and off policy."""
        self.student.train()
        sums = torch.zeros(2, dtype=torch.float64)
        for chosen in self._parts([len(sequence) for sequence in sequences], self.config.batch_size):
            part = [sequences[i] for i in chosen]
            batch = collate(part, self.world.device)
            weights_N = batch.weights_N.clone()
            batch.weights_N.div_(total_weight or 1.0)
            loss, losses_N = self.student(batch, self._together(partial(self.loss, sequences=part)))
            self.student.backward(loss)
            weighted_N = losses_N.double() * weights_N
            sums += torch.stack([weighted_N[batch.on_policy_N].sum(), weighted_N[~batch.on_policy_N].sum()]).cpu()
        return sums

    def _together(self, objective: Objective) -> Objective:
        """The objective, at whose end no worker has anything more to ask the teacher."""

        def joined(hidden_NH: Tensor, head: Head, batch: Batch) -> tuple[Tensor, ...]:
            with self.method.together():
                return objective(hidden_NH, head, batch)

        return joined

    def _parts(self, lengths: list[int] | np.ndarray, of_all: int) -> Iterator[list[int]]:
        """Which of this worker's sequences make its micro-batches: as many on every worker, for ``of_all`` over all."""
        count = math.ceil(math.ceil(of_all / self.world.size) / self.config.micro_batch)
        return micro_batches(lengths, self.config.micro_batch, count)

    @torch.no_grad()
    def validate(self) -> float | None:
        """The method's own loss per response token of the validation rows, in nats; None where there are none."""
        table, started = self.feed.data.validation, time.monotonic()
        if not table.num_rows:
            return None
        self.student.eval()
        rank, workers = self.world.rank, self.world.size
        rows = []
        for chosen in self._parts(row_lengths(table)[rank::workers], table.num_rows):
            part = [row_sequence(table, rank + workers * i) for i in chosen]
            objective = self._together(partial(self.method.validate, sequences=part))
            losses = self.student(collate(part, self.world.device), objective)
            rows.append([*(losses_N.double().sum().item() for losses_N in losses), len(losses[0])])
        self.student.release()
        *sums, tokens = self.world.sum(torch.tensor(rows, dtype=torch.float64).sum(0)).tolist()
        self.state.spend("validation", time.monotonic() - started)
        if not math.isfinite(sums[0]):
            raise ValueError(self._where(self.state.step, f"validation loss {sums[0]}"))
        means = [total / tokens for total in sums]
        self.feed.validated(self.state, means)
        return means[0]

    def keep_best(self, loss: float | None) -> None:
        """Remember the current weights if they validate best so far."""
        if loss is not None and not (self.state.best and loss >= self.state.best.loss):
            self.state.best = Best(self.state.step, loss, self._weights() if self.config.keep == "best" else {})

    def _weights(self) -> dict[str, Tensor]:
        """A copy of what learns, on the first worker."""
        whole = {name: full(parameter) for name, parameter in self.student.trained().items()}
        return {name: tensor.clone() for name, tensor in whole.items()} if self.world.rank == 0 else {}

    def finish(self, folder: Path) -> None:
        """Write the last checkpoint: the finished student, the curve and the counters."""
        state = self.state
        chosen = state.best.weights if state.best and self.config.keep == "best" else self._weights()
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if self.plan.device == "cuda":
            used = torch.cuda.max_memory_allocated()
        state.peak_bytes = int(self.world.max(used))
        state.data, state.finished = self.feed.sizes(), True
        if self.world.rank == 0:
            template = self.plan.student.chat_template
            export(self.origin, chosen, self.config.lora, self.plan.dtype, folder / "student", template)
            save_state(folder, state)

    def _where(self, step: int, what: str) -> str:
        return (
            f"step {step}: {what}; last good checkpoint: step {self.saved_at}; lower train.learning_rate, or look at "
            "these rows"
        )


def out_of_memory(error: RuntimeError) -> bool:
    """Whether torch's allocator, on a GPU or on CPU, had nothing left to give."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def start(plan: Plan, world: World, resume: Path | None) -> Loop | None:
    """The loop before its next step, continued from a checkpoint's folder if there is one; None if that one is done."""
    if resume and load_state(resume).finished:
        return None
    loop = Loop(plan, world)
    if resume:
        loop.state = load(resume, loop.student, loop.optimizer)
        loop.saved_at = loop.state.step
    else:
        loop.state.parity = check(plan, loop.method.teacher, loop.student)
        loop.state.start_loss = loop.validate()
    return loop


def proceed(loop: Loop, report: Callable[[Path, int], None], show: Callable[[dict[str, Any]], None]) -> None:
    """All remaining steps. ``report`` keeps a folder as the checkpoint of a step, ``show`` is given each step's row.

    The last checkpoint holds the finished student. Every worker reports the same steps.
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


def memory_of(device: torch.device, workers: int) -> float:
    """Bytes: of the GPU, or an equal part of the machine's for each of its workers."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return float(psutil.virtual_memory().total) / workers


def train(config: dict[str, Any]) -> None:
    """What Ray Train runs on every worker: ``config`` has the ``plan``, the ``relay``, which takes rows, and the
    folder of ``checkpoints`` in the store."""
    import ray.train
    import ray.train.torch

    plan, context = Plan.model_validate(config["plan"]), ray.train.get_context()
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    if plan.device == "cpu":
        keep_freed_memory()
    torch.set_num_threads(plan.threads or max(1, (os.cpu_count() or 1) // context.get_local_world_size()))
    world = World(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())
    plan = plan.placed(world.size, -world.max(-memory_of(world.device, context.get_local_world_size())))

    def report(folder: Path, step: int) -> None:
        if world.rank == 0:
            seal(folder, step)
        checkpoint = ray.train.Checkpoint.from_directory(folder) if world.rank == 0 else None
        ray.train.report({"step": step}, checkpoint=checkpoint)

    def show(row: dict[str, Any]) -> None:
        if world.rank == 0:
            config["relay"].put.remote(row)

    with newest(*storage(open_store(plan.root), config["checkpoints"])) as folder:
        loop = start(plan, world, folder)
    if loop:
        proceed(loop, report, show)
