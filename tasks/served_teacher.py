"""The teacher of a training served by vLLM engines, on nodes of their own: workers hold its projection only.

Its engines (`infra/trunk.py`) give hidden states, 2 bytes times its width a position, and the worker makes
distributions of them: all methods read the teacher as they read one that is here. A rollout is scored block by block;
the engine's prefix cache holds what came before. Which engine answers decides nothing but the rounding.

Shapes: B rows, Q tokens fed per row, L padded length, K positions asked for, D the teacher's width, V vocabulary.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from infra.models import local_folder
from infra.store import open_store
from kernels.rollout import Forwards
from tasks.plan import Plan
from tasks.student import World

# How long a worker waits for an engine that starts, or starts again.
START_SECONDS = 1800.0


class Served(nn.Module):
    """Stands where a causal language model stands: its projection is here, what lies before it is asked for."""

    def __init__(self, config: Any, projection: nn.Linear, actor: Any, seconds: float) -> None:
        super().__init__()
        self.config, self.projection, self.actor, self.seconds = config, projection, actor, seconds
        self.requires_grad_(False).eval()

    @property
    def device(self) -> torch.device:
        return self.projection.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.projection.weight.dtype

    def get_output_embeddings(self) -> nn.Linear:
        return self.projection

    def ask(self, sequences: list[list[int]], last: list[int]) -> Tensor:
        """What the projection sees at so many last positions of each sequence [K, D]; waits for an engine that starts
        again. RayActorError where none will: its room ended, and the stage is begun again."""
        import ray
        from ray.exceptions import ActorUnavailableError, GetTimeoutError

        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                found_KD: Tensor = ray.get(self.actor.hidden.remote(sequences, last), timeout=self.seconds)
                return found_KD.to(self.device, self.dtype)
            except (ActorUnavailableError, GetTimeoutError) as error:
                # Ray starts an engine that died again; asked anew, it answers the same.
                if isinstance(error, GetTimeoutError):
                    ray.kill(self.actor, no_restart=False)
                if time.monotonic() > deadline:
                    raise
                time.sleep(1.0)

    def base_model(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        """All positions' hidden states [B, L, D], as of a transformers model without its projection."""
        assert not use_cache, "the cache is the engine's"
        rows, length = input_ids.shape
        hidden_KD = self.ask(input_ids.tolist(), [length] * rows)
        return SimpleNamespace(last_hidden_state=hidden_KD.unflatten(0, (rows, length)))

    def project(self, hidden_BQD: Tensor) -> Tensor:
        """Logits [B, Q, V]."""
        logits_BQV = self.projection(hidden_BQD)
        softcap = getattr(self.config, "final_logit_softcapping", None)
        return logits_BQV if softcap is None else softcap * (logits_BQV / softcap).tanh()

    def forward(self, input_ids: Tensor) -> Any:
        """All positions' ``logits`` [B, L, V]."""
        return SimpleNamespace(logits=self.project(self.base_model(input_ids).last_hidden_state))

    def rows_of(self, rows: int, _: int) -> "ServedRows":
        """Rows for the decoder in blocks (`kernels/rows.py`)."""
        return ServedRows(self, rows)


class ServedRows:
    """Rows whose tokens are kept here and whose keys and values are the engine's."""

    def __init__(self, teacher: Served, rows: int) -> None:
        self.teacher, self.forwards, self.seconds = teacher, Forwards(), 0.0
        self.ids: list[list[int]] = [[] for _ in range(rows)]

    def prefill(self, prompts: Sequence[Tensor], rows: Sequence[int]) -> None:
        """The engine reads them with the first block."""
        for prompt, row in zip(prompts, rows, strict=True):
            self.ids[row] = prompt.tolist()
            self.forwards.prompt_positions += len(prompt)

    def extend(self, ids_BQ: Tensor, start_B: Tensor, last_B: Tensor, longest: int) -> Tensor:
        began, counts = time.perf_counter(), []
        given = zip(self.ids, ids_BQ.tolist(), start_B.tolist(), last_B.tolist(), strict=False)
        for ids, fed, start, last in given:
            # Positions past a row's last one are of no interest.
            ids[start:] = fed[: last + 1 - start]
            counts.append(len(ids) - start)
        hidden_KD = self.teacher.ask(self.ids[: len(counts)], counts)
        hidden_BQD = nn.utils.rnn.pad_sequence(list(hidden_KD.split(counts)), batch_first=True)
        short = ids_BQ.shape[1] - hidden_BQD.shape[1]
        logits_BQV = self.teacher.project(nn.functional.pad(hidden_BQD, (0, 0, 0, short)))
        self.seconds = time.perf_counter() - began
        return logits_BQV

    def move(self, source: int, target: int) -> None:
        self.ids[target] = list(self.ids[source])


def served_teacher(plan: Plan, world: World) -> Served:
    """The plan's teacher, its engines started where they are not yet. Every worker asks one of them. ValueError where
    they read less than training has, or the projection is none of ours."""
    import ray

    from infra.engine import EngineSpec
    from infra.engine_room import ROOM

    assert plan.teacher
    assert plan.served
    spec = EngineSpec.model_validate(plan.served.engine)
    if spec.max_model_len < plan.train.max_length:
        raise ValueError(
            f"engines.teacher.max_model_len: {spec.max_model_len}, but it is to read {plan.train.max_length} tokens: "
            "raise it, or lower train.max_length"
        )
    names = ray.get(ray.get_actor(ROOM, namespace=plan.served.namespace).acquire.remote(spec.model_dump()))
    actor = ray.get_actor(names[world.rank % len(names)], namespace=plan.served.namespace)
    ray.get(actor.ready.remote(), timeout=START_SECONDS)
    folder = local_folder(open_store(plan.root), plan.teacher)
    config, projection = projection_of(folder, getattr(torch, plan.dtype))
    return Served(config, projection.to(world.device), actor, spec.deadline_seconds)


def projection_of(folder: Path, dtype: torch.dtype) -> tuple[Any, nn.Linear]:
    """A model's configuration and its projection, nothing else of it read. ValueError where it is none."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with torch.device("meta"):
        shape = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    found, tensors = shape.get_output_embeddings(), {}
    if type(found) is not nn.Linear:
        raise ValueError("teacher: its output projection is not a plain linear layer: set placement.teacher to whole")
    places = {module: name for name, module in shape.named_modules()}
    head, embedding = places[found], places[shape.get_input_embeddings()]
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names = {f"{head}.weight", f"{head}.bias", f"{embedding}.weight"} & set(file.keys())
            tensors.update({name: file.get_tensor(name) for name in names})
    # A tied projection is stored once, as the embedding.
    weight, bias = tensors.get(f"{head}.weight", tensors.get(f"{embedding}.weight")), tensors.get(f"{head}.bias")
    if weight is None:
        raise ValueError(f"teacher: its files hold no {head}.weight: set placement.teacher to whole")
    projection = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    projection.load_state_dict({"weight": weight, **({} if bias is None else {"bias": bias})}, assign=True)
    return config.get_text_config(), projection.to(dtype)
