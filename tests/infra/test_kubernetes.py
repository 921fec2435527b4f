"""The manifests of infra/kubernetes: rendered by kubectl, read against KubeRay's and Kubernetes' own schemas, and
against each other and the code."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "infra/kubernetes"
SCHEMAS = ROOT.parent / "shared/schemas"
OVERLAYS = ["overlays/one-gpu", "overlays/eight-gpus", "overlays/many-nodes", "job"]
# What docs/clusters.md creates, with its keys.
SECRETS = {
    "switchyard-ray": {"auth_token"},
    "switchyard-prefect": {"auth-string", "database-password", "database-url"},
    "switchyard-access": set[str](),
}
PLANTED = "you:planted"
# What a worker does between taking a flow run and asking Kubernetes for its job.
WORKER = """
import asyncio, json, sys, uuid
from prefect.client.schemas.objects import Flow, FlowRun
from prefect_kubernetes.settings import KubernetesSettings
from prefect_kubernetes.worker import KubernetesWorker, KubernetesWorkerJobConfiguration

async def main():
    template = json.load(open(sys.argv[1]))
    values = {"image": "registry.example/switchyard:1"}
    job = await KubernetesWorkerJobConfiguration.from_template_and_values(template, values)
    flow = Flow(id=uuid.uuid4(), name="distill")
    job.prepare_for_flow_run(FlowRun(id=uuid.uuid4(), flow_id=flow.id, name="brave-run"), None, flow)
    secret = KubernetesSettings().worker
    await KubernetesWorker("switchyard")._replace_env_variable_with_secret(
        env_variable_name="PREFECT_API_AUTH_STRING",
        configuration=job,
        secret_name=secret.api_auth_string_secret_name,
        secret_key=secret.api_auth_string_secret_key,
    )
    print(json.dumps(job.job_manifest))

asyncio.run(main())
"""
Object = dict[str, Any]


@cache
def rendered(overlay: str) -> list[Object]:
    kubectl = Path(sys.executable).with_name("kubectl")
    command = [str(kubectl if kubectl.exists() else shutil.which("kubectl")), "kustomize", str(FOLDER / overlay)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, "kustomize warns of what it will not do for long"
    return list(yaml.load_all(done.stdout, yaml.CSafeLoader))


@cache
def flow_job() -> Object:
    """The job of a flow run, as Prefect's Kubernetes worker makes it of the pool's template, with the environment that
    the worker's manifest gives it."""
    (worker,) = (
        entry
        for entry in rendered(OVERLAYS[0])
        if entry["metadata"]["name"] == "switchyard-worker" and entry["kind"] == "Deployment"
    )
    (container,) = worker["spec"]["template"]["spec"]["containers"]
    own = {entry["name"]: entry.get("value", PLANTED) for entry in container["env"]}
    command = [sys.executable, "-c", WORKER, str(FOLDER / "prefect/pool.json")]
    done = subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    job: Object = json.loads(done.stdout)
    pod = job["spec"]["template"]["spec"]
    # Prefect insists on these two here, where Kubernetes drops them.
    assert (pod.pop("parallelism"), pod.pop("completions")) == (1, 1)
    return job


def every(overlay: str) -> list[Object]:
    return [*rendered(overlay), *([flow_job()] if overlay != "job" else [])]


def templates(objects: list[Object]) -> Iterator[tuple[str, Object]]:
    """Pod templates, with what they belong to."""
    for entry in objects:
        spec = entry.get("spec", {})
        if entry["kind"] in ("RayCluster", "RayJob"):
            ray = spec.get("rayClusterSpec", spec)
            for group in [{"groupName": "head", **ray["headGroupSpec"]}, *ray["workerGroupSpecs"]]:
                yield f"Ray {group['groupName']}", group["template"]
        elif "template" in spec:
            yield f"{entry['kind']} {entry['metadata'].get('name', 'of a flow')}", spec["template"]


def strict(schema: Any) -> Any:
    """The same schema, refusing fields that it does not name: Kubernetes would drop them silently."""
    if isinstance(schema, list):
        return [strict(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        inner.setdefault("additionalProperties", bool(schema.get("x-kubernetes-preserve-unknown-fields")))
    return inner


@cache
def definition(kind: str) -> Any:
    text = (SCHEMAS / f"ray.io_{kind.lower()}s.yaml").read_text()
    (found,) = (entry for entry in yaml.load(text, yaml.CSafeLoader)["spec"]["versions"] if entry["name"] == "v1")
    schema = found["schema"]["openAPIV3Schema"]
    del schema["properties"]["metadata"]
    strict_schema = strict(schema)
    strict_schema["properties"]["metadata"] = {"type": "object"}
    return strict_schema


@pytest.mark.skipif(not SCHEMAS.is_dir(), reason=f"KubeRay's definitions are not at {SCHEMAS}")
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kuberay_knows_every_field(overlay: str) -> None:
    (own,) = (entry for entry in rendered(overlay) if entry["apiVersion"] == "ray.io/v1")
    assert own["kind"] == ("RayJob" if overlay == "job" else "RayCluster")
    jsonschema.Draft202012Validator(definition(own["kind"])).validate(own)


@pytest.mark.skipif(not SCHEMAS.is_dir(), reason=f"KubeRay's definitions are not at {SCHEMAS}")
def test_an_unknown_field_is_refused() -> None:
    (own,) = (entry for entry in rendered(OVERLAYS[0]) if entry["kind"] == "RayCluster")
    wrong = json.loads(json.dumps(own))
    wrong["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(jsonschema.ValidationError, match="readynessProbe"):
        jsonschema.Draft202012Validator(definition("RayCluster")).validate(wrong)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kubernetes_knows_every_field(overlay: str) -> None:
    plain = [entry for entry in every(overlay) if entry["apiVersion"] != "ray.io/v1"]
    assert len(plain) > 5
    for entry in plain:
        kubernetes_validate.validate(entry, kubernetes_validate.latest_version(), strict=True)
        assert entry["kind"] == "Namespace" or entry["metadata"]["namespace"] == "switchyard"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_container_is_contained(overlay: str) -> None:
    for name, template in templates(every(overlay)):
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"], name
        assert pod["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault", name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys(), name
        assert all(volume.keys() <= {"name", "emptyDir"} for volume in pod["volumes"]), name
        mounted = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False, name
            assert context["capabilities"] == {"drop": ["ALL"]}, name
            assert context.get("readOnlyRootFilesystem") or name.startswith("Ray "), name
            assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"] or (
                not name.startswith("Ray ")
            ), name
            assert container["resources"]["limits"]["cpu"], name
            claims = {"data"} if name.startswith("StatefulSet") else set()
            assert {mount["name"] for mount in container["volumeMounts"]} <= mounted | claims, name
            assert ":" in container["image"], name
            if container.get("env"):
                places = {entry["name"]: entry.get("value", "") for entry in container["env"]}
                homes = [places[key] for key in ("HOME", "PREFECT_HOME") if key in places]
                mounts = tuple(mount["mountPath"] for mount in container["volumeMounts"])
                assert all(home.startswith(mounts) for home in homes), name
            if not name.startswith("Job"):
                assert {"startupProbe", "livenessProbe"} <= container.keys(), name


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_only_who_asks_kubernetes_has_a_right_to(overlay: str) -> None:
    objects = every(overlay)
    accounts = {entry["metadata"]["name"] for entry in objects if entry["kind"] == "ServiceAccount"}
    holders = set()
    for name, template in templates(objects):
        assert template["spec"]["serviceAccountName"] in accounts
        if template["spec"]["automountServiceAccountToken"]:
            holders.add(name)
    assert holders == {"Ray head"} | ({"Deployment switchyard-worker"} if overlay != "job" else set())
    for role in (entry for entry in objects if entry["kind"] == "Role"):
        for rule in role["rules"]:
            assert "*" not in [*rule["apiGroups"], *rule["resources"], *rule["verbs"]]
            assert "secrets" not in rule["resources"]
    assert not [entry for entry in objects if entry["kind"].startswith("Cluster")]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_secrets_are_references_to_what_the_docs_create(overlay: str) -> None:
    objects = every(overlay)
    docs = (ROOT / "docs/clusters.md").read_text()
    assert not [entry for entry in objects if entry["kind"] == "Secret"]
    maps = {entry["metadata"]["name"] for entry in objects if entry["kind"] == "ConfigMap"}
    assert PLANTED not in json.dumps(objects)
    for name, template in templates(objects):
        for container in template["spec"]["containers"]:
            # Prefect's worker would hide the one by the other.
            names = [entry["name"] for entry in container.get("env", [])]
            assert len(names) == len(set(names))
            for source in container.get("envFrom", []):
                if "secretRef" in source:
                    assert source["secretRef"]["name"] in SECRETS
                else:
                    assert source["configMapRef"]["name"] in maps
            for entry in container.get("env", []):
                if "valueFrom" in entry:
                    reference = entry["valueFrom"]["secretKeyRef"]
                    assert reference["key"] in SECRETS[reference["name"]], name
                else:
                    assert not re.search("TOKEN|PASSWORD|AUTH_STRING$|CONNECTION_URL", entry["name"]), name
    for entry in objects:
        if entry["apiVersion"] == "ray.io/v1":
            own = entry["spec"].get("rayClusterSpec", entry["spec"])
            assert own["authOptions"] == {"mode": "token", "secretName": "switchyard-ray"}
    for secret, keys in SECRETS.items():
        assert f"create secret generic {secret}" in docs
        assert all(f"--from-literal={key}=" in docs for key in keys)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_cluster_grows_from_nothing(overlay: str) -> None:
    (own,) = (entry["spec"] for entry in rendered(overlay) if entry["apiVersion"] == "ray.io/v1")
    ray = own.get("rayClusterSpec", own)
    assert ray["rayVersion"] == version("ray")
    assert ray["enableInTreeAutoscaling"]
    assert ray["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in ray["workerGroupSpecs"]:
        assert (group["replicas"], group["minReplicas"]) == (0, 0)
        pod = group["template"]["spec"]
        assert any("spot" in entry["key"] for entry in pod["tolerations"])
        (shared,) = (volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == "shm")
        assert shared["medium"] == "Memory"
        assert {"name": "shm", "mountPath": "/dev/shm"} in pod["containers"][0]["volumeMounts"]
    gpu = next(group for group in ray["workerGroupSpecs"] if group["groupName"] == "gpu")
    count = gpu["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
    most = {
        "overlays/one-gpu": (4, "1"),
        "overlays/eight-gpus": (1, "8"),
        "overlays/many-nodes": (64, "8"),
        "job": (1, "8"),
    }
    assert (gpu["maxReplicas"], count) == most[overlay]
    if overlay == "job":
        assert own["activeDeadlineSeconds"] > 0
        assert own["shutdownAfterJobFinishes"]


def selects(selector: Object, labels: dict[str, str]) -> bool:
    exact = all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())
    return exact and all(
        entry["operator"] == "In" and labels.get(entry["key"]) in entry["values"]
        for entry in selector.get("matchExpressions", [])
    )


def reaches(objects: list[Object], source: dict[str, str], target: dict[str, str], port: int) -> bool:
    """Whether both pods' policies let a connection through, as Kubernetes reads them."""
    policies = [entry["spec"] for entry in objects if entry["kind"] == "NetworkPolicy"]

    def open_for(own: dict[str, str], other: dict[str, str], way: str, peers: str) -> bool:
        mine = [spec for spec in policies if selects(spec["podSelector"], own) and way.title() in spec["policyTypes"]]
        return not mine or any(
            any(
                peers not in rule
                or ("podSelector" in peer and "namespaceSelector" not in peer and selects(peer["podSelector"], other))
                for peer in rule.get(peers, [{}])
            )
            and ("ports" not in rule or port in [entry["port"] for entry in rule["ports"]])
            for spec in mine
            for rule in spec.get(way, [])
        )

    return open_for(source, target, "egress", "to") and open_for(target, source, "ingress", "from")


def test_pods_reach_what_they_need_and_nothing_else() -> None:
    objects = every("overlays/many-nodes")
    pods = {name: template["metadata"]["labels"] for name, template in templates(objects)}
    for entry in objects:
        if entry["kind"] == "Service":
            assert any(selects({"matchLabels": entry["spec"]["selector"]}, labels) for labels in pods.values())
        if entry["kind"] == "NetworkPolicy":
            assert any(selects(entry["spec"]["podSelector"], labels) for labels in pods.values()), entry["metadata"]
    ray, flow, deploy = {"Ray head", "Ray cpu", "Ray gpu"}, "Job of a flow", "Job switchyard-deploy"
    server, worker, database = (
        "Deployment switchyard-prefect",
        "Deployment switchyard-worker",
        "StatefulSet switchyard-database",
    )
    ports = (4200, 5432, 6379, 8265, 30000)
    wanted = {(one, other, port) for one in ray for other in ray for port in ports}
    wanted |= {(one, "Ray head", 8265) for one in (flow, deploy)}
    wanted |= {(one, server, 4200) for one in (flow, deploy, worker)} | {(server, database, 5432)}
    found = {
        (one, other, port)
        for one in pods
        for other in pods
        for port in ports
        if reaches(objects, pods[one], pods[other], port)
    }
    assert found == wanted


def test_versions_and_names_are_the_codes() -> None:
    objects = every("overlays/one-gpu")
    images = {container["image"] for _, template in templates(objects) for container in template["spec"]["containers"]}
    assert {image.split(":")[1] for image in images if image.startswith("prefecthq/")} == {
        f"{version('prefect')}-python3.11",
        f"{version('prefect')}-python3.11-kubernetes",
    }
    assert f"registry.example/switchyard:{version('switchyard')}-gpu" in images
    (deploy,) = (entry for entry in objects if entry["metadata"].get("name") == "switchyard-deploy")
    command = deploy["spec"]["template"]["spec"]["containers"][0]["args"][0]
    (pool,) = re.findall(r"work-pool create (\S+)", command)
    (template,) = re.findall(r"--base-job-template (\S+)", command)
    assert (ROOT / template).is_file()
    worker = next(template for name, template in templates(objects) if name == "Deployment switchyard-worker")
    assert pool in worker["spec"]["containers"][0]["args"]
    entries = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    there = [entry for entry in entries if entry["name"].endswith("-kubernetes")]
    assert {entry["work_pool"]["name"] for entry in there} == {pool}
    assert {entry["name"] for entry in there} >= {
        "distill-kubernetes",
        "distill-recurring-kubernetes",
        "reap-kubernetes",
    }
    services = {
        f"http://{entry['metadata']['name']}:{port['port']}/api"
        for entry in objects
        if entry["kind"] == "Service"
        for port in entry["spec"]["ports"]
    }
    addresses = {
        entry["value"]
        for _, template in templates(objects)
        for container in template["spec"]["containers"]
        for entry in container.get("env", [])
        if entry["name"] == "PREFECT_API_URL"
    }
    assert addresses <= services
    (job,) = (entry for entry in rendered("job") if entry["kind"] == "RayJob")
    (config,) = re.findall(r"run (configs/\S+)", job["spec"]["entrypoint"])
    assert (ROOT / config).is_file()


def test_what_the_docs_apply_is_here() -> None:
    docs = (ROOT / "docs/clusters.md").read_text()
    applied = set(re.findall(r"(?:apply|delete) -k infra/kubernetes/([\w/-]+)", docs))
    assert applied == set(OVERLAYS)
    named = set(
        re.findall(r"`((?:infra|docker|configs|flows|tests|tasks)/[^`\s]*)`", docs + (ROOT / "SECURITY.md").read_text())
    )
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name).exists()] == []
