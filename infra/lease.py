"""A run's lease: a counter in the store that its flow renews as long as it lives. Whoever would act on its silence
watches it for a while by a clock of its own: no two machines' clocks are compared."""

from infra.store import Store

RENEW_SECONDS = 10.0


def lease_path(run: str) -> str:
    return f"runs/{run}/lease"


def lease_counter(store: Store, path: str) -> bytes:
    """What stands there now; nothing where there is no lease."""
    try:
        return store.read(path)
    except FileNotFoundError:
        return b""
