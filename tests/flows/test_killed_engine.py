"""A real engine that is killed while it annotates: charged once, spent twice, never more than the cap."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import ray
import tiny
from annotation import Annotation

from infra.models import ModelRef
from tasks.ledger import SpendingExhausted

ENGINE = {"max_model_len": 128, "kv_cache_gib": 0.05, "max_num_seqs": 8, "threads": 1}


def killer(folder: Path, entries: int, stop: Callable[[], bool]) -> None:
    """Kills the engine each time that so many further entries of the ledger stand."""
    seen = 0
    while not stop():
        known = len(list(folder.glob("stages/annotate/*/spending/*.json")))
        if known >= seen + entries:
            seen = known
            for entry in ray.util.list_named_actors(all_namespaces=True):
                if entry["name"].startswith("engine-") and entry["name"] != "engine-room":
                    ray.kill(ray.get_actor(entry["name"], namespace=entry["namespace"]), no_restart=False)
        time.sleep(0.05)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_an_engine_that_is_killed_never_overspends(tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "teacher", seed=1)
    model = ModelRef(name="teacher", revision="1", id=str(tmp_path / "teacher"))
    made = Annotation(tmp_path / "root", model, model, ENGINE, prompts=12, caps={"queries": 12})
    # One death is too many: with more to spend a slow machine would give the engine up first.
    made.spec.runtime.spending["factor"] = 1.0
    over = threading.Event()
    threading.Thread(target=killer, args=(made.root, 1, over.is_set), daemon=True).start()
    try:
        # Each entry of the ledger is followed by a death: the cap on spending is what ends it.
        with pytest.raises(SpendingExhausted, match=r"^budget\.spending_factor: 1 times the budget"):
            made.run()
    finally:
        over.set()
    made.spec.runtime.spending["factor"] = 4.0
    stage = made.run()
    facts = stage.facts
    assert facts["charged"]["queries"] == 12
    assert 12 < facts["spent"]["queries"] <= 4 * 12
    assert stage.manifest.tables["samples"].rows == 12
