"""The engine room: one Ray job a run that owns its engines, so that a run loads each model once.

    python -m infra.engine_room --namespace NAME --root URI --lease PATH

Stage jobs find the room by name in the run's namespace and ask it for engines; it starts what is not there yet. Engines
are named actors but not detached: they end with this job. The job ends when the flow stops it, and by itself when the
lease, a counter that the flow renews in the store, stands still (timed by this process's own clock).
"""

import argparse
import time
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from infra.endpoint import Endpoint, EndpointSpec
from infra.engine import Engine, EngineSpec
from infra.lease import lease_counter
from infra.store import Store, open_store
from infra.trunk import Trunk

ROOM = "engine-room"
# Ray's label of every node.
NODE = "ray.io/node-id"
LEASE_SECONDS = 120.0
WATCH_SECONDS = 2.0


class Room:
    """The actor that creates engines and therefore owns them."""

    def __init__(self) -> None:
        self.engines: dict[str, list[Any]] = {}
        self.started = 0

    def acquire(self, spec: dict[str, Any]) -> list[str]:
        """Names of the actors that serve this spec, started if need be. Returns before they have loaded."""
        parsed = EndpointSpec.model_validate(spec) if "base_url" in spec else EngineSpec.model_validate(spec)
        names = [parsed.actor_name(replica) for replica in range(parsed.replicas)]
        if parsed.key not in self.engines:
            self.engines[parsed.key] = [start(parsed, name, self.started + at) for at, name in enumerate(names)]
            self.started += len(names)
        return names

    def release(self, key: str | None = None) -> None:
        """End all engines, so that training has their memory, or those of one spec; the next ``acquire`` loads them
        again."""
        for name in list(self.engines) if key is None else [key]:
            for actor in self.engines.pop(name, []):
                ray.kill(actor)


def start(spec: EngineSpec | EndpointSpec, name: str, number: int) -> Any:
    """The actor of the room's so manyth engine."""
    # Engines on CPU ask for no logical CPUs: a run's engines take turns, and training must find room beside them. Such
    # actors Ray spreads over nodes neither by SPREAD nor by a soft affinity, so each is named its node; where that is
    # gone, any will do but those that are not for work.
    work, idle = nodes()
    others = [{"label_selector": {NODE: f"!in({','.join(idle or ['none'])})"}}]
    resources: dict[str, Any] = {"num_cpus": 0, "fallback_strategy": others, **others[0]}
    if work:
        resources["label_selector"] = {NODE: work[number % len(work)]}
    if isinstance(spec, EngineSpec) and spec.gpu:
        resources = {"num_cpus": 1, "num_gpus": spec.tensor_parallel, "scheduling_strategy": "SPREAD"}
    kind = Endpoint if isinstance(spec, EndpointSpec) else Trunk if spec.trunk else Engine
    return (
        ray.remote(kind)
        .options(
            name=name,
            max_restarts=-1,
            max_task_retries=0,
            runtime_env={"env_vars": spec.environment},
            **resources,
        )
        .remote(spec.model_dump())
    )


def nodes() -> tuple[list[str], list[str]]:
    """Living nodes that work is for, those with CPUs, and the others: a cluster's head has none."""
    living = [(node["NodeID"], bool(node["Resources"].get("CPU"))) for node in ray.nodes() if node["Alive"]]
    return sorted(name for name, cpus in living if cpus), sorted(name for name, cpus in living if not cpus)


def here() -> NodeAffinitySchedulingStrategy:
    """Ray's order to stay on this process's node: what one job's life hangs on must not end with another node."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def open_room() -> Any:
    """The room of this namespace, created by the caller, beside itself, where there is none yet."""
    options = {"name": ROOM, "num_cpus": 0, "get_if_exists": True, "scheduling_strategy": here()}
    return ray.remote(Room).options(**options).remote()


def watch(store: Store, lease: str, seconds: float) -> None:
    """Return when the lease has not changed for ``seconds``."""
    last, since = lease_counter(store, lease), time.monotonic()
    while time.monotonic() - since < seconds:
        time.sleep(WATCH_SECONDS)
        now = lease_counter(store, lease)
        if now != last:
            last, since = now, time.monotonic()


def main() -> None:
    parser = argparse.ArgumentParser(description="Own a run's engines until its lease ends.")
    parser.add_argument("--namespace", required=True)
    parser.add_argument("--root", required=True)
    parser.add_argument("--lease", required=True)
    parser.add_argument("--seconds", type=float, default=LEASE_SECONDS)
    arguments = parser.parse_args()
    ray.init(address="auto", namespace=arguments.namespace, log_to_driver=False)
    room = open_room()
    ray.get(room.__ray_ready__.remote())
    print("engine room open", flush=True)
    watch(open_store(arguments.root), arguments.lease, arguments.seconds)
    print(f"lease not renewed for {arguments.seconds:.0f} s: closing", flush=True)


if __name__ == "__main__":
    main()
