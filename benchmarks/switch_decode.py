"""SWITCH decoding per token against in blocks: the same tokens, faster. On a CPU, batch 8, 128 new tokens.

    python -m benchmarks.switch_decode --json        (last line: one JSON object)

Cases: (a) SmolLM2 fine-tuned on templated text with a student distilled from it there, on held-out prompts; (b) SmolLM2
with its raw pruned student on open text; and students between them, for the curve of speed against agreement. Both
decoders run in turn on the same prompts and noise; medians over the rounds. Open text is Dolly's, from --dolly.

``of_optimum`` is the optimum's time over ours. The optimum is the fastest fixed block length and drafter that the
agreement of that very rollout allows, were its forwards all there is to pay, at costs measured in the same round as the
decoders run them (packed). Nobody can reach it: noise, draws and the gate of a position cost time too, and so does
packing a student that trains. ``of_optimum_with_rules`` counts the former, as the per-token loop measures them.
``identical`` is of one small pair in float64, at distances and gates of its own: the same for all cases.
"""

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.conditions import conditions, options, publish
from benchmarks.pairs import chat, held_out, load, raw_pair, templated_pair
from benchmarks.replay import Cost, optimum, replay, stood
from infra.memory import keep_freed_memory
from kernels.decode import Pace, Rollout, blockwise, reference
from kernels.gate import Constant, ExponentialDecay, LinearDecay
from kernels.margin import first_difference, margin
from kernels.noise import sequence_key
from kernels.packed import packed
from kernels.rows import RowModel
from kernels.rules import Role

BATCH, NEW_TOKENS = 8, 128
TOLERANCE = 1e-3  # nats, and units of the gate: where float32's rounding may decide
RATIOS = (2, 4, 8, 16, 32, 50)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@contextmanager
def timed(*models: Any) -> Any:
    """Within, a list of the seconds of every forward of these models."""
    spent: list[float] = []
    originals = [model.forward for model in models]

    def watched(original: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = original(*args, **kwargs)
            spent.append(time.perf_counter() - began)
            return result

        return forward

    for model, original in zip(models, originals, strict=True):
        model.forward = watched(original)
    try:
        yield spent
    finally:
        for model in models:
            del model.forward


def forward_seconds(model: Any, context: int) -> list[float]:
    """Seconds of a forward of each of SIZES tokens as decoders run it, rows that hold ``context`` tokens: medians."""
    seconds = []
    for size in SIZES:
        rows = min(BATCH, size)
        runner = RowModel(model, rows, context + size)
        with torch.no_grad(), packed(model):
            runner.prefill([torch.arange(context)] * rows, list(range(rows)))
            start_B, last_B = torch.full((rows,), context), torch.full((rows,), context + size - 1)
            ids_BQ = torch.ones(rows, size // rows, dtype=torch.int64)
            runs = []
            for _ in range(5):
                runner.extend(ids_BQ, start_B, last_B, context)
                runs.append(runner.seconds)
        seconds.append(statistics.median(runs))
    return seconds


def costs_of(seconds: Mapping[Role, list[float]]) -> dict[Role, Cost]:
    """By model, a forward's seconds as a function of its tokens, interpolated."""
    return {role: partial(_interpolate, known) for role, known in seconds.items()}


def _interpolate(seconds: list[float], tokens: int) -> float:
    return float(np.interp(tokens, SIZES, seconds))


def identical() -> bool:
    """Whether both decoders write the same tokens in float64, on a small pair at several distances and gates."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    teacher = LlamaForCausalLM(LlamaConfig(vocab_size=97, **shape)).double().eval()  # type: ignore[arg-type]
    for parameter in teacher.parameters():
        if parameter.ndim == 2:
            parameter.data *= 8
    prompts = [torch.randint(97, (length,)) for length in range(2, 18)]
    for distance in (0.001, 0.01, 0.1, 1.0):
        student = LlamaForCausalLM(teacher.config).double().eval()
        for own, theirs in zip(student.parameters(), teacher.parameters(), strict=True):
            own.data = theirs.data + distance * theirs.data.std() * torch.randn_like(theirs)
        for number, gate in enumerate((ExponentialDecay(), LinearDecay(length=64), Constant(value=0.1))):
            keys_B = torch.tensor([sequence_key(number, "row", row) for row in range(len(prompts))])
            given = (student, teacher, prompts, keys_B, gate)
            want = reference(*given, max_new_tokens=64, eos_ids=[3])
            for block in (None, 1, 5, 16):
                got = blockwise(*given, max_new_tokens=64, eos_ids=[3], block=block)
                if any(not torch.equal(x, y) for x, y in zip(got.tokens, want.tokens, strict=True)):
                    return False
    return True


def differences(
    student: Any, teacher: Any, prompts: Sequence[Any], keys_B: Any, gate: Any, one: Rollout, other: Rollout
) -> tuple[int, int]:
    """(unexplained, near ties) among the first differing positions of the rows."""
    unexplained = ties = 0
    for row, prompt in enumerate(prompts):
        position = first_difference(one.tokens[row], other.tokens[row])
        if position is None:
            continue
        seen = margin(student, teacher, prompt, one.tokens[row], int(keys_B[row]), gate, position)
        ties, unexplained = ties + seen.near(TOLERANCE), unexplained + (not seen.near(TOLERANCE))
    return unexplained, ties


def run_case(student: Any, teacher: Any, prompts: list[Any], eos: int, rounds: int, gate: Any) -> dict[str, Any]:
    """One pair on some prompts: both decoders in turn, round by round, each round with noise of its own."""
    pace, totals = Pace(), {"mismatches": 0, "near_ties": 0, "positions": 0}
    slow, fast, rules, optima, with_rules = ([] for _ in range(5))
    plain, blocks = [], []
    forward: list[dict[Role, list[float]]] = []
    # The trainer keeps one pace over all its steps: the first rollout learns and is not timed.
    for number in range(rounds + 1):
        keys_B = torch.tensor([sequence_key(number, "row", row) for row in range(len(prompts))])
        given = (student, teacher, prompts, keys_B, gate)
        settings = {"max_new_tokens": NEW_TOKENS, "eos_ids": [eos]}
        with timed(student, teacher) as forwards:
            began = time.perf_counter()
            want = reference(*given, **settings)
            seconds = time.perf_counter() - began
        steps = max(map(len, want.tokens))
        began = time.perf_counter()
        got = blockwise(*given, **settings, pace=pace)
        spent = time.perf_counter() - began
        unexplained, ties = differences(*given, got, want)
        totals["mismatches"] += unexplained
        totals["near_ties"] += ties
        totals["positions"] += want.stats.tokens
        if number:
            slow.append(seconds / want.stats.tokens)
            fast.append(spent / got.stats.tokens)
            rules.append((seconds - sum(forwards)) / steps)
            plain.append(want)
            blocks.append(got)
            # This machine's forwards drift by tens of percent within minutes, so each round has costs of its own.
            context = max(map(len, prompts)) + NEW_TOKENS // 2
            forward.append({"student": forward_seconds(student, context), "teacher": forward_seconds(teacher, context)})
            costs = costs_of(forward[-1])
            optima.append(optimum([want], costs).seconds / spent)
            with_rules.append(optimum([want], costs, rules[-1]).seconds / spent)
    stats = sum((rollout.stats for rollout in blocks[1:]), blocks[0].stats)
    median: dict[Role, list[float]] = {
        role: np.median([seconds[role] for seconds in forward], axis=0).tolist() for role in forward[0]
    }
    best = optimum(plain, costs_of(median))
    return {
        **totals,
        "speedup": statistics.median(slow) / statistics.median(fast),
        "agreement": stats.agreement,
        "teacher_agreement": float(
            np.mean([flag for rollout in plain for row in stood(rollout, "teacher") for flag in row])
        ),
        "intervention_rate": stats.intervention_rate,
        "teacher_forwards_per_token": stats.teacher_forwards_per_token,
        "student_forwards_per_token": stats.student.rows / stats.tokens,
        "of_optimum": statistics.median(optima),
        "of_optimum_by_round": [round(share, 3) for share in optima],
        "of_optimum_with_rules": statistics.median(with_rules),
        "optimum": {"block": best.block, "drafter": best.drafter},
        "seconds_per_token": {"reference": statistics.median(slow), "blockwise": statistics.median(fast)},
        "forward_ms": {
            role: {str(size): round(1000 * spent, 2) for size, spent in zip(SIZES, seconds, strict=True)}
            for role, seconds in median.items()
        },
        "rules_ms_per_position": 1000 * statistics.median(rules),
        "predicted": predicted(plain),
    }


def predicted(rollouts: list[Rollout]) -> dict[str, dict[str, float]]:
    """Speed-up over the per-token loop by the teacher's cost in student forwards, where a forward costs latency only
    (its number of tokens does not count), from the counted forwards of the best block."""
    table = {}
    for ratio in RATIOS:
        costs: dict[Any, Cost] = {"student": lambda _: 1.0, "teacher": lambda _, ratio=ratio: float(ratio)}
        best = optimum(rollouts, costs)
        plain = sum(max(map(len, rollout.tokens)) for rollout in rollouts) * (1.0 + ratio)
        counts = [replay(stood(rollout, best.drafter), best.block) for rollout in rollouts]
        teacher = sum(len(count.scorer if best.drafter == "student" else count.drafter) for count in counts)
        table[str(ratio)] = {
            "speedup": round(plain / best.seconds, 2),
            "block": best.block,
            "teacher_calls_per_step": round(teacher / sum(max(map(len, r.tokens)) for r in rollouts), 3),
        }
    return table


def open_prompts(tokenizer: Any, path: Path, count: int) -> list[Any]:
    """Instructions without an input, as chats of at most 64 tokens."""
    found: list[Any] = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        ids = tokenizer.encode(chat(tokenizer, row["instruction"]), add_special_tokens=False)
        if not row.get("input") and len(ids) <= 64:
            found.append(torch.tensor(ids))
        if len(found) == count:
            break
    return found


def inside_vllm(student: Any, teacher: Any, prompts: list[Any], eos: int, rounds: int) -> dict[str, Any]:
    """The decoder inside vLLM and blocks in torch, in turn; the weights are handed over once, as no step is made."""
    from tasks.vllm_decode import InVllm

    pace, spent, differing, positions = Pace(), {"vllm": [], "blockwise": []}, 0, 0
    decoders = {"blockwise": partial(blockwise, pace=pace), "vllm": InVllm(blockwise, sync_every=1 << 30)}
    for number in range(rounds + 1):
        keys_B = torch.tensor([sequence_key(number, "row", row) for row in range(BATCH)])
        given, rollouts = (student, teacher, prompts, keys_B, ExponentialDecay()), {}
        for name, decode in decoders.items():
            began = time.perf_counter()
            rollouts[name] = decode(*given, max_new_tokens=NEW_TOKENS, eos_ids=[eos])
            spent[name] += [time.perf_counter() - began] if number else []
        positions += rollouts["vllm"].stats.tokens
        differing += sum(
            first_difference(one, other) is not None
            for one, other in zip(*(rollout.tokens for rollout in rollouts.values()), strict=True)
        )
    seconds = {name: statistics.median(values) for name, values in spent.items()}
    served = decoders["vllm"]
    assert isinstance(served, InVllm)
    assert served.fallen is None, served.fallen
    speedup = seconds["blockwise"] / seconds["vllm"]
    return {"seconds": seconds, "speedup": speedup, "differing_rows": differing, "positions": positions}


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--vllm", action="store_true", help="measure the decoder inside vLLM, too, on (a) and (b)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dolly", type=Path, default=Path("../shared/data/dolly_test.jsonl"))
    arguments = parser.parse_args()
    # As training does.
    keep_freed_memory()
    from infra.models import load_tokenizer

    same = identical()
    print(f"float64, small pair: {'identical' if same else 'DIFFERENT'}")
    pair, raw = templated_pair(), raw_pair()
    tokenizer = load_tokenizer(raw.teacher)
    eos = tokenizer.eos_token_id
    forms = held_out(tokenizer, BATCH, seed=2)
    text = open_prompts(tokenizer, arguments.dolly, BATCH)
    # As in training: the teacher is frozen, the student is not.
    teachers = {"notices": load(pair.teacher).requires_grad_(False), "open": load(raw.teacher).requires_grad_(False)}
    plan = [(f"notices, student of {steps} steps", "notices", steps) for steps in sorted(pair.students, reverse=True)]
    plan += [("open text, raw pruned student", "open", 0), ("open text, teacher as student", "open", -1)]
    cases = {}
    for name, kind, steps in plan:
        teacher = teachers[kind]
        student = load(pair.students[steps]) if steps >= 0 else load(raw.teacher)
        prompts = forms if kind == "notices" else text
        case = run_case(student, teacher, prompts, eos, arguments.rounds, ExponentialDecay())
        cases[name] = case = {"identical": same, **case}
        print(
            f"{name:<32} agreement {case['agreement']:.3f}  speed-up {case['speedup']:.2f}  of optimum "
            f"{case['of_optimum']:.2f}  teacher forwards a token {case['teacher_forwards_per_token']:.2f}  mismatches "
            f"{case['mismatches']}  near ties {case['near_ties']} of {case['positions']} positions",
            flush=True,
        )
    first = cases[plan[0][0]]
    fields = (
        "identical",
        "positions",
        "mismatches",
        "near_ties",
        "speedup",
        "teacher_forwards_per_token",
        "agreement",
        "of_optimum",
        "of_optimum_with_rules",
    )
    result = {"conditions": conditions(), **{field: first[field] for field in fields}}
    result["settings"] = {"batch": BATCH, "new_tokens": NEW_TOKENS, "rounds": arguments.rounds, "tolerance": TOLERANCE}
    result["cases"] = cases
    if arguments.vllm:
        result["vllm"] = {}
        for name, kind, steps in (plan[0], plan[-2]):
            pair_of = load(pair.students[steps]), teachers[kind], forms if kind == "notices" else text
            result["vllm"][name] = found = inside_vllm(*pair_of, eos, arguments.rounds)
            differing = found["differing_rows"]
            print(f"{name:<32} in vLLM {found['speedup']:.2f} times as fast as in torch, {differing} rows differ")
    result["curve"] = sorted((case["agreement"], case["speedup"]) for case in cases.values())
    publish("switch_decode", result, arguments)


if __name__ == "__main__":
    main()
