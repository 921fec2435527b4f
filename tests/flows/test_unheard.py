"""A flow whose lines nobody reads any more, its worker having been killed, goes on."""

import subprocess
import sys
from pathlib import Path

FLOW = """
import logging, sys
from pathlib import Path
from prefect.logging.handlers import PrefectConsoleHandler
from flows.console import outlive_readers
if sys.argv[2] == "outlives":
    outlive_readers()
log = logging.getLogger("flow")
log.addHandler(PrefectConsoleHandler())
sys.stdin.read()
for _ in range(3):
    log.warning("nobody reads this")
Path(sys.argv[1]).write_text("done")
"""


def goes_on(place: Path, how: str) -> bool:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    flow = subprocess.Popen([sys.executable, "-c", FLOW, str(place), how], **pipes)
    assert flow.stdin
    assert flow.stdout
    flow.stdout.close()
    flow.stdin.close()
    assert (flow.wait(timeout=120) == 0) == place.exists()
    return place.exists()


def test_a_flow_outlives_who_reads_its_lines(tmp_path: Path) -> None:
    assert goes_on(tmp_path / "one", "outlives")
    # As it would be otherwise: where this holds no more, the code above is not needed any more.
    assert not goes_on(tmp_path / "other", "does not")
