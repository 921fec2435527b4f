"""A teacher that reads: its full distributions over given responses, in torch, compressed.

Engines return the best tokens of a position cheaply and everything else dearly, so unbiased distributions
(``kernels/codec.py``, sampled mode) are read from the model itself, once the engines have written.

Shape legend: T response tokens, V vocabulary.
"""

import os
from typing import Any

import ray

from infra.models import ModelRef, load_model, local_folder
from infra.store import open_store
from tasks.config.signals import SampledTokens

# Responses read at once.
BATCH = 8


class Reader:
    """The model, in a process of its own."""

    def __init__(self, root: str, model: dict[str, Any], gpu: bool, all_threads: bool = False) -> None:
        import torch

        from tasks.student import check_projection

        if all_threads:
            torch.set_num_threads(os.cpu_count() or 1)
        self.device = torch.device("cuda" if gpu else "cpu")
        folder = local_folder(open_store(root), ModelRef.model_validate(model))
        self.model = load_model(folder, "bfloat16" if gpu else "float32").to(self.device)
        check_projection(self.model, "teacher")

    def encode(
        self, prompts: list[list[int]], responses: list[list[int]], seeds: list[int], settings: dict[str, Any]
    ) -> list[bytes]:
        """One value of the column for each response (token ids); a seed draws the same tail again."""
        import torch

        from kernels.codec import encode_sampled
        from tasks.batches import Sequence, collate
        from tasks.student import head_of, hidden_states

        chosen, head = SampledTokens.model_validate(settings), head_of(self.model)
        found = []
        for start in range(0, len(responses), BATCH):
            part = slice(start, start + BATCH)
            rows = [
                Sequence("", torch.tensor(prompt), torch.tensor(response))
                for prompt, response in zip(prompts[part], responses[part], strict=True)
            ]
            batch = collate(rows, self.device)
            with torch.no_grad():
                hidden_NH = hidden_states(self.model, batch.ids_BL).flatten(0, 1)[batch.where_N]
            for hidden_TH, seed in zip(hidden_NH.split([len(row.response) for row in rows]), seeds[part], strict=True):
                with torch.no_grad():
                    logits_TV = (hidden_TH @ head.weight_VH.T).float()
                    logits_TV = logits_TV if head.bias_V is None else logits_TV + head.bias_V.float()
                    if head.softcap is not None:
                        logits_TV = head.softcap * (logits_TV / head.softcap).tanh()
                generator = torch.Generator().manual_seed(seed)
                logprobs_TV = logits_TV.log_softmax(-1)
                found.append(encode_sampled(logprobs_TV, generator, grain=chosen.grain, resolution=chosen.resolution))
        return found


def start_reader(root: str, model: ModelRef, gpu: bool) -> Any:
    """The actor. On GPUs it needs one that no engine holds."""
    options: dict[str, Any] = {"num_cpus": 0, "num_gpus": 1} if gpu else {"num_cpus": 0}
    # Ray gives an actor without CPUs one thread.
    return ray.remote(Reader).options(**options).remote(root, model.model_dump(), gpu, all_threads=True)
