"""Replay: the share is kept, every run draws anew, and rows that would mean something else stay out."""

import pyarrow as pa
import pytest

from infra.manifest import Manifest, commit_manifest
from infra.parts import commit_part, read_rows, table_entry
from infra.store import LocalStore
from tasks import schemas
from tasks.replay import ReplaySettings, run
from tasks.stage import Stage, StageSpec


class Kept:
    """Makes stages that kept rows, and runs the replay over them."""

    def __init__(self, root):
        self.root, self.store, self.count = root, LocalStore(root), 0
        self.models = self.manifest("models", models={"teacher": {"name": "t", "revision": "r", "tokenizer_hash": "a"}})

    def manifest(self, stage, tables=(), inputs=(), **facts):
        self.count += 1
        made = Manifest(
            stage=stage,
            module="m",
            version=1,
            fingerprint=f"{self.count:016d}",
            settings={},
            inputs={other.stage: other.path for other in inputs},
            facts=facts,
        )
        for table, parts in dict(tables).items():
            made.tables[table] = table_entry(
                schemas.KEPT, [commit_part(self.store, made.folder, table, n, rows) for n, rows in enumerate(parts)]
            )
        return commit_manifest(self.store, made)

    def kept(self, name, rows, models=None, blobs=True):
        """Rows ``name-0`` …, in two parts."""
        made = [
            {
                "row_id": f"{name}-{n}",
                "prompt_id": f"{name}-p{n}",
                "source": "s",
                "prompt_token_ids": [1],
                "weight": 1.0,
            }
            | {"token_ids": [2], "distributions": b"x" if blobs else None}
            for n in range(rows)
        ]
        parts = [pa.Table.from_pylist(half, schemas.KEPT) for half in (made[: rows // 3], made[rows // 3 :])]
        return self.manifest("keep", {"kept": parts}, [models or self.models])

    def replay(self, own, earlier, **settings):
        inputs = {"models": self.models.path, "keep": own.path}
        inputs |= {f"earlier-{n}": made.path for n, made in enumerate(earlier)}
        names = [name for name in inputs if name.startswith("earlier")]
        values = {"share": 0.25, "draw": 2, "rows": ["keep"], "earlier": names, **settings}
        spec = StageSpec(stage="replay", module="tasks.replay", root=str(self.root), settings=values, inputs=inputs)
        stage = Stage(spec, ReplaySettings.model_validate(values))
        run(stage)
        return (
            stage.facts,
            read_rows(self.store, stage.manifest, "kept"),
            read_rows(self.store, stage.manifest, "charged"),
        )


@pytest.fixture
def made(tmp_path):
    return Kept(tmp_path)


def ids(rows):
    return set(rows["row_id"].to_pylist())


def test_a_share_of_all_rows_from_all_earlier_runs(made):
    facts, kept, charged = made.replay(made.kept("new", 30), [made.kept("a", 20), made.kept("b", 20)])
    assert kept.num_rows == facts["drawn"] == 10  # a quarter of 40
    assert {name.partition("-")[0] for name in ids(kept)} == {"a", "b"}
    assert set(charged["prompt_id"].to_pylist()) == set(kept["prompt_id"].to_pylist())
    assert (kept.schema, charged.schema) == (schemas.KEPT, schemas.CHARGED)


def test_each_run_draws_anew_and_the_same_when_done_again(made):
    own, earlier = made.kept("new", 30), [made.kept("a", 50)]
    first = ids(made.replay(own, earlier)[1])
    assert ids(made.replay(own, earlier)[1]) == first
    assert ids(made.replay(own, earlier, draw=3)[1]) != first


def test_fewer_rows_than_the_share_are_all_taken(made):
    facts, kept, _ = made.replay(made.kept("new", 30), [made.kept("a", 4)], share=0.5)
    assert (facts["wanted"], facts["drawn"], kept.num_rows) == (30, 4, 4)


def test_rows_of_another_tokenizer_or_without_distributions_stay_out(made):
    other = made.manifest("models", models={"teacher": {"name": "u", "revision": "r", "tokenizer_hash": "b"}})
    earlier = [made.kept("a", 9, models=other), made.kept("b", 6, blobs=False), made.kept("c", 5)]
    facts, kept, _ = made.replay(made.kept("new", 30), earlier, share=0.5, stored=True)
    assert {name.partition("-")[0] for name in ids(kept)} == {"c"}
    assert facts["left_out"] == {"other_tokenizer": 9, "no_distributions": 6}
