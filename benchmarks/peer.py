"""TRL beside us: an environment of its own with the released package, and scripts that run in it."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.conditions import CACHE

VERSION = "1.16.0"
# One that still has MiniLLM, and of what else it needs older ones than it says.
WITH_MINILLM = "0.26.2"
BESIDE = {WITH_MINILLM: ["transformers<5"]}
SCRIPT = Path(__file__).parent / "trl_side.py"


def environment(release: str = VERSION) -> Path:
    """The python of the environment of a release of TRL, made if it is missing."""
    folder = CACHE / f"trl-{release}"
    python = folder / "bin" / "python"
    if not (folder / ".installed").exists():
        print(f"installing TRL {release} into {folder}", file=sys.stderr)
        uv = Path(sys.executable).parent / "uv"
        subprocess.run([str(uv), "venv", "--quiet", "--clear", "--python", sys.executable, str(folder)], check=True)
        find_links = os.environ.get("UV_FIND_LINKS") or os.environ.get("PIP_FIND_LINKS")
        torch_from = [] if find_links else ["--torch-backend", "cpu"]
        subprocess.run(
            [
                str(uv),
                "pip",
                "install",
                "--quiet",
                "--python",
                str(python),
                *torch_from,
                f"trl=={release}",
                *BESIDE.get(release, []),
            ],
            check=True,
            env={**os.environ, **({"UV_FIND_LINKS": find_links} if find_links else {})},
        )
        (folder / ".installed").touch()
    return python


@contextmanager
def trl(command: str, release: str = VERSION, **options: Any) -> Iterator[Callable[[], dict[str, Any]]]:
    """Within, TRL's side runs a command of ``trl_side.py``: each call lets it take one turn, and is what it reports."""
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            [str(environment(release)), str(SCRIPT), command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process,
    ):
        assert process.stdin
        assert process.stdout
        sent, lines = process.stdin, process.stdout

        def turn() -> dict[str, Any]:
            sent.write("\n")
            sent.flush()
            # The trainer prints lines of its own.
            answer = next((line for line in lines if line.startswith('{"')), None)
            if answer is None:
                errors.seek(0)
                raise RuntimeError(f"TRL's side failed:\n{errors.read()[-3000:]}")
            result: dict[str, Any] = json.loads(answer)
            return result

        sent.write(json.dumps(options) + "\n")
        try:
            yield turn
        finally:
            process.kill()
