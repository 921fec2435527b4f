"""TRL beside us: an environment of its own with the released package, and scripts that run in it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.conditions import CACHE

VERSION = "1.16.0"
SCRIPT = Path(__file__).parent / "trl_side.py"


def environment() -> Path:
    """The python of TRL's environment, made if it is missing."""
    folder = CACHE / f"trl-{VERSION}"
    python = folder / "bin" / "python"
    if not (folder / ".installed").exists():
        print(f"installing TRL {VERSION} into {folder}", file=sys.stderr)
        uv = Path(sys.executable).parent / "uv"
        subprocess.run([str(uv), "venv", "--quiet", "--clear", "--python", sys.executable, str(folder)], check=True)
        find_links = os.environ.get("UV_FIND_LINKS") or os.environ.get("PIP_FIND_LINKS")
        torch_from = [] if find_links else ["--torch-backend", "cpu"]
        subprocess.run(
            [str(uv), "pip", "install", "--quiet", "--python", str(python), *torch_from, f"trl=={VERSION}"],
            check=True,
            env={**os.environ, **({"UV_FIND_LINKS": find_links} if find_links else {})},
        )
        (folder / ".installed").touch()
    return python


def trl(command: str, **options: Any) -> dict[str, Any]:
    """What a command of ``trl_side.py`` reports."""
    done = subprocess.run(
        [str(environment()), str(SCRIPT), command],
        input=json.dumps(options),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"TRL's side failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result
