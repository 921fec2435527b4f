"""An engine in place of vLLM's that takes the time an H100 would and answers with as many tokens; and its room.

The model: Llama 3.1 8B in bfloat16 under vLLM writes about 12,500 tokens a second on one H100 (published figure, see
``SOURCE``), reached here at 256 sequences at once. A step takes 7 ms for a lone sequence (16 GB of weights at 3.35 TB/s
are 5 ms) and grows in proportion to the sequences up to 20.5 ms. A call runs in waves of at most 256.
"""

import random
import time
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

SOURCE = "https://www.morphllm.com/vllm-benchmarks (vLLM, Llama 3.1 8B, bfloat16, one H100: about 12,500 tokens/s)"
TOKENS_PER_SECOND = 12_500
SEQUENCES = 256
LONE_STEP = 0.007
FULL_STEP = SEQUENCES / TOKENS_PER_SECOND
# Engines of one kind differ by so much, from call to call.
SPREAD = 0.05
WORDS = (
    "so many words as an answer has tokens and a few more ",
    "the next answer is made of other words than this one ",
)


def seconds_of(sequences: int, tokens: int) -> float:
    """How long so many sequences of so many tokens take."""
    full, rest = divmod(sequences, SEQUENCES)
    last = LONE_STEP + (FULL_STEP - LONE_STEP) * rest / SEQUENCES if rest else 0.0
    return tokens * (full * FULL_STEP + last)


class TimedEngine:
    """The actor. ``speed`` divides its time: below 1 for a slow one, above 1 where time is compressed."""

    def __init__(self, number: int, speed: float, tokens: int, schema: pa.Schema) -> None:
        # The schema is handed in: 64 processes that import no more than Arrow start sooner.
        self.number, self.speed, self.tokens, self.schema = number, speed, tokens, schema
        self.random = random.Random(number)

    def ready(self) -> str:
        return str(self.number)

    def generate(
        self, model: dict[str, Any], conversations: list[Any], seeds: list[list[int]], **options: Any
    ) -> pa.Table:
        began, count = time.monotonic(), sum(map(len, seeds))
        answers = answers_of(seeds, self.tokens, self.schema)
        seconds = seconds_of(count, self.tokens) / self.speed * self.random.uniform(1 - SPREAD, 1 + SPREAD)
        time.sleep(max(0.0, seconds - (time.monotonic() - began)))
        return answers


def answers_of(seeds: list[list[int]], tokens: int, schema: pa.Schema) -> pa.Table:
    """As much as an engine answers: tokens, text and ends of every sequence."""
    index = [number for number, own in enumerate(seeds) for _ in own]
    flat = [seed for own in seeds for seed in own]
    ids = [[(number * 31 + place) % 100_000 for place in range(tokens)] for number in range(64)]
    texts = [(WORDS[number % 2] * (tokens // 10 + 1))[number : number + 4 * tokens] for number in range(64)]
    pick = pa.array([number % 64 for number in range(len(flat))], pa.int32())
    columns = {
        "conversation": pa.array(index, pa.int32()),
        "seed": pa.array(flat, pa.int64()),
        "prompt_token_ids": pa.array([ids[0][:32]] * 64, pa.list_(pa.int32())).take(pick),
        "token_ids": pa.array(ids, pa.list_(pa.int32())).take(pick),
        "text": pa.array(texts, pa.string()).take(pick),
        "finish_reason": pa.array(["stop", "length"]).take(pc.bit_wise_and(pick, 1)),
    }
    for field in schema:
        columns.setdefault(field.name, pa.nulls(len(flat), field.type))
    return pa.table({name: columns[name] for name in schema.names}, schema=schema)


class TimedRoom:
    """The actor that owns timed engines, one a node."""

    def __init__(self, nodes: int, speeds: dict[int, float], speed: float, tokens: int) -> None:
        import ray

        from infra.engine import ANSWERS

        self.names = [f"timed-{number}" for number in range(nodes)]
        self.engines = [
            ray.remote(TimedEngine)
            .options(name=name, num_cpus=0, max_restarts=-1)
            .remote(number, speed * speeds.get(number, 1.0), tokens, ANSWERS)
            for number, name in enumerate(self.names)
        ]

    def acquire(self, spec: dict[str, Any]) -> list[str]:
        return self.names

    def opened(self) -> None:
        """Returns when all engines are up."""
        import ray

        ray.get([engine.ready.remote() for engine in self.engines])
