"""An evaluation on a Prefect server of its own, which comes first: Prefect reads its settings when it is imported.

python tests/flows/measuring.py FOLDER ROOT < SETTINGS
"""

import json
import sys
from pathlib import Path
from typing import Any

from flows.server import EmbeddedServer


def measured(settings: dict[str, Any], root: str) -> dict[str, Any]:
    from flows.evaluate import evaluate

    found: dict[str, Any] = evaluate(settings, root=root)
    return found


if __name__ == "__main__":
    server = EmbeddedServer(Path(sys.argv[1]) / "prefect")
    server.start()
    try:
        server.wait()
        print(json.dumps(measured(json.load(sys.stdin), sys.argv[2])))
    finally:
        server.stop()
