"""A Ray cluster of several nodes on this machine: each in a network namespace with an address of its own, all on one
bridge, so that a node can be cut off for real."""

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import boto3
import psutil
import pytest

from infra.cluster import QUIET, START_SECONDS, free_port, token_environment
from infra.process import Guarded

ROOT = Path(__file__).parent.parent.parent
BUCKET = "nodes"
SWIFT = {
    # Ray finds out that a node is gone within seconds instead of a minute.
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


class Node:
    """One machine of the network: a namespace, and its link to the bridge."""

    def __init__(self, network: "Network", number: int) -> None:
        self.network, self.number = network, number
        self.name, self.link = f"{network.name}n{number}", f"{network.name}v{number}"
        self.address = f"{network.prefix}.{number + 1}"
        self.processes: Guarded | None = None
        ip("netns", "add", self.name)
        ip("link", "add", self.link, "type", "veth", "peer", "name", "eth0", "netns", self.name)
        ip("link", "set", self.link, "master", network.name, "up")
        for command in (f"addr add {self.address}/24 dev eth0", "link set eth0 up", "link set lo up"):
            ip("-netns", self.name, *command.split())

    def start(self, *arguments: str, cpus: int) -> None:
        """``ray start`` here, with everything that belongs to it."""
        folder = Path(tempfile.mkdtemp(prefix="switchyard-node-", dir="/tmp"))
        self.network.folders.append(folder)
        ray = str(Path(sys.executable).with_name("ray"))
        self.processes = Guarded(
            [
                *("ip", "netns", "exec", self.name, ray, "start", "--block", "--disable-usage-stats"),
                *(f"--node-ip-address={self.address}", f"--num-cpus={cpus}", f"--temp-dir={folder}"),
                *("--object-store-memory=100000000", *arguments),
            ],
            folder / "node.log",
            self.network.environment,
        )

    def cut(self) -> None:
        """No packet comes or goes any more; nobody is told."""
        ip("link", "set", self.link, "down")

    def kill(self) -> None:
        """End all its processes at once."""
        for process in self.running():
            process.kill()
        self.end()

    def end(self) -> None:
        if self.processes:
            self.processes.stop()
        self.processes = None

    def running(self, name: str = "") -> list[psutil.Process]:
        """Processes in this namespace with this on their command line."""
        found = []
        for pid in ip("netns", "pids", self.name).split():
            try:
                process = psutil.Process(int(pid))
                if name in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def close(self) -> None:
        self.end()
        # Connections that were cut off keep a namespace for minutes after it was deleted; its link goes at once.
        ip("link", "del", self.link)
        ip("netns", "del", self.name)


class Network:
    """Nodes on one bridge; this process is on it too. The first node is the head, which has no CPUs."""

    def __init__(self) -> None:
        self.name = f"sy{secrets.token_hex(2)}"
        self.prefix = f"10.{200 + secrets.randbelow(50)}.{secrets.randbelow(250)}"
        self.nodes: list[Node] = []
        self.folders: list[Path] = []
        self.store: Guarded | None = None
        self.environment = {
            **QUIET,
            **SWIFT,
            **token_environment(),
            **{f"AWS_{name}": "nodes" for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY")},
            "AWS_DEFAULT_REGION": "us-east-1",
            # Names of machines resolve to nothing here.
            "GLOO_SOCKET_IFNAME": "eth0",
            # A cluster's image has the code and its interpreter in place.
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)]),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        ip("link", "add", self.name, "type", "bridge")
        ip("addr", "add", f"{self.prefix}.1/24", "dev", self.name)
        ip("link", "set", self.name, "up")

    def start_store(self) -> None:
        """An S3 server on the bridge: what a node that is cut off cannot reach either."""
        port, folder = free_port(), Path(tempfile.mkdtemp(prefix="switchyard-node-", dir="/tmp"))
        self.folders.append(folder)
        url = f"http://{self.prefix}.1:{port}"
        command = [sys.executable, "-m", "moto.server", "-H", f"{self.prefix}.1", "-p", str(port)]
        self.store = Guarded(command, folder / "store.log")
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                urllib.request.urlopen(f"{url}/moto-api/", timeout=2).close()
                break
            except OSError:
                assert time.monotonic() < deadline, self.store.tail()
                time.sleep(0.3)
        self.environment["AWS_ENDPOINT_URL"] = url

    @property
    def head(self) -> Node:
        return self.nodes[0]

    @property
    def jobs(self) -> str:
        """Address of the job server."""
        return f"http://{self.head.address}:8265"

    def start_head(self) -> None:
        if not self.nodes:
            self.nodes.append(Node(self, 1))
        dashboard = ("--include-dashboard=true", f"--dashboard-host={self.head.address}", "--dashboard-port=8265")
        self.head.start("--head", "--port=6379", *dashboard, cpus=0)
        self.wait(1)

    def add(self, cpus: int = 1) -> Node:
        """One more node, which joins the cluster."""
        node = Node(self, len(self.nodes) + 1)
        self.nodes.append(node)
        self.join(node, cpus)
        return node

    def join(self, node: Node, cpus: int = 1) -> None:
        node.start(f"--address={self.head.address}:6379", cpus=cpus)

    def alive(self) -> list[str]:
        """Addresses of the nodes that the cluster counts; none while it does not answer."""
        script = (
            f"import json, ray; ray.init('{self.head.address}:6379', log_to_driver=False, logging_level='ERROR'); "
            "print(json.dumps([node['NodeManagerAddress'] for node in ray.nodes() if node['Alive']]))"
        )
        command = ["ip", "netns", "exec", self.head.name, sys.executable, "-c", script]
        asked = subprocess.run(command, env={**os.environ, **self.environment}, capture_output=True, text=True)
        return json.loads(asked.stdout.splitlines()[-1]) if asked.returncode == 0 else []

    def wait(self, count: int) -> None:
        """Until the cluster has so many nodes."""
        deadline = time.monotonic() + START_SECONDS
        while len(self.alive()) != count:
            assert time.monotonic() < deadline, [node.processes and node.processes.tail() for node in self.nodes]
            time.sleep(0.5)

    def close(self) -> None:
        for node in reversed(self.nodes):
            node.close()
        if self.store:
            self.store.stop()
        ip("link", "del", self.name)
        for folder in self.folders:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def cluster(count: int) -> Iterator[Network]:
    """A head without CPUs, so many nodes of one CPU, and a bucket beside them, which this process reads too. Skips the
    test where no network can be made."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces take root and iproute2")
    try:
        made = Network()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network of its own can be made here: {error.stderr.strip()}")
    try:
        made.start_store()
        with pytest.MonkeyPatch.context() as patch:
            for name, value in made.environment.items():
                if name.startswith("AWS_"):
                    patch.setenv(name, value)
            boto3.client("s3").create_bucket(Bucket=BUCKET)
            made.start_head()
            for _ in range(count):
                made.add()
            made.wait(1 + count)
            yield made
    finally:
        made.close()
