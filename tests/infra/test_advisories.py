"""audit.txt: what is accepted has an id, a package and a reason; anything else is refused."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from infra.advisories import accepted

ROOT = Path(__file__).parent.parent.parent


def test_reasoned_entries_are_left_out_of_the_audit(tmp_path: Path) -> None:
    lines = [
        "# GHSA-2222-3333-4444 pillow a comment accepts nothing",
        "",
        "GHSA-m9c2-8r5x-vfgh torch only torch.load, which nothing here calls",
        "CVE-2025-12345 vllm its server is started by tests alone",
        "PYSEC-2024-7 scikit-learn reads no file of others",
    ]
    (tmp_path / "audit.txt").write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-m", "infra.advisories", str(tmp_path / "audit.txt")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [
        *("--ignore-vuln", "GHSA-m9c2-8r5x-vfgh"),
        *("--ignore-vuln", "CVE-2025-12345"),
        *("--ignore-vuln", "PYSEC-2024-7"),
    ]


@pytest.mark.parametrize(
    "line",
    [
        "GHSA-m9c2-8r5x-vfgh",
        "GHSA-m9c2-8r5x-vfgh torch",
        "GHSA-m9c2-8r5x-vfgh torch   ",
        "GHSA-m9c2-8r5x torch only torch.load",
        "GHSA-m9c2-8r5x-vfgh-9999 torch only torch.load",
        "CVE-25-1 torch only torch.load",
        "cve-2025-12345 torch only torch.load",
        "ALL-2025-1 torch only torch.load",
        "--ignore-vuln CVE-2025-12345 torch only torch.load",
        "CVE-2025-12345;true torch only torch.load",
        "CVE-2025-12345 $(true) only torch.load",
        "torch: only torch.load",
    ],
)
def test_anything_else_is_refused_in_one_line(line: str, tmp_path: Path) -> None:
    (tmp_path / "audit.txt").write_text(f"CVE-2025-12345 vllm its server is started by tests alone\n{line}\n")
    command = [sys.executable, "-m", "infra.advisories", str(tmp_path / "audit.txt")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"error: .*audit\.txt, line 2: .* accepts nothing: write an id .* and why\n", done.stderr)


def test_the_list_of_this_project_is_in_order() -> None:
    accepted((ROOT / "audit.txt").read_text())
    # pip-audit gets what this reads, and is not asked where it refuses.
    makefile = (ROOT / "Makefile").read_text()
    assert "\nACCEPTED ?= audit.txt\n" in makefile
    audit = makefile.partition("\naudit: env\n")[2]
    assert audit.startswith("\t@accepted=$$($(BIN)/python -m infra.advisories $(ACCEPTED)) || exit 1; \\\n")
    assert "\t$$accepted 2>&1)" in audit
