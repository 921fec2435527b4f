"""Known vulnerabilities of dependencies that are accepted: audit.txt, as arguments of pip-audit.

python -m infra.advisories audit.txt
"""

import re
import sys
from pathlib import Path

# As GitHub, MITRE and PyPA number them; pip-audit knows each of a vulnerability's ids.
ENTRY = re.compile(
    r"(?P<id>GHSA(-[23456789cfghjmpqrvwx]{4}){3}|(CVE|PYSEC)-\d{4}-\d+)\s+"
    r"(?P<package>[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?)\s+(?P<reason>\S.*)"
)


def accepted(text: str) -> list[str]:
    """Ids of the entries. ValueError for the first line that is neither an entry nor a comment."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        entry = ENTRY.fullmatch(line.strip())
        if not entry:
            raise ValueError(
                f"line {number}: {line!r} accepts nothing: write an id (GHSA-…, CVE-… or PYSEC-…), the package, and why"
            )
        found.append(entry["id"])
    return found


if __name__ == "__main__":
    try:
        print(*(f"--ignore-vuln {name}" for name in accepted(Path(sys.argv[1]).read_text())))
    except ValueError as error:
        sys.exit(f"error: {sys.argv[1]}, {error}")
