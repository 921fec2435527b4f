"""Methods, batches and data: the right positions, the right loss, the right rows."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from infra.manifest import Manifest
from infra.store import LocalStore
from kernels import gate
from kernels.codec import encode_sampled, encode_top
from kernels.divergence import divergence_N, forward_kl, jsd
from tasks.batches import Order, Sequence, collate, micro_batches
from tasks.catalogue import gate_of, method_of
from tasks.config import methods as config
from tasks.data import read_data
from tasks.methods import Divergent, Together, cross_entropy
from tasks.schemas import CHARGED, KEPT
from tasks.stage import Stage, StageSpec
from tasks.student import check_projection, head_of, hidden_states

torch.set_num_threads(1)
CPU = torch.device("cpu")


def llama(seed: int, vocabulary: int = 50, hidden: int = 32, **more: Any) -> Any:
    torch.manual_seed(seed)
    shape: dict[str, Any] = {"hidden_size": hidden, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.3}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **shape, **heads, **more)).eval()


def ids(*values: int) -> Tensor:
    return torch.tensor(values)


SEQUENCES = [
    Sequence("a", ids(1, 5), ids(7, 8, 9, 2)),
    Sequence("b", ids(1, 4, 6, 11), ids(12, 2), weight=0.5),
    Sequence("c", ids(3), ids(20, 21, 22, 23, 24, 2), on_policy=True),
]


def test_batch_predicts_each_response_token_from_the_one_before_it() -> None:
    batch = collate(SEQUENCES, CPU)
    assert batch.ids_BL.shape == (3, 7)
    # The last prompt position predicts the first response token, the last but one response token predicts the end.
    assert batch.where_N.tolist() == [1, 2, 3, 4, 7 + 3, 7 + 4, 14 + 0, 14 + 1, 14 + 2, 14 + 3, 14 + 4, 14 + 5]
    assert batch.targets_N.tolist() == [7, 8, 9, 2, 12, 2, 20, 21, 22, 23, 24, 2]
    assert batch.weights_N.tolist() == [1.0] * 4 + [0.5] * 2 + [1.0] * 6
    assert batch.on_policy_N.tolist() == [False] * 6 + [True] * 6


def test_cross_entropy_is_that_of_transformers_and_padding_never_counts() -> None:
    model, batch = llama(0), collate(SEQUENCES[:2], CPU)
    hidden_NH = hidden_states(model, batch.ids_BL).flatten(0, 1)[batch.where_N]
    loss, losses_N = cross_entropy(hidden_NH, head_of(model), batch)
    expected = []
    for sequence in SEQUENCES[:2]:
        whole = torch.cat([sequence.prompt, sequence.response])
        labels = whole.clone()
        labels[: len(sequence.prompt)] = -100
        expected.append(model(input_ids=whole[None], labels=labels[None]).loss * len(sequence.response))
    assert losses_N[:4].sum() == pytest.approx(expected[0].item(), rel=1e-5)
    assert loss.item() == pytest.approx((expected[0] + 0.5 * expected[1]).item(), rel=1e-5)


def divergent(student: Any, teacher: Any, sequences: list[Sequence], vocabulary: int) -> tuple[Tensor, Tensor]:
    batch = collate(sequences, CPU)
    hidden_NH = hidden_states(student, batch.ids_BL).flatten(0, 1)[batch.where_N]
    return Divergent(teacher, forward_kl(), vocabulary).loss(hidden_NH, head_of(student), batch, sequences)


def test_divergence_is_that_of_the_logits_over_the_shared_vocabulary() -> None:
    student, teacher = llama(0, vocabulary=50), llama(1, vocabulary=56, hidden=48)
    _, losses_N = divergent(student, teacher, SEQUENCES, 50)
    expected = []
    for sequence in SEQUENCES:
        whole_1L = torch.cat([sequence.prompt, sequence.response])[None]
        first, last = len(sequence.prompt) - 1, len(sequence) - 1
        logits = [model(input_ids=whole_1L).logits[0, first:last, :50] for model in (teacher, student)]
        expected.append(divergence_N(logits[0], logits[1], forward_kl()))
    torch.testing.assert_close(losses_N, torch.cat(expected).detach(), rtol=1e-4, atol=1e-5)


def loss_of(method: Any, student: Any, sequences: list[Sequence]) -> float:
    """The method's loss, summed over response tokens."""
    batch = collate(sequences, torch.device("cpu"))
    hidden_NH = hidden_states(student, batch.ids_BL).flatten(0, 1)[batch.where_N]
    loss, losses_N = method.loss(hidden_NH, head_of(student), batch, sequences)
    weights_N = batch.weights_N.to(losses_N.dtype)
    assert (losses_N * weights_N).sum().item() == pytest.approx(loss.item(), rel=1e-5)
    return loss.item()


def test_teacher_equal_to_student_gives_no_loss() -> None:
    loss, losses_N = divergent(llama(3), llama(3), SEQUENCES, 50)
    assert abs(loss.item()) < 1e-6
    assert losses_N.abs().max() < 1e-6


def test_no_sequences_give_no_loss() -> None:
    loss, losses_N = divergent(llama(0), llama(1), [], 50)
    assert loss.item() == 0.0
    assert len(losses_N) == 0


@pytest.mark.parametrize("decoder", ["blockwise", "reference"])
def test_rollout_brings_the_teachers_hidden_states_along(decoder: str) -> None:
    student, teacher = llama(0), llama(1)
    method = method_of(config.Switch(max_new_tokens=9, decoder=decoder, block=3), teacher, 50)
    assert isinstance(method, Together)
    prompts = [ids(1, 5, 6), ids(1, 9)]
    rollout = method.rollout(student, prompts, [11, 12], [2])
    assert rollout.teacher_hidden is not None
    rolled = [
        Sequence(str(i), prompt, tokens, teacher_hidden_TG=hidden_TG)
        for i, (prompt, tokens, hidden_TG) in enumerate(
            zip(prompts, rollout.tokens, rollout.teacher_hidden, strict=True)
        )
    ]
    unread = [Sequence(s.name, s.prompt, s.response) for s in rolled]
    # Rows and rollouts in one micro-batch keep their places.
    mixed_NG = method.teacher_hidden([rolled[0], SEQUENCES[0], rolled[1], SEQUENCES[1]])
    read_NG = method.teacher_hidden([unread[0], SEQUENCES[0], unread[1], SEQUENCES[1]])
    torch.testing.assert_close(mixed_NG, read_NG, rtol=1e-4, atol=1e-4)


def test_a_switch_step_asks_the_teacher_for_nothing_behind_its_rollout() -> None:
    student, teacher, read = llama(0), llama(1), []
    teacher.model.register_forward_pre_hook(lambda *_: read.append(1))
    method = method_of(config.Switch(max_new_tokens=9, block=3), teacher, 50)
    prompts = [ids(1, 5, 6), ids(1, 9)]
    rollout = method.rollout(student, prompts, [11, 12], [2])
    assert rollout.teacher_hidden is not None
    asked = len(read)
    assert asked > 0
    rolled = [
        Sequence("", prompt, tokens, on_policy=True, teacher_hidden_TG=hidden_TG)
        for prompt, tokens, hidden_TG in zip(prompts, rollout.tokens, rollout.teacher_hidden, strict=True)
    ]
    loss = loss_of(method, student, rolled)
    assert len(read) == asked
    # Without its hidden states it is read once, to the same loss.
    again = loss_of(method, student, [replace(sequence, teacher_hidden_TG=None) for sequence in rolled])
    assert len(read) == asked + 1
    assert again == pytest.approx(loss, rel=1e-4)


def test_gkd_minimises_the_jsd_on_what_the_student_writes_alone() -> None:
    student, teacher = llama(0), llama(1)
    method = method_of(config.Gkd(max_new_tokens=7), teacher, 50)
    prompts = [ids(1, 5, 6), ids(1, 9)]
    rollout = method.rollout(student, prompts, [11, 12], [2])
    assert rollout.stats.intervention_rate == 0.0
    rolled = [Sequence("", *pair, on_policy=True) for pair in zip(prompts, rollout.tokens, strict=True)]
    loss = loss_of(method, student, rolled)
    expected = 0.0
    for sequence in rolled:
        whole, start = torch.cat([sequence.prompt, sequence.response])[None], len(sequence.prompt) - 1
        p_TV, q_TV = (model(whole).logits[0, start:-1] for model in (teacher, student))
        expected += divergence_N(p_TV, q_TV, jsd(0.5)).sum().item()
    assert loss == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_kd_mixes_forward_kl_and_cross_entropy(share: float) -> None:
    student, teacher = llama(0), llama(1)
    found = loss_of(method_of(config.Kd(cross_entropy_share=share), teacher, 50), student, SEQUENCES)
    kl, hard = (
        loss_of(method, student, SEQUENCES)
        for method in (Divergent(teacher, forward_kl(), 50), method_of(config.Sft(), None, 50))
    )
    assert found == pytest.approx((1 - share) * kl + share * hard, rel=1e-5)


@pytest.mark.parametrize("mode", ["top", "sampled"])
def test_stored_distributions_stand_in_for_the_teacher(mode: str) -> None:
    student, teacher = llama(0), llama(1)

    def stored(sequence: Sequence) -> Sequence:
        whole, start = torch.cat([sequence.prompt, sequence.response])[None], len(sequence.prompt) - 1
        with torch.no_grad():
            logprobs_TV = teacher(whole).logits[0, start:-1].log_softmax(-1)
        # All of the fifty tokens: only their codes are rounded.
        if mode == "top":
            blob = encode_top(logprobs_TV, mass=1.0, limit=50, min_prob=0.0, resolution=55)
        else:
            blob = encode_sampled(logprobs_TV, torch.Generator().manual_seed(0), grain=1 / 250, resolution=55)
        return replace(sequence, distributions=blob, on_policy=False)

    rows, rolled = [stored(sequence) for sequence in SEQUENCES], Sequence("", ids(1, 5), ids(6, 7, 2), on_policy=True)
    live = loss_of(Divergent(teacher, jsd(0.5), 50), student, [*rows, rolled])
    assert loss_of(Divergent(teacher, jsd(0.5), 50, stored=True), student, [*rows, rolled]) == pytest.approx(
        live, rel=0.02
    )
    alone = loss_of(Divergent(None, jsd(0.5), 50, stored=True), student, rows)
    assert alone == pytest.approx(loss_of(Divergent(teacher, jsd(0.5), 50), student, rows), rel=0.02)
    with pytest.raises(ValueError, match=r"set sampling\.distributions"):
        loss_of(Divergent(None, jsd(0.5), 50, stored=True), student, [replace(rows[0], distributions=None)])


def test_opd_follows_the_advantage_of_each_drawn_token() -> None:
    student, teacher = llama(0), llama(1)
    method = method_of(config.Opd(max_new_tokens=6), teacher, 50)
    prompts = [ids(1, 5, 6), ids(1, 9)]
    rollout = method.rollout(student, prompts, [11, 12], [2])
    rolled = [Sequence("", *pair, on_policy=True) for pair in zip(prompts, rollout.tokens, strict=True)]
    batch = collate(rolled, CPU)
    hidden_NH = hidden_states(student, batch.ids_BL).flatten(0, 1)[batch.where_N].detach().requires_grad_()
    loss, losses_N = method.loss(hidden_NH, head_of(student), batch, rolled)
    loss.backward()
    log_q_NV = (hidden_NH.detach() @ head_of(student).weight_VH.detach().T).requires_grad_()
    with torch.no_grad():
        log_p_NV = torch.cat(
            [
                teacher(torch.cat([row.prompt, row.response])[None]).logits[0, len(row.prompt) - 1 : -1].log_softmax(-1)
                for row in rolled
            ]
        )
    chosen_N = log_q_NV.log_softmax(-1).gather(-1, batch.targets_N[:, None])[:, 0]
    advantage_N = (log_p_NV.gather(-1, batch.targets_N[:, None])[:, 0] - chosen_N).detach()
    (-advantage_N * chosen_N).sum().backward()
    assert log_q_NV.grad is not None
    torch.testing.assert_close(
        hidden_NH.grad, log_q_NV.grad @ head_of(student).weight_VH.detach(), rtol=1e-3, atol=1e-5
    )
    torch.testing.assert_close(losses_N.float(), -advantage_N, rtol=1e-4, atol=1e-5)


def test_skd_keeps_drafts_that_are_among_the_teachers_best() -> None:
    student, teacher = llama(0), llama(1)
    method = method_of(config.Skd(max_new_tokens=12, top_k=10, block=3), teacher, 50)
    prompts = [ids(1, 5, 6), ids(1, 9), ids(1, 30)]
    rollout = method.rollout(student, prompts, [11, 12, 13], [2])
    assert 0 < rollout.stats.intervention_rate < 1
    for prompt, tokens, wrote in zip(prompts, rollout.tokens, rollout.teacher_wrote, strict=True):
        logits_TV = teacher(torch.cat([prompt, tokens])[None]).logits[0, len(prompt) - 1 : -1]
        rank_T = (logits_TV > logits_TV.gather(-1, tokens[:, None])).sum(-1)
        assert (rank_T[~wrote] < 10).all()
    rows = [Sequence("", *pair, on_policy=True) for pair in zip(prompts, rollout.tokens, strict=True)]
    kl = loss_of(Divergent(teacher, forward_kl(), 50), student, rows)
    assert loss_of(method, student, rows) == pytest.approx(kl, rel=1e-6)


def test_imitkd_rolls_out_every_sequence_and_minimises_forward_kl() -> None:
    method = method_of(config.Imitkd(), llama(1), 50)
    assert method.on_policy_share == 1.0
    assert method.divergence == forward_kl()


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (config.ExponentialDecay(floor=0.1), gate.ExponentialDecay(floor=0.1, log_base=4.0)),
        (config.Linear(), gate.LinearDecay(length=128, log_base=4.0)),
        (config.ExponentialGrowth(rate=0.2), gate.ExponentialGrowth(rate=0.2, log_base=4.0)),
        (config.Constant(value=0.3), gate.Constant(value=0.3, log_base=4.0)),
        (config.MixIn(), gate.Coin(teacher_share=0.2)),
        (config.RandomTeacher(), gate.Coin(teacher_share=0.5)),
        (config.Adaptive(factor=2.0, window=4), gate.Adaptive(factor=2.0, window=4)),
    ],
)
def test_every_gate_of_the_settings_is_one_of_the_kernels(chosen: Any, expected: gate.Gate) -> None:
    assert gate_of(config.Switch(gate=chosen, jsd_log_base=4.0)) == expected


def test_projection_is_checked_against_the_models_own_logits() -> None:
    shape: dict[str, Any] = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    check_projection(llama(0), "student")
    check_projection(Gemma2ForCausalLM(Gemma2Config(**shape, **heads, final_logit_softcapping=0.5)).eval(), "student")
    scaled = GraniteForCausalLM(GraniteConfig(**shape, num_attention_heads=2, logits_scaling=8.0)).eval()
    with pytest.raises(ValueError, match="teacher: GraniteForCausalLM makes its logits in a way"):
        check_projection(scaled, "teacher")


def test_order_visits_all_items_and_shuffles_each_visit_anew() -> None:
    order = Order(7, seed=1, name="rows")
    visits = [[order.at(7 * visit + i) for i in range(7)] for visit in range(3)]
    assert [[visit for _, visit in draws] for draws in visits] == [[0] * 7, [1] * 7, [2] * 7]
    items = [[item for item, _ in draws] for draws in visits]
    assert all(sorted(draws) == list(range(7)) for draws in items)
    assert items[0] != items[1]
    assert Order(7, seed=1, name="rows").at(11) == order.at(11)


def test_micro_batches_are_as_many_as_asked_for() -> None:
    # Of equal length the first comes first, so that a resumed run adds up in the same order.
    assert list(micro_batches([5, 3, 9, 3, 5], 2, 4)) == [[2, 0], [4, 1], [3], []]
    assert collate([], CPU).ids_BL.shape == (1, 1)


def test_data_leaves_out_what_does_not_fit_and_keeps_prompts_on_one_side(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    lengths = [(3, 4), (10, 4), (3, 20), (3, 0)] + [(3, 4)] * 200
    kept, charged = [], []
    for i, (prompt, response) in enumerate(lengths):
        ids_ = {"row_id": f"r{i}", "prompt_id": f"p{i // 2}", "sample_id": "", "source": ""}
        kept.append(ids_ | {"prompt_token_ids": [1] * prompt, "token_ids": [2] * response, "weight": 1.0})
        charged.append({name: kept[-1][name] for name in CHARGED.names})
    manifests = []
    # Both stages' annotations, the first of which are listed twice.
    for name, rows in (("keep", (kept, charged)), ("again", (kept[:0], charged[:2]))):
        stage: Stage[Any] = Stage(StageSpec(stage=name, module="", root=store.uri), None)  # type: ignore[arg-type]
        stage.write_table("kept", pa.Table.from_pylist(rows[0], KEPT))
        stage.write_table("charged", pa.Table.from_pylist(rows[1], CHARGED))
        manifests.append(stage.manifest)

    def read(inputs: list[Manifest], max_new_tokens: int) -> Any:
        return read_data(store, inputs, seed=1, validation_share=0.3, max_length=16, max_new_tokens=max_new_tokens)

    data = read(manifests, 8)
    assert data.left_out["rows_too_long"] == 1
    assert data.left_out["rows_empty"] == 1
    assert data.left_out["prompts_too_long"] == 0
    assert data.rows.num_rows + data.validation.num_rows == 202
    train, held_out = (set(table["prompt_id"].to_pylist()) for table in (data.rows, data.validation))
    assert not train & held_out
    assert 10 < len(held_out) < 50
    prompts = data.prompts["prompt_id"].to_pylist()
    assert len(set(prompts)) == len(prompts) == 102 - data.left_out["prompts_of_validation"]
    assert not set(prompts) & held_out
    assert read(manifests, 0).prompts.num_rows == 0
    assert read(manifests, 13).left_out["prompts_too_long"] == 0
    assert read(manifests, 14).prompts.num_rows == 0


def test_auxiliary_rows_are_trained_on_with_their_weight_and_validate_nothing(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    manifests = {}
    for name, weight in (("keep", 1.0), ("auxiliary", 0.25)):
        ids_ = [{"row_id": f"{name}{i}", "prompt_id": f"p{i}", "sample_id": "", "source": ""} for i in range(100)]
        tokens = {"prompt_token_ids": [1, 2], "token_ids": [2] * 3, "weight": weight}
        long = {"prompt_token_ids": [1] * 20}
        stage: Stage[Any] = Stage(StageSpec(stage=name, module="", root=store.uri), None)  # type: ignore[arg-type]
        rows = [row | tokens | (long if row["row_id"] == "auxiliary0" else {}) for row in ids_]
        stage.write_table("kept", pa.Table.from_pylist(rows, KEPT))
        if name == "keep":
            stage.write_table("charged", pa.Table.from_pylist(ids_, CHARGED))
        manifests[name] = stage.manifest

    def read(auxiliary: list[Manifest]) -> Any:
        shares: dict[str, Any] = {"validation_share": 0.3, "max_length": 16, "max_new_tokens": 4}
        return read_data(store, [manifests["keep"]], auxiliary, seed=1, **shares)

    plain, data = read([]), read([manifests["auxiliary"]])
    assert data.validation.equals(plain.validation)
    assert data.prompts.equals(plain.prompts)
    assert "auxiliary_of_validation" not in plain.left_out
    held_out = set(plain.validation["prompt_id"].to_pylist())
    beside = data.rows.slice(plain.rows.num_rows).to_pylist()
    assert {row["prompt_id"] for row in beside} == {f"p{i}" for i in range(1, 100)} - held_out
    assert {row["weight"] for row in beside} == {0.25}
    assert data.left_out["rows_too_long"] == 1
    assert data.left_out["auxiliary_of_validation"] == len(held_out - {"p0"})
