"""Whether an endpoint can be asked: its key is there, it answers, and it has the model. Costs no tokens."""

import os

import httpx

from tasks.config.models import OpenAIModel

SECONDS = 20.0
# Models named in a complaint.
SHOWN = 5


def reach(source: OpenAIModel) -> None:
    """ValueError with the fix where the endpoint would refuse every request."""
    headers = {}
    if source.key_variable:
        if not os.environ.get(source.key_variable):
            raise ValueError(f"key_variable: {source.key_variable} is not set: export it with the endpoint's key")
        headers["Authorization"] = f"Bearer {os.environ[source.key_variable]}"
    try:
        response = httpx.get(f"{source.base_url.rstrip('/')}/models", headers=headers, timeout=SECONDS)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ValueError(
            f"base_url: {source.base_url} does not answer ({type(error).__name__}): correct it, or start the server"
        ) from None
    if response.status_code in (401, 403):
        key = f"the key in {source.key_variable}" if source.key_variable else "requests without a key: set key_variable"
        raise ValueError(f"key_variable: {source.base_url} refuses {key}")
    # Not every server lists its models.
    known = served(response) if response.status_code == 200 else []
    if known and source.model not in known:
        raise ValueError(
            f"model: {source.base_url} has no {source.model!r}; it has {', '.join(known[:SHOWN])}"
            + (f" and {len(known) - SHOWN} more" if len(known) > SHOWN else "")
        )


def served(response: httpx.Response) -> list[str]:
    """Names of the models in the reply, none where it lists none."""
    try:
        return [entry["id"] for entry in response.json()["data"]]
    except (ValueError, KeyError, TypeError):
        return []
