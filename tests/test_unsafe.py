"""What no file of ours does: unpickle, run a model's own code, or load weights that are not safetensors.

Shells, SQL and HTML made of text, and unsafe YAML, are ruff's (`make check`).
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [path for room in ("kernels", "infra", "tasks", "flows") for path in sorted((ROOT / room).rglob("*.py"))]
UNPICKLE = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


def written(call: ast.Call) -> dict[str | None, str]:
    """Arguments by name, as they are written."""
    return {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}


def faults(tree: ast.AST) -> Iterator[str]:
    given = {
        ast.unparse(target): written_dict(value)
        for node in ast.walk(tree)
        if isinstance(node, ast.AnnAssign) and isinstance(value := node.value, ast.Dict)
        for target in [node.target]
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"imports {name}" for name in names if name.partition(".")[0] in UNPICKLE)
        if not isinstance(node, ast.Call):
            continue
        called, named = ast.unparse(node.func), written(node)
        # ``**place`` stands for the arguments that ``place`` was written with.
        named |= given.get(named.get(None, ""), {})
        if named.get("trust_remote_code", "False") != "False" or "True" in named.get("allow_pickle", ""):
            yield f"{called} trusts what it loads"
        if called == "torch.load":
            yield "torch.load unpickles"
        if called.startswith("Auto") and called.endswith(".from_pretrained"):
            if named.get("trust_remote_code") != "False":
                yield f"{called} may ask to run a model's own code"
            if "Model" in called and "gguf_file" not in named and named.get("use_safetensors") != "True":
                yield f"{called} may unpickle weights"


def written_dict(value: ast.Dict) -> dict[str | None, str]:
    return {
        key.value: ast.unparse(inner)
        for key, inner in zip(value.keys, value.values, strict=True)
        if isinstance(key, ast.Constant) and isinstance(key.value, str)
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_unpickled_or_trusted(path: Path) -> None:
    assert list(faults(ast.parse(path.read_text()))) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from cloudpickle import loads",
        "torch.load(path, weights_only=True)",
        "np.load(path, allow_pickle=True)",
        "LLM(trust_remote_code=wanted)",
        "AutoConfig.from_pretrained(path)",
        "AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False)",
        "place: dict = {'revision': 1}\nAutoTokenizer.from_pretrained(path, **place)",
    ],
)
def test_each_of_them_would_be_found(code: str) -> None:
    assert list(faults(ast.parse(code)))
