"""Compressed teacher distributions: bytes a position, and what they cost in accuracy, on real text.

    python -m benchmarks.teacher_codec --json        (last line: one JSON object)

SmolLM2's distributions at the response positions of Dolly and GSM8K, text it was not tuned on here, encoded sequence by
sequence; D of a student from the decoded rows against D from the full distributions. Two students: SmolLM2's sixteen
layers after a short distillation on such text (far), and SmolLM2 tuned on other text (near). Errors are relative to the
mean loss, biases in nats; gradients with respect to the student's logits are compared by relative length of the
difference, of single positions and of their sum. The headline is the far student and KL(p ‖ q) for top mode; for
sampled mode its larger bias over both divergences.
"""

import gzip
import json
import math
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.conditions import CACHE, conditions, options, publish
from benchmarks.pairs import END, chat, load, pruned, raw_pair, templated_pair, trained
from kernels import codec
from kernels.divergence import (
    Divergence,
    divergence_N,
    forward_kl,
    sampled_divergence_N,
    skewed_reverse_kl,
    topk_divergence_N,
)
from tasks.batches import Sequence, collate
from tasks.student import head_of, hidden_states

LAYERS = [0, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 28, 29]
STEPS, LENGTH = 25, 192
DIVERGENCES: dict[str, Divergence] = {"forward_kl": forward_kl(), "skewed_reverse_kl": skewed_reverse_kl(0.1)}
# The product's own settings are the second of each mode: the headline's.
TOP = {
    f"top {limit}": {"mass": 1.0, "limit": limit, "min_prob": low}
    for limit, low in ((12, 2e-3), (29, 1e-3), (60, 5e-4), (140, 1e-4))
}
SAMPLED = {f"sampled 1/{grain}": {"grain": 1 / grain} for grain in (24, 64, 110, 240)}
EVERY = 8  # sequences that all settings and students see
GRADIENTS_EVERY = 16  # gradients cost twice


def texts(tokenizer: Any, folder: Path, split: str) -> list[Sequence]:
    """Prompts and reference responses of both data sets, the longest cut."""
    rows = []
    dolly = {"train": "dolly_train.jsonl.gz", "test": "dolly_test.jsonl"}[split]
    for name in (dolly, f"gsm8k_{split}.jsonl"):
        path = folder / name
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
            for number, line in enumerate(lines):
                row = json.loads(line)
                prompt = row.get("instruction") or row.get("question")
                context = row.get("context") or row.get("input") or ""
                response = row.get("response") or row.get("output") or row.get("answer")
                ids = tokenizer.encode(chat(tokenizer, f"{prompt}\n{context}".strip()), add_special_tokens=False)
                written = tokenizer.encode(str(response) + END)[:LENGTH]
                if len(ids) <= LENGTH:
                    rows.append(Sequence(f"{name}-{number}", torch.tensor(ids), torch.tensor(written)))
    generator = torch.Generator().manual_seed(5)
    return [rows[index] for index in torch.randperm(len(rows), generator=generator).tolist()]


def far_student(teacher_folder: Path, data: list[Sequence]) -> Any:
    """Sixteen of SmolLM2's layers, distilled for a few steps."""
    folder = CACHE / "text-student"
    if not (folder / "config.json").exists():
        student = load(pruned(teacher_folder, CACHE / "pruned-16", LAYERS))
        parts = [collate(data[4 * step : 4 * step + 4], torch.device("cpu")) for step in range(STEPS)]
        for _ in trained(student, parts, 5e-4, load(teacher_folder)):
            pass
        student.save_pretrained(folder)
    return load(folder)


def positions(
    teacher: Any, students: dict[str, Any], data: list[Sequence], count: int
) -> Iterator[tuple[int, Tensor, dict[str, Tensor]]]:
    """(number, the teacher's log-probabilities, logits of each student) [N, V] at the response positions, sequence by
    sequence; of the first student always, of the others now and then."""
    seen = 0
    for number, sequence in enumerate(data):
        batch = collate([sequence], torch.device("cpu"))
        asked = students if number % EVERY == 0 else dict(list(students.items())[:1])
        with torch.no_grad():
            logits = {
                name: hidden_states(model, batch.ids_BL).flatten(0, 1)[batch.where_N] @ head_of(model).weight_VH.T
                for name, model in {"teacher": teacher, **asked}.items()
            }
        yield number, logits.pop("teacher").log_softmax(-1), logits
        seen += len(sequence.response)
        if seen >= count:
            return


def decoded_loss(rows: codec.TeacherRows, logits_NV: Tensor, divergence: Divergence) -> Tensor:
    if rows.importance_NK is None:
        return topk_divergence_N(rows.ids_NK, rows.logprobs_NK, rows.log_tail_N, logits_NV, divergence)
    return sampled_divergence_N(rows.ids_NK, rows.logprobs_NK, rows.importance_NK, logits_NV, divergence)


class Sums:
    """What is added up for one setting, student and divergence."""

    def __init__(self) -> None:
        self.positions = self.gradients = 0
        self.full = self.difference = self.square = self.gradient = 0.0
        self.total_V: Tensor | None = None
        self.full_V: Tensor | None = None

    def add(self, loss_N: Tensor, full_N: Tensor) -> None:
        difference_N = loss_N.double() - full_N.double()
        self.positions += len(full_N)
        self.full += full_N.double().sum().item()
        self.difference += difference_N.sum().item()
        self.square += difference_N.square().sum().item()

    def add_gradients(self, gradient_NV: Tensor, full_NV: Tensor) -> None:
        self.gradient += ((gradient_NV - full_NV).norm(dim=-1) / full_NV.norm(dim=-1)).sum().item()
        self.gradients += len(full_NV)
        self.total_V = gradient_NV.sum(0) + (0 if self.total_V is None else self.total_V)
        self.full_V = full_NV.sum(0) + (0 if self.full_V is None else self.full_V)

    def figures(self) -> dict[str, float]:
        count = self.positions
        bias, mean = self.difference / count, self.full / count
        assert self.total_V is not None
        assert self.full_V is not None
        return {
            "positions": count,
            "mean_loss_nats": mean,
            "bias_nats": bias,
            "standard_error_nats": math.sqrt(max(0.0, self.square / count - bias**2) / count),
            "relative_error": abs(bias) / mean,
            "gradient_error_by_position": self.gradient / self.gradients,
            "gradient_error_of_sum": ((self.total_V - self.full_V).norm() / self.full_V.norm()).item(),
        }


def gradient(logits_NV: Tensor, loss: Any) -> Tensor:
    leaf_NV = logits_NV.clone().requires_grad_()
    loss(leaf_NV).sum().backward()
    assert leaf_NV.grad is not None
    return leaf_NV.grad


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--positions", type=int, default=50_000)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    arguments = parser.parse_args()
    from infra.models import load_tokenizer

    raw = raw_pair()
    tokenizer, teacher = load_tokenizer(raw.teacher), load(raw.teacher)
    students = {
        "far": far_student(raw.teacher, texts(tokenizer, arguments.data, "train")),
        "near": load(templated_pair().teacher),
    }
    names, headline = [*TOP, *SAMPLED], (list(TOP)[1], list(SAMPLED)[1])
    sums = {(setting, student, name): Sums() for setting in names for student in students for name in DIVERGENCES}
    size = {name: [0, 0] for name in names}
    generator, began, count = torch.Generator().manual_seed(7), time.monotonic(), 0
    data = texts(tokenizer, arguments.data, "test")
    for number, logprobs_NV, logits in positions(teacher, students, data, arguments.positions):
        # The headline's settings and the far student see every position, all else a sample of them.
        everything = number % EVERY == 0
        blobs = {
            name: codec.encode_top(logprobs_NV, **TOP[name])
            if name in TOP
            else codec.encode_sampled(logprobs_NV, generator, **SAMPLED[name])
            for name in (names if everything else headline)
        }
        rows = {name: codec.decode([blob]) for name, blob in blobs.items()}
        count += len(logprobs_NV)
        for name, blob in blobs.items():
            size[name][0] += len(blob)
            size[name][1] += len(logprobs_NV)
        for student, own_NV in logits.items():
            for name, divergence in DIVERGENCES.items():
                full_N = divergence_N(logprobs_NV, own_NV, divergence)
                for setting, part in rows.items():
                    sums[setting, student, name].add(decoded_loss(part, own_NV, divergence), full_N)
                if number % GRADIENTS_EVERY == 0:
                    whole_NV = gradient(own_NV, partial(divergence_N, logprobs_NV, divergence=divergence))
                    for setting, part in rows.items():
                        cut_NV = gradient(own_NV, partial(decoded_loss, part, divergence=divergence))
                        sums[setting, student, name].add_gradients(cut_NV, whole_NV)
        left = (time.monotonic() - began) / count * (arguments.positions - count)
        print(
            f"\r  {count:,} of {arguments.positions:,} positions, {max(0, left):.0f} s left ", end="", file=sys.stderr
        )
    print(file=sys.stderr)
    table: dict[str, Any] = {}
    for setting in names:
        table[setting] = {"bytes_per_position": size[setting][0] / size[setting][1]}
        for student in students:
            for name in DIVERGENCES:
                figures = sums[setting, student, name].figures()
                table[setting].setdefault(student, {})[name] = figures
                print(
                    f"{setting:<14} {table[setting]['bytes_per_position']:6.1f} B  {student:<5} {name:<18} bias "
                    f"{figures['bias_nats']:+.4f} ± {figures['standard_error_nats']:.4f} of "
                    f"{figures['mean_loss_nats']:.3f} ({figures['relative_error']:.1%})  gradient "
                    f"{figures['gradient_error_by_position']:.1%}, of the sum {figures['gradient_error_of_sum']:.1%}"
                )
    top, sampled = headline
    result = {
        "conditions": conditions(),
        "student": f"sixteen layers of SmolLM2-135M, {STEPS} steps of forward KL on Dolly and GSM8K (far)",
        "positions": count,
        "bytes_per_position": table[top]["bytes_per_position"],
        "relative_error": table[top]["far"]["forward_kl"]["relative_error"],
        "bytes_per_position_sampled": table[sampled]["bytes_per_position"],
        "abs_bias_nats": max(abs(figures["bias_nats"]) for figures in table[sampled]["far"].values()),
        "settings": {**TOP, **SAMPLED},
        "table": table,
    }
    publish("teacher_codec", result, arguments)


if __name__ == "__main__":
    main()
