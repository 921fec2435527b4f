"""A mentor's rows: what is minimised on them, where they are used, and that training heeds them."""

from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest
import torch
from test_methods import CPU, SEQUENCES, ids, llama
from toys import commit_inputs, kept_rows, save_model, stage_of

from infra.manifest import commit_manifest, load_manifest
from infra.models import ModelRef
from infra.store import LocalStore
from kernels.codec import encode_top
from kernels.divergence import divergence_N, forward_kl
from tasks.batches import Sequence, collate
from tasks.catalogue import method_of
from tasks.config import methods as config
from tasks.data import read_data
from tasks.loop import start
from tasks.methods import with_soft_labels
from tasks.schemas import KEPT
from tasks.stage import Stage, StageSpec
from tasks.student import World, head_of, hidden_states
from tasks.train import plan_of

torch.set_num_threads(1)
TRAIN = {"method": {"type": "sft"}, "steps": 4, "batch_size": 8, "micro_batch": 4, "learning_rate": 1e-2}


def logprobs(model: Any, sequence: Sequence) -> torch.Tensor:
    """Of every response position [T, V]."""
    whole = torch.cat([sequence.prompt, sequence.response])[None]
    with torch.no_grad():
        return model(whole).logits[0, len(sequence.prompt) - 1 : -1].log_softmax(-1)


@pytest.mark.parametrize("method", [config.Sft(), config.Gkd(max_new_tokens=8)], ids=lambda method: method.type)
def test_soft_labels_have_their_own_loss_whatever_the_method(method: config.Method) -> None:
    """Σ weight · (λ · KL(mentor ‖ q) + (1 − λ) · CE) on the mentor's rows, the method's loss on all others."""
    student, teacher, mentor, share = llama(0), llama(1), llama(2), 0.3
    others = method_of(method, teacher, 50).loss
    taught = Sequence("d", ids(1, 6, 8), ids(30, 31, 2), weight=0.7)
    blob = encode_top(logprobs(mentor, taught), mass=1.0, limit=50, min_prob=0.0, resolution=55)
    mixed = [SEQUENCES[0], replace(taught, distributions=blob, soft=True), *SEQUENCES[1:]]

    def total(loss: Any, rows: list[Sequence]) -> tuple[float, torch.Tensor]:
        batch = collate(rows, CPU)
        hidden_NH = hidden_states(student, batch.ids_BL).flatten(0, 1)[batch.where_N]
        found, losses_N = loss(hidden_NH, head_of(student), batch, rows)
        return found.item(), losses_N.double()

    found, losses_N = total(with_soft_labels(others, share, 50), mixed)
    plain, plain_N = total(others, SEQUENCES)
    q_TV = logprobs(student, taught)
    hard_T = -q_TV.gather(-1, taught.response[:, None])[:, 0].double()
    soft_T = divergence_N(logprobs(mentor, taught), q_TV, forward_kl()).double()
    own_T = share * soft_T + (1 - share) * hard_T
    # The codec rounds what it keeps.
    assert found == pytest.approx(plain + 0.7 * own_T.sum().item(), rel=5e-3)
    torch.testing.assert_close(losses_N[4:7], own_T, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(torch.cat([losses_N[:4], losses_N[7:]]), plain_N, rtol=1e-5, atol=1e-6)


def labelled(store: LocalStore, rows: pa.Table, sure_of: int) -> str:
    """Kept rows of a mentor that would always write one token."""
    logprobs_V = torch.full((300,), -30.0)
    logprobs_V[sure_of] = 0.0
    blobs = [
        encode_top(logprobs_V.expand(len(ids), -1), mass=1.0, limit=4, min_prob=0.0, resolution=55)
        for ids in rows["token_ids"].to_pylist()
    ]
    named = [f"mentor-{number}" for number in range(rows.num_rows)]
    rows = rows.set_column(0, "row_id", pa.array(named)).set_column(1, "prompt_id", pa.array(named))
    rows = rows.drop_columns(["distributions"]).append_column("distributions", pa.array(blobs, pa.binary()))
    stage: Stage[Any] = Stage(StageSpec(stage="mentor-keep", module="", root=store.uri), None)  # type: ignore[arg-type]
    stage.write_table("kept", rows.select(KEPT.names).cast(KEPT))
    stage.write_table("charged", rows.select(["prompt_id", "source", "prompt_token_ids"]).slice(0, 0))
    return commit_manifest(store, stage.manifest).path


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> LocalStore:
    return LocalStore(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def inputs(store: LocalStore) -> dict[str, str]:
    models = {name: save_model(store, name, seed=seed) for seed, name in enumerate(("student", "teacher", "mentor"))}
    models["stranger"] = ModelRef.model_validate({**models["mentor"].model_dump(), "tokenizer_hash": "another"})
    return {
        **commit_inputs(store, models, kept_rows(24)),
        "mentor-keep": labelled(store, kept_rows(20, seed=5), sure_of=200),
    }


def test_a_mentors_rows_are_trained_on_and_measure_nothing(store: LocalStore, inputs: dict[str, str]) -> None:
    own, soft = ([load_manifest(store, inputs[name])] for name in ("keep", "mentor-keep"))
    options = {"seed": 1, "validation_share": 0.3, "max_length": 64, "max_new_tokens": 8}
    plain, data = read_data(store, own, **options), read_data(store, own, **options, soft=soft)
    assert data.validation["row_id"].to_pylist() == plain.validation["row_id"].to_pylist() != []
    assert data.prompts.equals(plain.prompts)
    marks = dict(zip(data.rows["row_id"].to_pylist(), data.rows["soft"].to_pylist(), strict=True))
    assert sum(marks.values()) == 20
    assert all(soft == name.startswith("mentor-") for name, soft in marks.items())
    assert len(marks) == plain.rows.num_rows + 20


def test_training_follows_the_soft_labels(store: LocalStore, inputs: dict[str, str]) -> None:
    """The mentor's text is that of the other rows; only its distributions name a token that no row has."""

    def sure(share: float | None) -> float:
        settings = {} if share is None else {"soft_rows": "mentor-keep", "soft_share": share}
        stage = stage_of(store, inputs, {**TRAIN, "validation_share": 0.2}, student="student", **settings)
        loop = start(plan_of(stage), World(0, 1, CPU), None)
        assert loop
        for _ in range(TRAIN["steps"]):
            loop.step()
        assert loop.feed.sizes().get("soft_rows") == (None if share is None else 20)
        with loop.student.whole() as model, torch.no_grad():
            return float(model(torch.tensor([[1, 5, 6]])).logits[0, -1].log_softmax(-1)[200])

    assert sure(1.0) > sure(0.0) + 1
    assert sure(None) < sure(1.0)


def test_a_mentor_of_another_family_is_refused(store: LocalStore, inputs: dict[str, str]) -> None:
    stage = stage_of(store, inputs, TRAIN, soft_rows="mentor-keep", soft_share=0.5, mentor="stranger")
    with pytest.raises(ValueError, match=r"mentor\.model: its tokenizer"):
        plan_of(stage)
