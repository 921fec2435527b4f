"""The store against bare pyarrow: the same rows written and read, to a local folder and to S3, and memory by rows.

    python -m benchmarks.store --json

Ours commits parts (hash, record, exclusive create, synced to disk) and reads them checked; pyarrow writes and reads the
same tables with the same settings, without any of this. S3 is moto's server, a process of its own on this machine, so
requests are cheap and its processor time is shared. Sides take turns, the ratio is of medians of throughput.

Memory is the peak over the start while so many rows are written part by part and read again, each count in a process of
its own.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from benchmarks.conditions import conditions, options, publish
from benchmarks.meter import Peak
from infra.cluster import free_port
from infra.manifest import Manifest, commit_manifest
from infra.parts import ROW_GROUP, Committer, read_table
from infra.s3 import S3Store
from infra.store import LocalStore, Store, open_store
from tasks.resume import storage
from tasks.schemas import SAMPLE

MIB = 1 << 20
# Rows of a part: what a shard of 256 prompts with four answers makes.
PART_ROWS = 1024
COUNTS = (10_000, 100_000, 1_000_000, 10_000_000)


def sample_rows(start: int, count: int) -> pa.Table:
    """Rows as sampling makes them: ids, 100 prompt and 150 response tokens, text, log-probabilities."""
    random = np.random.default_rng(start)
    words = np.array(["so", "the", "sum", "is", "seven", "and", "we", "add", "three", "more", "to", "get", "ten"])
    prompts, tokens = (random.integers(3, 49_000, (count, length), dtype=np.int32) for length in (100, 150))
    chosen = random.integers(0, len(words), (count, 90))
    ids = [f"{number:016x}" for number in random.integers(0, 1 << 62, count)]
    columns = {
        "sample_id": ids,
        "prompt_id": ids,
        "role": ["teacher"] * count,
        "model": ["benchmark"] * count,
        "revision": ["0123456789abcdef"] * count,
        "sample_index": np.zeros(count, np.int32),
        "seed": random.integers(0, 1 << 62, count),
        "prompt_token_ids": lists(prompts),
        "token_ids": lists(tokens),
        "text": [" ".join(words[row]) for row in chosen],
        "finish_reason": ["stop"] * count,
        "logprob": random.standard_normal(count).astype(np.float32),
        "token_logprobs": lists(-random.random((count, 150), dtype=np.float32)),
    }
    return pa.table(columns, schema=SAMPLE)


def lists(values: np.ndarray) -> pa.Array:
    """The rows of a matrix as lists."""
    offsets = pa.array(np.arange(0, values.size + 1, values.shape[1], dtype=np.int32))
    return pa.ListArray.from_arrays(offsets, pa.array(values.ravel()))


def ours(store: Store, tables: list[pa.Table], name: str) -> tuple[float, float]:
    """Seconds to commit a stage of these tables, and to read it."""
    manifest = Manifest(stage="benchmark", module="m", version=1, fingerprint=name, settings={}, inputs={})
    began = time.perf_counter()
    committer = Committer(store, manifest.folder)
    for shard, rows in enumerate(tables):
        committer.commit("samples", shard, rows)
    manifest.tables["samples"] = committer.close("samples", SAMPLE)
    commit_manifest(store, manifest)
    wrote = time.perf_counter()
    rows = sum(part.num_rows for part in read_table(store, manifest, "samples"))
    assert rows == sum(map(len, tables))
    return wrote - began, time.perf_counter() - wrote


def bare(store: Store, tables: list[pa.Table], name: str) -> tuple[float, float]:
    """The same with pyarrow alone."""
    system, place = storage(store, f"bare/{name}")
    system.create_dir(place)
    plain = [field.name for field in SAMPLE if not pa.types.is_binary(field.type)]
    settings = {"compression": "zstd", "row_group_size": ROW_GROUP, "use_dictionary": plain, "write_statistics": plain}
    began = time.perf_counter()
    for shard, rows in enumerate(tables):
        pq.write_table(rows, f"{place}/{shard:05d}.parquet", filesystem=system, **settings)
    wrote = time.perf_counter()
    paths = [f"{place}/{shard:05d}.parquet" for shard in range(len(tables))]
    rows = sum(pq.read_table(path, filesystem=system).num_rows for path in paths)
    assert rows == sum(map(len, tables))
    return wrote - began, time.perf_counter() - wrote


def ratios(store: Store, tables: list[pa.Table], rounds: int) -> dict[str, Any]:
    """Our throughput as a share of bare pyarrow's, writing and reading; and the seconds behind it."""
    times: dict[str, list[tuple[float, float]]] = {"ours": [], "bare": []}
    sides: list[tuple[str, Callable[..., tuple[float, float]]]] = [("ours", ours), ("bare", bare)]
    for number in range(rounds + 1):
        for side, work in sides if number % 2 else reversed(sides):
            measured = work(store, tables, f"{side}{number}")
            # The first round warms connections, files and code.
            if number:
                times[side].append(measured)
    medians = {
        side: [statistics.median(column) for column in zip(*seconds, strict=True)] for side, seconds in times.items()
    }
    (our_write, our_read), (bare_write, bare_read) = medians["ours"], medians["bare"]
    return {
        "write_ratio": round(bare_write / our_write, 3),
        "read_ratio": round(bare_read / our_read, 3),
        "seconds": {side: [[round(value, 4) for value in pair] for pair in pairs] for side, pairs in times.items()},
    }


@contextmanager
def s3_store() -> Iterator[S3Store]:
    """A bucket on moto's server."""
    port = free_port()
    address = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ.update({**address, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"})
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            store = S3Store("benchmark", "store")
            # Repeated by the client until the server answers.
            store.client.create_bucket(Bucket="benchmark")
            yield store
        finally:
            server.terminate()


def peak_mib(rows: int, root: str) -> float:
    """Peak memory of this process while so many rows are written and read."""
    store = open_store(root)
    manifest = Manifest(stage="benchmark", module="m", version=1, fingerprint=str(rows), settings={}, inputs={})
    # The same few tables again and again: making rows is not what is measured.
    tables = [sample_rows(start, PART_ROWS).select(["sample_id", "token_ids"]) for start in range(4)]
    schema = tables[0].schema
    with Peak() as peak:
        committer = Committer(store, manifest.folder)
        for shard in range(-(-rows // PART_ROWS)):
            left = min(PART_ROWS, rows - shard * PART_ROWS)
            committer.commit("samples", shard, tables[shard % 4].slice(0, left))
        manifest.tables["samples"] = committer.close("samples", schema)
        commit_manifest(store, manifest)
        assert sum(part.num_rows for part in read_table(store, manifest, "samples")) == rows
    return round(peak.extra / MIB, 1)


def peaks(most: int) -> dict[str, float]:
    found = {}
    for rows in (count for count in COUNTS if count <= most):
        with tempfile.TemporaryDirectory() as root:
            command = [sys.executable, "-m", "benchmarks.store", "--peak-of", str(rows), "--root", root]
            ended = subprocess.run(command, capture_output=True, text=True, check=True)
            found[str(rows)] = json.loads(ended.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--parts", type=int, default=64, help=f"parts of {PART_ROWS} rows that are written and read")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of both sides, after one that warms up")
    parser.add_argument("--most-rows", type=int, default=COUNTS[-1], help="the largest row count memory is measured at")
    parser.add_argument("--root", help="where the local store is; a folder of its own on this disk by default")
    parser.add_argument("--peak-of", type=int, help="only print the peak memory for so many rows, MiB")
    arguments = parser.parse_args()
    if arguments.peak_of:
        print(peak_mib(arguments.peak_of, arguments.root))
        return
    tables = [sample_rows(start, PART_ROWS) for start in range(arguments.parts)]
    root = Path(arguments.root or tempfile.mkdtemp(prefix="switchyard-store-", dir="."))
    try:
        places = {"local": ratios(LocalStore(root), tables, arguments.rounds)}
    finally:
        shutil.rmtree(root, ignore_errors=True)
    with s3_store() as store:
        places["s3"] = ratios(store, tables, arguments.rounds)
    result = {
        "conditions": conditions(),
        "rows": arguments.parts * PART_ROWS,
        "parts": arguments.parts,
        "rounds": arguments.rounds,
        "write_ratio": min(place["write_ratio"] for place in places.values()),
        "read_ratio": min(place["read_ratio"] for place in places.values()),
        "peak_mib_by_rows": peaks(arguments.most_rows),
        "places": places,
    }
    for name, place in places.items():
        print(f"{name}: write {place['write_ratio']}, read {place['read_ratio']} of bare pyarrow's throughput")
    print(f"peak MiB by rows: {result['peak_mib_by_rows']}")
    publish("store", result, arguments)


if __name__ == "__main__":
    main()
