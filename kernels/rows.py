"""A key-value cache whose rows advance by different lengths, and a model that runs on it.

Each row owns a fixed buffer and its token i sits in slot i. A forward of Q tokens writes the slots from a row's start
on; a query at position i sees the slots up to i. So cropping a row is only to remember a smaller length: what is stale
lies behind every query until it is overwritten. A finished row's buffer goes to a waiting row, or to the last one.

Shapes: R rows of buffer, B rows in a forward, Q tokens fed per row, S slots, H heads, V vocabulary.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import Cache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from kernels.rollout import Forwards


@dataclass
class _Cursor:
    """Where the running forward writes and what it reads; shared by all layers."""

    rows: int
    capacity: int
    slots_N: Tensor  # flat indices (row · capacity + slot) of the fed tokens, row by row
    reads: tuple[int, int] | None = None  # (rows, slots) of the buffers to attend to; None: only what is fed


class _Layer(CacheLayerMixin):
    """Keys and values [R · S, H, head width] of one layer."""

    is_sliding = False  # windows are a matter of masks here

    def __init__(self, cursor: _Cursor):
        super().__init__()
        self.cursor = cursor

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # Zeros, since a masked slot's weight of 0 times an uninitialised NaN is NaN.
        size = self.cursor.rows * self.cursor.capacity
        self.keys = key_states.new_zeros(size, key_states.shape[1], key_states.shape[3])
        self.values = value_states.new_zeros(size, value_states.shape[1], value_states.shape[3])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self._write(self.keys, key_states), self._write(self.values, value_states)

    def _write(self, buffer: Tensor | None, fed_BHQ: Tensor) -> Tensor:
        assert buffer is not None
        buffer.index_copy_(0, self.cursor.slots_N, fed_BHQ.transpose(1, 2).flatten(0, 1))
        if self.cursor.reads is None:
            return fed_BHQ
        rows, slots = self.cursor.reads
        return buffer.unflatten(0, (self.cursor.rows, -1))[:rows, :slots].transpose(1, 2)

    def move(self, source: int, target: int) -> None:
        for buffer in (self.keys, self.values):
            assert buffer is not None
            buffer_RS = buffer.unflatten(0, (self.cursor.rows, -1))
            buffer_RS[target] = buffer_RS[source]

    def get_seq_length(self) -> int:
        return 0  # only asked while prompts are fed, into empty rows

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_max_length(self) -> int:
        return self.cursor.capacity


class Rows(Protocol):
    """A model at work on rows that advance by different lengths. ``seconds`` are those of the last `extend`."""

    forwards: Forwards
    seconds: float

    def prefill(self, prompts: Sequence[Tensor], rows: Sequence[int]) -> None:
        """Fill empty rows with tokens."""

    def extend(self, ids_BQ: Tensor, start_B: Tensor, last_B: Tensor, longest: int) -> Tensor:
        """Logits [B, Q, V] after each of the tokens fed to rows 0…B-1 from position `start` on."""
        ...

    def move(self, source: int, target: int) -> None:
        """Row `source` becomes row `target`."""


def rows_of(model: nn.Module, rows: int, capacity: int) -> Rows:
    """The model's own rows where it brings some (it may run elsewhere), else those below."""
    own: Callable[[int, int], Rows] | None = getattr(model, "rows_of", None)
    return own(rows, capacity) if own else RowModel(model, rows, capacity)  # type: ignore[arg-type]


class RowModel:
    """A causal language model on such a cache, with its forwards timed; who calls `extend` counts them."""

    def __init__(self, model: PreTrainedModel, rows: int, capacity: int):
        self.model, self.config = model, model.config.get_text_config()
        self.eager = self.config._attn_implementation == "eager"
        if not self.eager and self.config._attn_implementation != "sdpa":
            raise ValueError(
                f"blocks need masks of their own, which {self.config._attn_implementation} attention cannot take: "
                'load the model with attn_implementation="sdpa"'
            )
        self.windows = _windows(self.config, capacity)
        self.cursor = _Cursor(rows, capacity, torch.empty(0))
        self.cache = Cache(layer_class_to_replicate=partial(_Layer, self.cursor))  # type: ignore[arg-type]
        self.forwards = Forwards()
        self.seconds = 0.0  # of the last `extend`

    def prefill(self, prompts: Sequence[Tensor], rows: Sequence[int]) -> None:
        """Fill empty rows with tokens, padded on the right: no token sees the padding behind it."""
        ids_BQ = nn.utils.rnn.pad_sequence(list(prompts), batch_first=True)
        if not ids_BQ.shape[1]:
            return
        self.forwards.prompt_positions += ids_BQ.numel()
        steps_Q = torch.arange(ids_BQ.shape[1], device=ids_BQ.device)
        rows_B1 = torch.tensor(rows, device=ids_BQ.device)[:, None]
        self.cursor.slots_N, self.cursor.reads = (rows_B1 * self.cursor.capacity + steps_Q).flatten(), None
        self._run(ids_BQ, steps_Q.expand_as(ids_BQ), None, logits_to_keep=1)

    def extend(self, ids_BQ: Tensor, start_B: Tensor, last_B: Tensor, longest: int) -> Tensor:
        """Logits [B, Q, V] after each of the tokens fed to rows 0…B-1 from position `start` on.

        Positions past a row's `last` are of no interest to it: they all write there. `longest` is the largest start.
        """
        began, (rows, width) = time.perf_counter(), ids_BQ.shape
        steps_Q, capacity = torch.arange(width, device=ids_BQ.device), self.cursor.capacity
        positions_BQ = torch.minimum(start_B[:, None] + steps_Q, last_B[:, None])
        rows_B1 = torch.arange(rows, device=ids_BQ.device)[:, None]
        self.cursor.slots_N = (rows_B1 * capacity + positions_BQ).flatten()
        self.cursor.reads = rows, min(longest + width, capacity)
        logits_BQV = self._run(ids_BQ, positions_BQ, self._masks(positions_BQ, self.cursor.reads[1]))
        if logits_BQV.is_cuda:
            torch.cuda.synchronize(logits_BQV.device)
        self.seconds = time.perf_counter() - began
        return logits_BQV

    def move(self, source: int, target: int) -> None:
        """Row `source` becomes row `target`."""
        for layer in self.cache.layers:
            assert isinstance(layer, _Layer)
            layer.move(source, target)

    def _run(self, ids_BQ: Tensor, positions_BQ: Tensor, masks: object, **kwargs: int) -> Tensor:
        return self.model(
            input_ids=ids_BQ,
            attention_mask=masks,
            position_ids=positions_BQ,
            past_key_values=self.cache,
            use_cache=True,
            **kwargs,
        ).logits

    def _masks(self, positions_BQ: Tensor, slots: int) -> Tensor | dict[str, Tensor]:
        """What each query sees, [B, 1, Q, slots]; by layer type where a model's layers differ."""
        steps_S = torch.arange(slots, device=positions_BQ.device)
        at_B1Q1 = positions_BQ[:, None, :, None]
        masks = {}
        for kind, window in self.windows.items():
            seen_B1QS = steps_S <= at_B1Q1
            if window is not None:
                seen_B1QS &= steps_S > at_B1Q1 - window
            masks[kind] = self._additive(seen_B1QS) if self.eager else seen_B1QS
        return masks if len(masks) > 1 else masks.popitem()[1]

    def _additive(self, seen_B1QS: Tensor) -> Tensor:
        zeros = torch.zeros(seen_B1QS.shape, dtype=self.model.dtype, device=seen_B1QS.device)
        return zeros.masked_fill_(~seen_B1QS, torch.finfo(self.model.dtype).min)


def _windows(config: PretrainedConfig, capacity: int) -> dict[str, int | None]:
    """How far back each kind of layer looks (None: to the start); one entry if all look equally far."""
    window = getattr(config, "sliding_window", None)
    if window is not None and window >= capacity:
        window = None
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    if kinds - {"full_attention", "sliding_attention"}:
        raise ValueError(f"blocks can only be cropped in attention layers, and this model has {sorted(kinds)}")
    windows = {kind: window if kind == "sliding_attention" else None for kind in kinds}
    return windows if len(set(windows.values())) > 1 else {"all": windows.popitem()[1]}
