"""A whole training step of SWITCH against one of GKD: ours on the same models, and TRL's trainer.

    python -m benchmarks.switch_step --json        (last line: one JSON object)

Batch 8, 64 new tokens, all on-policy, float32, AdamW. Case (a): SmolLM2 fine-tuned on templated text and a student
distilled from it there; (b): SmolLM2 and its raw pruned student. A step is rollout, loss, backward and optimiser. Ours
take turns step by step with TRL's, which run in an environment of its own, with equal models, prompts and response
lengths (EOS is off); each optimiser step of ours is undone, so the pair stays what it is, and TRL's learning rate is 0.
"""

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from benchmarks.conditions import CACHE, conditions, options, publish
from benchmarks.pairs import BATCH, held_out, load, raw_pair, templated_pair
from benchmarks.peer import trl
from infra.memory import keep_freed_memory
from kernels.noise import sequence_key
from tasks.batches import Sequence, collate
from tasks.catalogue import method_of
from tasks.config import methods as config
from tasks.methods import Method
from tasks.student import head_of, hidden_states

NEW_TOKENS = 64


class Stepper:
    """One training step of a method on a model, timed by part."""

    def __init__(self, student: Any, method: Method) -> None:
        self.student, self.method = student, method
        self.optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5)

    def step(self, prompts: list[Any], number: int) -> tuple[float, float, Any]:
        """Seconds in all, seconds of the rollout, and its statistics."""
        began = time.perf_counter()
        keys = [sequence_key(number, "row", row) for row in range(len(prompts))]
        rollout = self.method.rollout(self.student, prompts, keys, eos_ids=[])
        rolled = time.perf_counter() - began
        hidden: list[Any] = rollout.teacher_hidden or [None] * len(prompts)
        sequences = [
            Sequence(str(row), prompt, tokens, on_policy=True, teacher_hidden_TG=hidden_TG)
            for row, (prompt, tokens, hidden_TG) in enumerate(zip(prompts, rollout.tokens, hidden, strict=True))
        ]
        batch = collate(sequences, torch.device("cpu"))
        batch.weights_N.div_(len(batch.weights_N))
        self.student.train()
        hidden_NH = hidden_states(self.student, batch.ids_BL).flatten(0, 1)[batch.where_N]
        loss, _ = self.method.loss(hidden_NH, head_of(self.student), batch, sequences)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - began, rolled, rollout.stats


def run_case(
    teacher: Any, student: Any, prompts: list[Any], rounds: int, peer: Callable[[], dict[str, Any]] | None
) -> dict[str, Any]:
    """SWITCH's, GKD's and the peer's steps in turn; the first round is not counted."""
    vocabulary = teacher.config.vocab_size
    settings = {"on_policy_share": 1.0, "max_new_tokens": NEW_TOKENS}
    steppers = {
        "switch": Stepper(student, method_of(config.Switch(**settings), teacher, vocabulary)),
        "gkd": Stepper(student, method_of(config.Gkd(**settings), teacher, vocabulary)),
    }
    weights = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    seconds: dict[str, list[float]] = {name: [] for name in steppers}
    rollouts: dict[str, list[float]] = {name: [] for name in steppers}
    stats = []
    for number in range(rounds + 1):
        for name, stepper in steppers.items():
            spent, rolled, seen = stepper.step(prompts, number)
            student.load_state_dict(weights)
            if number:
                seconds[name].append(spent)
                rollouts[name].append(rolled)
                stats += [seen] if name == "switch" else []
        theirs = peer() if peer else None
        if number and theirs:
            seconds.setdefault("trl", []).append(theirs["seconds"])
    total = sum(stats[1:], stats[0])
    steps = NEW_TOKENS * rounds
    calls = {"switch": (total.student.calls, total.teacher.calls), "gkd": (steps, rounds)}
    # Where a forward costs latency, the same for both models and for one token or many: rollout forwards, and three
    # passes (student forward and backward, twice as long) with the teacher's where it has not read the text yet.
    latency = {
        name: student_calls + teacher_calls + 3 * rounds for name, (student_calls, teacher_calls) in calls.items()
    }
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "seconds": median,
        "rollout_seconds": {name: statistics.median(values) for name, values in rollouts.items()},
        "ratio_to_gkd": median["switch"] / median["gkd"],
        "ratio_to_trl": median["switch"] / median["trl"] if theirs else None,
        "trl_versions": theirs["versions"] if theirs else None,
        "agreement": total.agreement,
        "teacher_forwards_per_token": total.teacher_forwards_per_token,
        "forwards_per_step": {name: [count / rounds for count in both] for name, both in calls.items()},
        "ratio_to_gkd_by_latency": latency["switch"] / latency["gkd"],
    }


def trl_steps(teacher: Path, student: Path, prompts: list[Any], steps: int) -> Any:
    """TRL's trainer on these models, one step a turn."""
    options = {"teacher": str(teacher), "student": str(student), "prompts": [prompt.tolist() for prompt in prompts]}
    return trl("step", **options, new_tokens=NEW_TOKENS, steps=steps, output=str(CACHE / "trl-output"))


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--without-trl", action="store_true", help="skip TRL, whose steps take half a minute each")
    arguments = parser.parse_args()
    # As training does.
    keep_freed_memory()
    from infra.models import load_tokenizer

    pair, raw = templated_pair(), raw_pair()
    tokenizer = load_tokenizer(raw.teacher)
    prompts = held_out(tokenizer, BATCH, seed=3)
    folders = {"a": (pair.teacher, pair.students[max(pair.students)]), "b": (raw.teacher, raw.students[0])}
    cases: dict[str, dict[str, Any]] = {}
    for name, (teacher, student) in folders.items():
        models = load(teacher).requires_grad_(False), load(student)
        peer = nullcontext() if arguments.without_trl else trl_steps(teacher, student, prompts, arguments.rounds + 1)
        with peer as turn:
            cases[name] = case = run_case(*models, prompts, arguments.rounds, turn)
        print(f"({name}) " + "  ".join(f"{key} {value:.2f} s" for key, value in case["seconds"].items()), end="  ")
        print(f"ratio {case['ratio_to_gkd']:.2f}  agreement {case['agreement']:.3f}", flush=True)
        versions = case.pop("trl_versions")
    result = {
        "conditions": conditions() | {"trl": versions},
        "settings": {"batch": BATCH, "new_tokens": NEW_TOKENS, "rounds": arguments.rounds},
        "ratio_to_gkd": cases["a"]["ratio_to_gkd"],
        "ratio_to_trl": cases["a"]["ratio_to_trl"],
        "cases": cases,
    }
    publish("switch_step", result, arguments)


if __name__ == "__main__":
    main()
