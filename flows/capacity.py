"""Whether a Ray cluster's nodes have what a run takes: CPUs, GPUs, and memory of a GPU. Asked of its job server.

Refused is only what surely fails: where an autoscaler may bring other nodes, the same lines are notes.
"""

from typing import Any

import httpx

from flows.estimate import GIB, parameters
from flows.gpus import engines_taken, gpus_at_once
from flows.story import on_gpu
from tasks.config import RunConfig

SECONDS = 10.0
# The state API gives no more.
MOST_NODES = 10_000
TYPE = "accelerator_type:"
# GB of the largest model that is sold under the name that Ray gives a node's GPUs (it detects the name, nobody tells it
# the memory). A GB counts as a GiB here: what is refused is too large by more than that.
GPU_MEMORY = {
    **{"T4": 16, "V100": 32, "A10G": 24, "L4": 24, "L40S": 48, "A100": 80, "A100-40G": 40, "A100-80G": 80},
    **{"H100": 94, "H20": 141, "H200": 141, "B200": 192, "B300": 288, "GB200": 192, "GB300": 288},
}


def cluster_capacity(config: RunConfig, address: str, headers: dict[str, str]) -> tuple[list[str], bool]:
    """What the cluster's nodes have too little of, and whether an autoscaler may bring it. Raises httpx.HTTPError."""

    def ask(path: str, **query: int) -> dict[str, Any]:
        reply = httpx.get(f"{address.rstrip('/')}{path}", params=query, headers=headers, timeout=SECONDS)
        data: dict[str, Any] = reply.raise_for_status().json()["data"]
        return data

    nodes = ask("/api/v0/nodes", limit=MOST_NODES)["result"]["result"]
    living = [node["resources_total"] for node in nodes if node["state"] == "ALIVE"]
    return lacking(config, living), autoscaled(ask("/api/cluster_status")["clusterStatus"])


def autoscaled(status: dict[str, Any] | None) -> bool:
    """Whether nodes may be added. A head that ``ray start`` started by itself names its nodes' types by their ids; of
    Kubernetes' newer autoscaler the job server says nothing."""
    types = ((status or {}).get("autoscalerReport") or {}).get("nodeTypeMapping")
    return not types or any(kind != f"node_{node}" for node, kind in types.items())


def lacking(config: RunConfig, nodes: list[dict[str, float]]) -> list[str]:
    """A line for all that these nodes, as resources by name, have too little of."""
    resources, gpu, engines = config.resources, on_gpu(config), engines_taken(config)
    workers = resources.min_train_workers or resources.train_workers
    least = config.model_copy(update={"resources": resources.model_copy(update={"train_workers": workers})})
    # An engine on a GPU takes a CPU beside it, one without takes none.
    serving = sum(model.engine.replicas for model in engines) if gpu else 0
    needed = {
        "CPU": max(serving, workers) if resources.release_engines else serving + workers,
        "GPU": gpus_at_once(least),
    }
    found = []
    for kind, count in needed.items():
        there = sum(node.get(kind, 0) for node in nodes)
        if there < count:
            found.append(
                f"resources: the run takes {count} {kind}s at once, the cluster's nodes have {there:g}: "
                f"add nodes, {'' if resources.release_engines else 'set resources.release_engines, '}or lower "
                "replicas or train_workers"
            )
    largest = max((node.get("GPU", 0) for node in nodes), default=0)
    for model in engines if gpu and largest else ():
        parallel = model.engine.tensor_parallel
        if parallel > largest:
            found.append(
                f"{model.engine_field}.tensor_parallel: {parallel} GPUs on one node, the cluster's largest has "
                f"{largest:g}: lower it, or add larger nodes"
            )
    return found + (small(least, gpu_memory(nodes)) if gpu else [])


def gpu_memory(nodes: list[dict[str, float]]) -> float | None:
    """GiB of the largest GPU, about; None where a node does not say what it has."""
    kinds = [{name.removeprefix(TYPE) for name in node if name.startswith(TYPE)} for node in nodes if node.get("GPU")]
    # One that was named by hand beside the detected one says more: A100-40G of an A100.
    known = [min((GPU_MEMORY[kind] for kind in names if kind in GPU_MEMORY), default=None) for names in kinds]
    sizes = [size for size in known if size is not None]
    return max(sizes) if sizes and len(sizes) == len(known) else None


def small(config: RunConfig, there: float | None) -> list[str]:
    """What a GPU of so many GiB cannot hold: an engine's share of the weights, a worker's of the training state."""
    if not there:
        return []
    found = []
    for model in engines_taken(config):
        engine = model.engine
        width = 4 if engine.dtype == "float32" else 2
        takes = parameters(model.source) * width / GIB / engine.tensor_parallel
        if takes > there * engine.gpu_memory_share:
            found.append(
                f"{model.field}: its weights take {takes:.0f} GiB of each GPU, an engine gets "
                f"{engine.gpu_memory_share:.0%} of {there:g}: raise {model.engine_field}.tensor_parallel, or use "
                "larger GPUs"
            )
    student, teacher = (parameters(config.served[role].source) for role in ("student", "teacher"))
    workers = config.resources.train_workers
    for name, settings in config.trainings.items():
        # Weights, gradient and AdamW's two moments in float32; adapters are small beside frozen weights.
        state = student * (2 if settings.lora else 16) + (2 * teacher if settings.method.asks_teacher else 0)
        if state / GIB / workers > there:
            found.append(
                f"{name}: weights and optimiser take {state / GIB / workers:.0f} GiB of each of {workers} GPUs, "
                f"they have {there:g}: raise resources.train_workers, set {name}.lora, or use larger GPUs"
            )
    return found
