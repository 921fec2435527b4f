"""Which commit of the code runs: for whoever asks later why two results differ."""

import os
import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent


@cache
def commit(root: Path = ROOT) -> str | None:
    """What ``SWITCHYARD_COMMIT`` says, as in images; else twelve hex digits of the checkout that the code lies in, with
    ``-dirty`` where tracked files were changed. None where there is neither."""
    if named := os.environ.get("SWITCHYARD_COMMIT"):
        return named
    # A repository further up would be another project's.
    if not (root / ".git").exists():
        return None
    command = ["git", "--no-optional-locks", "-C", str(root), "describe", "--always", "--exclude=*", "--abbrev=12"]
    try:
        found = subprocess.run([*command, "--dirty"], capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
