"""What this machine, or the cluster, lacks for these settings: ``switchyard doctor``. One line a lack: what it is
about, what is wrong, the fix.

Beside what a plan looks at (`flows/preflight.py`): the tools and devices of a machine that is to do the work, and the
servers that are to be there already. Starts nothing, and asks no model.
"""

import os
import shutil
import subprocess
import sys
import uuid
from base64 import b64encode
from functools import partial
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urlparse

import httpx

from flows.capacity import cluster_capacity
from flows.estimate import GIB, estimate
from flows.gpus import gpus_at_once, gpus_here, gpus_taken
from flows.preflight import Checks, preflight, problem, readable
from flows.story import on_gpu
from infra.store import open_store
from tasks.config import RunConfig

SECONDS = 10.0
# Ray's objects and the messages between a training step's processes lie there; containers get 64 MiB unless told.
SHARED_GIB = 1.0
LOOPBACK = ("127.0.0.1", "localhost", "::1")
CLOUD = "https://api.prefect.cloud/"
PREFECT = ("PREFECT_API_URL", "/admin/version", "PREFECT_API_AUTH_STRING")


def examine(config: RunConfig, root: str) -> tuple[Checks, list[str]]:
    """Lacks by name of the check; and what is to be known, though it may mend itself."""
    address, notes = config.resources.ray_address, list[str]()
    checks = {"Prefect's server": prefect_server(os.environ.get("PREFECT_API_URL"))}
    if address:
        checks["Ray cluster"] = ray_cluster(address)
    else:
        checks |= {"compiler": compiler(), "shared memory": shared_memory(Path("/dev/shm"))}
        if on_gpu(config):
            checks["GPUs"] = gpus(config, gpus_here())
    found = readable(config, root)
    if not found["store can be written"]:
        found["store keeps what stands"] = problem("--root", partial(conditional, root))
    checks |= found
    # The rest needs models and sources that can be read.
    if not any(found.values()):
        checks |= preflight(config, root, estimate(config))
        if address and not checks["Ray cluster"]:
            checks["cluster's capacity"], notes = room(config, address)
    return checks, notes


def compiler() -> list[str]:
    """Engines compile small pieces when they start."""
    if shutil.which("g++"):
        return []
    return ["compiler: there is no g++, and engines compile when they start: apt-get install g++"]


def shared_memory(place: Path) -> list[str]:
    if not place.is_dir():
        return []
    size = shutil.disk_usage(place).total / GIB
    if size >= SHARED_GIB:
        return []
    return [
        f"{place}: it has {size:.2f} GiB, Ray and training want {SHARED_GIB:g} at least: docker run --shm-size=4g, "
        "or an emptyDir of medium Memory in Kubernetes"
    ]


def gpus(config: RunConfig, there: int) -> list[str]:
    """Enough GPUs, a build of torch for them, and a driver for that."""
    if not there:
        return ["device: gpu, and this machine has no GPU: set device: cpu, or resources.ray_address"]
    serving, training = gpus_taken(config)
    release, needed, found = config.resources.release_engines, gpus_at_once(config), []
    if needed > there:
        found.append(
            f"resources: engines take {serving} GPUs, training {training}, this machine has {there}: "
            + ("" if release else "set resources.release_engines, ")
            + "lower replicas, tensor_parallel or train_workers, or let the teacher be its own TA"
        )
    build = version("torch")
    if build.endswith("+cpu"):
        return [*found, f"torch: {build} knows no GPU: make clean env EXTRA=gpu"]
    # It alone knows whether the driver is new enough for it.
    asked = [sys.executable, "-c", "import torch; torch.cuda.init()"]
    told = subprocess.run(asked, capture_output=True, text=True, timeout=300)
    if told.returncode:
        cause = (told.stderr.strip().splitlines() or ["no reason given"])[-1]
        found.append(f"driver: torch {build} cannot use the GPU ({cause[:200]}): update NVIDIA's driver")
    return found


def guarded(what: str, url: str, path: str, headers: dict[str, str], key: str) -> httpx.Response | str:
    """The answer to who has the key; else the lack. A server that strangers get an answer from is one."""
    base = url.rstrip("/")
    try:
        own = httpx.get(f"{base}{path}", headers=headers, timeout=SECONDS)
        lets_in = let_in(what, url, path, key)
    except httpx.HTTPError as error:
        return f"{what}: {url} does not answer ({type(error).__name__}): start it, or correct the address"
    if own.status_code in (401, 403):
        refused = f"this {key}" if headers else f"requests without {key}"
        return f"{what}: {url} refuses {refused}: export {key} as it has it"
    if not answered(own):
        return f"{what}: {url} has no {path} ({own.status_code}): correct the address"
    return lets_in or own


def answered(reply: httpx.Response) -> bool:
    """Whether it is the API's. Prefect's server shows its pages under any other address."""
    return reply.status_code == 200 and "json" in reply.headers.get("Content-Type", "")


def let_in(what: str, url: str, path: str, key: str) -> str | None:
    """The lack, where a server beyond loopback gives strangers an answer. Raises httpx.HTTPError where it is silent."""
    if urlparse(url).hostname in LOOPBACK or not answered(httpx.get(f"{url.rstrip('/')}{path}", timeout=SECONDS)):
        return None
    return f"{what}: {url} answers whoever asks: let it demand {key}"


def open_prefect(url: str | None) -> list[str]:
    """What keeps a run from using this server: whoever can start runs on it runs code. Others' calls find out whether
    it is there at all."""
    what, path, key = PREFECT
    # Prefect's cloud asks for PREFECT_API_KEY by itself.
    if not url or url.startswith(CLOUD):
        return []
    try:
        lack = let_in(what, url, path, key)
    except httpx.HTTPError:
        return []
    return [f"{lack}, or unset {what}"] if lack else []


def prefect_server(url: str | None) -> list[str]:
    """The server that the environment names; a run without one starts its own."""
    if not url:
        return []
    headers = {}
    if secret := os.environ.get("PREFECT_API_AUTH_STRING"):
        headers["Authorization"] = f"Basic {b64encode(secret.encode()).decode()}"
    elif key := os.environ.get("PREFECT_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    what, path, key = PREFECT
    answer = guarded(what, url, path, headers, key)
    if isinstance(answer, str):
        return [answer]
    return same(what, "Prefect", str(answer.json()), version("prefect"), parts=2)


def ray_headers() -> dict[str, str]:
    token = os.environ.get("RAY_AUTH_TOKEN")
    return {"Authorization": f"Bearer {token}"} if token else {}


def ray_cluster(address: str) -> list[str]:
    answer = guarded("resources.ray_address", address, "/api/version", ray_headers(), "RAY_AUTH_TOKEN")
    if isinstance(answer, str):
        return [answer]
    return same("resources.ray_address", "Ray", answer.json()["ray_version"], version("ray"), parts=3)


def room(config: RunConfig, address: str) -> tuple[list[str], list[str]]:
    """What the cluster has too little of: lacks, or notes where an autoscaler may add nodes."""
    try:
        lacks, grows = cluster_capacity(config, address, ray_headers())
    except httpx.HTTPError as error:
        return [], [f"resources.ray_address: {address} did not say what its nodes have ({type(error).__name__})"]
    return ([], [f"not there now, an autoscaler may add it; {line}" for line in lacks]) if grows else (lacks, [])


def same(what: str, name: str, theirs: str, ours: str, parts: int) -> list[str]:
    if theirs.split(".")[:parts] == ours.split(".")[:parts]:
        return []
    return [f"{what}: it runs {name} {theirs}, this environment has {ours}: install the same version on both sides"]


def conditional(root: str) -> None:
    """ValueError where the store replaces what stands: commit records and manifests are created exclusively."""
    store, path = open_store(root), f"probe/{uuid.uuid4().hex}"
    try:
        store.create(path, b"first")
        if store.create(path, b"second") or store.swap(path, b"other", b"third") or store.read(path) != b"first":
            raise ValueError(
                f"{root}: its server replaces objects that stand (it ignores If-None-Match and If-Match), so two runs "
                "could spoil each other: use one that honours conditional puts, such as AWS S3 or a current MinIO"
            )
    finally:
        store.delete(path)
