"""The teacher's distributions beside its answers: as the engine returned them, or read once more in torch."""

from typing import Any

import pyarrow as pa

from infra.models import ModelRef
from infra.parts import read_part
from tasks import schemas
from tasks.config.signals import SampledTokens, TopTokens
from tasks.connection import connected
from tasks.stage import Stage


def best_tokens(rows: pa.Table, answers: pa.Table, settings: TopTokens, vocabulary: int) -> pa.Table:
    """Answers' distributions as the engine returned them, in DISTRIBUTION's columns."""
    import torch

    from kernels.codec import encode_topk

    columns, own = (answers["best_ids"].to_pylist(), answers["best_logprobs"].to_pylist()), settings.model_dump()
    del own["type"]
    blobs = [
        encode_topk(
            torch.tensor(ids).view(-1, settings.limit),
            torch.tensor(logprobs).view(-1, settings.limit),
            vocabulary,
            **own,
        )
        for ids, logprobs in zip(*columns, strict=True)
    ]
    return pa.table({"sample_id": rows["sample_id"], "distributions": blobs}, schema=schemas.DISTRIBUTION)


def read_again(stage: Stage[Any], model: ModelRef, settings: SampledTokens) -> None:
    """Commit the distributions of all samples, read by the model in torch, shard by shard."""
    import ray

    from tasks.engines import release_engines
    from tasks.reader import start_reader

    runtime, done = stage.spec.runtime, stage.done("distributions")
    parts = [part for part in stage.manifest.tables["samples"].parts if part.shard not in done]
    if not parts:
        return
    gpu = bool(runtime.engines.get(stage.settings.engine, {}).get("gpu"))
    with connected(runtime):
        if gpu and runtime.namespace:
            release_engines(runtime.namespace)
        reader = start_reader(stage.spec.root, model, gpu)
        for number, part in enumerate(parts, 1):
            rows = read_part(stage.store, part, ["sample_id", "seed", "prompt_token_ids", "token_ids"])
            columns = [rows[name].to_pylist() for name in ("prompt_token_ids", "token_ids", "seed")]
            if not rows.num_rows:
                stage.commit("distributions", part.shard, schemas.DISTRIBUTION.empty_table())
                continue
            blobs = ray.get(reader.encode.remote(*columns, settings.model_dump()))
            table = pa.table({"sample_id": rows["sample_id"], "distributions": blobs}, schema=schemas.DISTRIBUTION)
            stage.commit("distributions", part.shard, table)
            stage.progress(number, len(parts), "shards read again")
        ray.kill(reader)
