"""The rooms of docs/architecture.md: who may import whom, and what must stay light."""

import ast
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {"kernels": set(), "infra": set(), "tasks": {"kernels", "infra"}, "flows": {"tasks", "infra", "kernels"}}
FILES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    """Top-level names of everything a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_import_points_up(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    above = set(ROOMS) - ROOMS[room] - {room}
    assert not imported(path) & above


@pytest.mark.parametrize("path", [p for p in FILES if p.is_relative_to(ROOT / "kernels")], ids=lambda p: p.name)
def test_kernels_know_no_files_networks_or_schedulers(path: Path) -> None:
    assert not imported(path) & {"ray", "prefect", "vllm", "boto3", "pydantic", "pathlib", "requests", "httpx"}


@pytest.mark.parametrize("path", [p for p in FILES if not p.is_relative_to(ROOT / "flows")], ids=lambda p: p.name)
def test_only_flows_know_prefect(path: Path) -> None:
    assert "prefect" not in imported(path)


@pytest.mark.parametrize("folder", ["flows", "tasks/config"])
def test_loads_without_torch_ray_or_vllm(folder: str) -> None:
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sorted((ROOT / folder).glob("*.py"))]
    script = f"import sys, {', '.join(modules)}; print([m for m in ('torch', 'ray', 'vllm') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "[]"


def test_nothing_shadows_the_kernels_room() -> None:
    import kernels

    assert Path(kernels.__file__).is_relative_to(ROOT)
    with pytest.raises(PackageNotFoundError):
        # transformers would import this package of the Hugging Face hub and find our folder instead.
        distribution("kernels")


def test_no_torchvision_that_breaks_transformers() -> None:
    try:
        distribution("torchvision")
    except PackageNotFoundError:
        return
    import torchvision  # noqa: F401
