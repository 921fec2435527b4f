"""A model without its projection, served by vLLM as a Ray actor: token ids in, hidden states out.

A position's distribution is as wide as the vocabulary; what the projection makes it from is as wide as the model. So
who holds the projection gets a full distribution for some kilobytes a token. It is vLLM's token-wise pooling, asked to
read its prefix cache: a sequence that grew since it was asked about last costs its new positions only.

Shapes: K positions asked for, over all sequences, D the model's width.
"""

from typing import TYPE_CHECKING, Any, ClassVar

from infra.engine import Engine

if TYPE_CHECKING:
    from torch import Tensor


class Trunk(Engine):
    """The actor; it serves the weights of its spec."""

    OWN: ClassVar[dict[str, Any]] = {
        "runner": "pooling",
        "convert": "embed",
        "pooler_config": {"task": "token_embed"},
        "enable_prefix_caching": True,
    }

    def hidden(self, sequences: list[list[int]], last: list[int]) -> "Tensor":
        """What the projection sees at so many last positions of each sequence of token ids [K, D], in the order of the
        sequences, as the engine's dtype."""
        import torch

        found = self._read(sequences, cached=True)
        # The cache is read by pages; what lies in one already has no states to give.
        short = [number for number, states_ND in enumerate(found) if len(states_ND) < last[number]]
        if short:
            for number, states_ND in zip(short, self._read([sequences[n] for n in short], cached=False), strict=True):
                found[number] = states_ND
        states_KD = torch.cat([states_ND[-count:] for states_ND, count in zip(found, last, strict=True)])
        return states_KD.to(self.llm.model_config.dtype)

    def _read(self, sequences: list[list[int]], cached: bool) -> list["Tensor"]:
        """Of each sequence the states that were not cached; all of them without the cache."""
        from vllm import PoolingParams

        parameters = PoolingParams(task="token_embed", use_activation=False, skip_reading_prefix_cache=not cached)
        prompts: list[Any] = [{"prompt_token_ids": ids} for ids in sequences]
        outputs = self.llm.encode(prompts, parameters, pooling_task="token_embed", use_tqdm=False)
        return [output.outputs.data for output in outputs]
