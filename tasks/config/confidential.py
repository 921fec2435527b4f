"""Settings stand in manifests, records and reports: secrets belong neither there, nor into complaints about them."""

import re
from typing import Any

NAME = re.compile(
    r"(^|[_-])(api[_-]?keys?|key_variable|secrets?|secret_key|passwords?|credentials?|authorization|auth|token)$",
    re.IGNORECASE,
)


def confidential(name: str) -> bool:
    """Whether what has this name may be a secret."""
    return NAME.search(name) is not None


def refuse_secrets(value: Any, place: str) -> None:
    """ValueError where settings that are passed on as they are hold what is named as a secret."""
    if isinstance(value, list):
        for number, inner in enumerate(value):
            refuse_secrets(inner, f"{place}.{number}")
    if isinstance(value, dict):
        for name, inner in value.items():
            if confidential(str(name)) and inner not in (None, True, False, ""):
                raise ValueError(
                    f"{place}.{name} looks like a secret, and settings are kept in manifests and reports: give it by "
                    "an environment variable (key_variable for an endpoint, HF_TOKEN for the hub)"
                )
            refuse_secrets(inner, f"{place}.{name}")
