"""The fused divergence against the plain one: forward and backward from hidden states, time and peak extra memory.

    python -m benchmarks.divergence --json        (last line: one JSON object)

Each side runs in a process of its own, in turn, so that a peak is that side's; extra memory is what the process grew by
over its inputs. Ratios are fused / plain, medians over the rounds.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.conditions import conditions

CASES = {
    "1024 x 49152, width 576": (1024, 49_152, 576),
    "512 x 151936, width 896": (512, 151_936, 896),
}


def measure(side: str, tokens: int, vocabulary: int, width: int, pipe: Any) -> None:
    """One forward and backward of skewed reverse KL; sends seconds, extra peak bytes and the loss."""
    import torch

    from kernels.divergence import divergence_N, skewed_reverse_kl
    from kernels.fused import fused_divergence

    generator = torch.Generator().manual_seed(1)
    hidden_NH = torch.randn(tokens, width, generator=generator).requires_grad_()
    weight_VH = (torch.randn(vocabulary, width, generator=generator) / width**0.5).requires_grad_()
    teacher_NH = hidden_NH.detach() + 0.3 * torch.randn(tokens, width, generator=generator)
    weights_N = torch.ones(tokens)
    hidden_NH.grad, weight_VH.grad = torch.zeros_like(hidden_NH), torch.zeros_like(weight_VH)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    if side == "fused":
        loss, _ = fused_divergence(
            hidden_NH, weight_VH, teacher_NH, weight_VH.detach(), weights_N, skewed_reverse_kl(0.1)
        )
    else:
        teacher_NV = teacher_NH @ weight_VH.detach().T
        loss = divergence_N(teacher_NV, hidden_NH @ weight_VH.T, skewed_reverse_kl(0.1)).sum()
    loss.backward()
    seconds = time.perf_counter() - began
    pipe.send((seconds, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before), loss.item()))


def run(side: str, shape: tuple[int, int, int]) -> tuple[float, int, float]:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=measure, args=(side, *shape, theirs))
    process.start()
    result: tuple[float, int, float] = ours.recv()
    process.join()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/divergence.json")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"conditions": conditions(), "cases": {}, "peak_ratio": {}, "time_ratio": {}}
    for name, shape in CASES.items():
        sides: dict[str, list[tuple[float, int, float]]] = {"plain": [], "fused": []}
        for _ in range(arguments.rounds):
            for side, runs in sides.items():
                runs.append(run(side, shape))
        figures = {
            side: {
                "seconds": statistics.median(figure[0] for figure in runs),
                "peak_mib": statistics.median(figure[1] for figure in runs) / (1 << 20),
                "loss": runs[0][2],
            }
            for side, runs in sides.items()
        }
        result["cases"][name] = figures
        result["peak_ratio"][name] = figures["fused"]["peak_mib"] / figures["plain"]["peak_mib"]
        result["time_ratio"][name] = figures["fused"]["seconds"] / figures["plain"]["seconds"]
        for side, figure in figures.items():
            seconds, peak, loss = figure["seconds"], figure["peak_mib"], figure["loss"]
            print(f"{name:<26} {side:<6} {seconds:7.2f} s {peak:9.0f} MiB  loss {loss:.4f}")
    if arguments.save:
        (Path(__file__).parent / "results" / "divergence.json").write_text(json.dumps(result, indent=1) + "\n")
    if arguments.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
