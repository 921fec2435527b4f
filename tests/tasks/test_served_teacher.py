"""A teacher whose layers run elsewhere: its workers see what they would see of one that is here."""

import signal
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from toys import EOS, WORDS, commit_inputs, kept_rows, pair, stage_of
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from infra.engine import EngineSpec
from infra.engine_room import ROOM, open_room
from infra.parts import read_rows
from infra.store import LocalStore
from kernels.decode import blockwise
from kernels.gate import Constant, ExponentialDecay
from kernels.noise import sequence_key
from tasks.loop import Loop, proceed, start
from tasks.plan import Service
from tasks.served_teacher import Served, projection_of
from tasks.student import World, head_of, hidden_states
from tasks.train import plan_of, run

torch.set_num_threads(1)
SHAPE = {"vocab_size": WORDS, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 128}
MODELS = {
    "tied": LlamaForCausalLM(LlamaConfig(**SHAPE, **HEADS, tie_word_embeddings=True)),
    "untied": LlamaForCausalLM(LlamaConfig(**SHAPE, **HEADS, tie_word_embeddings=False)),
    # Tied too, and its logits are squeezed.
    "capped": Gemma2ForCausalLM(Gemma2Config(**SHAPE, **HEADS, final_logit_softcapping=8.0)),
}


class Here(Served):
    """What engines would be asked is asked of a model in this process, one sequence at a time."""

    def __init__(self, model: Any, folder: Path) -> None:
        super().__init__(*projection_of(folder, torch.float32), actor=None, seconds=1.0)
        self.model = [model]  # no part of this one

    def ask(self, sequences: list[list[int]], last: list[int]) -> torch.Tensor:
        read = (hidden_states(self.model[0], torch.tensor([ids]))[0] for ids in sequences)
        return torch.cat([hidden_ND[-count:] for hidden_ND, count in zip(read, last, strict=True)])


def spread(model: Any) -> Any:
    """Distributions that are neither flat nor certain."""
    for weight in model.parameters():
        if weight.ndim == 2:
            weight.data *= 6
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_its_projection_is_all_that_is_read(name: str, tmp_path: Path) -> None:
    model = spread(MODELS[name])
    model.save_pretrained(tmp_path)
    served, ids_BL = Here(model, tmp_path), torch.randint(3, WORDS, (3, 11))
    torch.testing.assert_close(served(ids_BL).logits, model(ids_BL).logits)
    torch.testing.assert_close(hidden_states(served, ids_BL), hidden_states(model, ids_BL))
    assert torch.equal(head_of(served).weight_VH, head_of(model).weight_VH)
    assert head_of(served).softcap == head_of(model).softcap
    assert sum(weight.numel() for weight in served.parameters()) == WORDS * 64


@pytest.mark.parametrize("slots", [None, 2])
@pytest.mark.parametrize("drafter", ["student", "teacher"])
@pytest.mark.parametrize("block", [1, 3, 8])
def test_rollouts_are_those_of_a_teacher_that_is_here(
    block: int, drafter: Any, slots: int | None, tmp_path: Path
) -> None:
    torch.manual_seed(5)
    teacher = spread(LlamaForCausalLM(LlamaConfig(**SHAPE, **HEADS)))
    student = LlamaForCausalLM(teacher.config)
    student.load_state_dict(
        {name: w + 0.05 * w.std() * torch.randn_like(w) for name, w in teacher.state_dict().items()}
    )
    teacher.save_pretrained(tmp_path)
    prompts = [torch.randint(10, WORDS, (length,)) for length in (1, 5, 17, 9, 3)]
    keys = torch.tensor([sequence_key(3, i) for i in range(len(prompts))])
    limits = [20, 7, 1, 30, 12]
    settings: dict[str, Any] = {"max_new_tokens": limits, "eos_ids": [EOS, 7, 9], "keep_teacher_hidden": True}
    settings |= {"block": block, "drafter": drafter, "slots": slots}
    for gate in (ExponentialDecay(), Constant(value=0.05)):
        own = blockwise(student.eval(), teacher, prompts, keys, gate, **settings)
        served = blockwise(student, Here(teacher, tmp_path), prompts, keys, gate, **settings)  # type: ignore[arg-type]
        assert [row.tolist() for row in served.tokens] == [row.tolist() for row in own.tokens]
        assert own.teacher_hidden
        assert served.teacher_hidden
        for found_TD, wanted_TD in zip(served.teacher_hidden, own.teacher_hidden, strict=True):
            torch.testing.assert_close(found_TD, wanted_TD, rtol=1e-4, atol=1e-4)
        assert served.stats.teacher.calls == own.stats.teacher.calls


SWITCH = {"type": "switch", "max_new_tokens": 10, "block": 4}
TRAIN = {"method": SWITCH, "steps": 6, "micro_batch": 2, "batch_size": 8, "learning_rate": 1e-2, "keep": "last"}
ENGINE = {"max_model_len": 128, "kv_cache_gib": 0.05, "threads": 1}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> LocalStore:
    return LocalStore(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def inputs(store: LocalStore) -> dict[str, str]:
    return commit_inputs(store, pair(store), kept_rows(48))


def test_training_with_engines_is_that_with_the_teacher_in_memory(
    cluster: None, store: LocalStore, inputs: dict[str, str]
) -> None:
    """Two workers ask one engine, which is killed while it answers."""
    runtime = {"workers": 2, "placement": {"teacher": "served"}, "engines": {"teacher": ENGINE}}
    stage, killed = stage_of(store, inputs, {**TRAIN, "max_length": 96}, runtime), []

    def kill() -> None:
        while not killed:
            for process in psutil.process_iter(["name", "cmdline"]):
                if "Trunk.hidden" in " ".join(process.info["cmdline"] or []):
                    process.send_signal(signal.SIGKILL)
                    killed.append(process.pid)
                    return
            time.sleep(0.005)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    run(stage)
    killer.join(1)
    assert killed
    whole = stage_of(store, inputs, {**TRAIN, "max_length": 96}, {"engines": {"teacher": ENGINE}})
    loop = start(plan_of(whole), World(0, 1, torch.device("cpu")), None)
    assert loop
    assert not isinstance(loop.method.teacher, Served)
    proceed(loop, lambda folder, step: None, lambda row: None)
    steps = read_rows(store, stage.manifest, "steps").to_pylist()
    for name in ("tokens", "teacher_tokens", "rollouts"):
        assert [row[name] for row in steps] == [row[name] for row in loop.state.steps], name
    for name in ("loss", "gradient_norm", "response_length", "intervention_rate"):
        assert [row[name] for row in steps] == pytest.approx([row[name] for row in loop.state.steps], rel=1e-4), name
    weights = AutoModelForCausalLM.from_pretrained(
        store.localise(stage.facts["models"]["student"]["path"])
    ).state_dict()
    for name, weight in loop.student.model.state_dict().items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=2e-3, msg=name)


def test_an_engine_reads_what_is_new_and_gives_what_is_asked(
    cluster: None, store: LocalStore, inputs: dict[str, str]
) -> None:
    import ray

    stage = stage_of(store, inputs, TRAIN, {"placement": {"teacher": "served"}, "engines": {"teacher": ENGINE}})
    plan = plan_of(stage)
    assert plan.served
    assert plan.teacher
    room = open_room()
    (name,) = ray.get(room.acquire.remote(plan.served.engine))
    actor = ray.get_actor(name)
    model = AutoModelForCausalLM.from_pretrained(store.localise(plan.teacher.path or ""))
    long, short = torch.randint(3, WORDS, (2, 90)).tolist()
    # Grown by a few tokens, asked about again, and asked about from before what the cache holds.
    for sequences, last in (
        ([long[:70], short[:3]], [70, 2]),
        ([long[:75], short[:4]], [5, 1]),
        ([long[:75], short[:4]], [75, 4]),
        ([long[:75]], [1]),
        ([[*long[:40], *short[:30]], long], [30, 15]),
    ):
        found_KD = ray.get(actor.hidden.remote(sequences, last))
        with torch.no_grad():
            read = [hidden_states(model, torch.tensor([ids]))[0] for ids in sequences]
        wanted_KD = torch.cat([hidden_ND[-count:] for hidden_ND, count in zip(read, last, strict=True)])
        torch.testing.assert_close(found_KD, wanted_KD, rtol=1e-4, atol=1e-4)
    ray.get(room.release.remote(EngineSpec.model_validate(plan.served.engine).key))
    # The room is still there; its engine ends in its own time.
    deadline = time.monotonic() + 30
    while name in ray.util.list_named_actors() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ray.util.list_named_actors() == [ROOM]


def test_an_engine_that_reads_too_little_is_one_line(store: LocalStore, inputs: dict[str, str]) -> None:
    plan = plan_of(stage_of(store, inputs, {**TRAIN, "max_length": 512}, {"placement": {"teacher": "served"}}))
    assert plan.served
    plan = plan.model_copy(update={"served": Service(namespace="", engine={**plan.served.engine, "max_model_len": 64})})
    with pytest.raises(ValueError, match=r"engines.teacher.max_model_len: 64, but it is to read 512 tokens: raise it"):
        Loop(plan.placed(1, 1e9), World(0, 1, torch.device("cpu")))
