"""The fused divergence against the plain one and TRL's loss: forward and backward from hidden states, time and memory.

    python -m benchmarks.divergence --json        (last line: one JSON object)

Generalised JSD with β = 0.5, which all sides have, in float32. Each measurement runs in a process of its own, in turn;
extra memory is what the process grew by over its inputs, gradients included. Ratios are fused / other, of medians over
each side's ROUNDS: as many as ten minutes on two cores allow, where TRL takes 25 s and 100 s. ``growth`` is of the
extra memory from 2,048 to 16,384 positions, as a multiple of the hidden states of those between: their gradient is one.
"""

import multiprocessing
import statistics
import time
from typing import Any

from benchmarks.conditions import conditions, options, publish
from benchmarks.meter import Peak
from benchmarks.peer import trl

CASES = {
    "2048 x 49152, width 576": (2048, 49_152, 576),
    "2048 x 151936, width 896": (2048, 151_936, 896),
    "16384 x 151936, width 896": (16_384, 151_936, 896),
}
SMALL, LARGE, ALONE = CASES
ROUNDS = {SMALL: {"fused": 3, "plain": 3, "trl": 2}, LARGE: {"fused": 3, "plain": 3, "trl": 1}, ALONE: {"fused": 1}}


def measure(side: str, shape: tuple[int, int, int], pipe: Any) -> None:
    """One forward and backward; sends seconds, extra peak bytes and the loss."""
    import torch

    from kernels.divergence import divergence_N, jsd
    from kernels.fused import fused_divergence

    tokens, vocabulary, width = shape
    generator = torch.Generator().manual_seed(1)
    hidden_NH = torch.randn(tokens, width, generator=generator).requires_grad_()
    weight_VH = torch.randn(vocabulary, width, generator=generator).div_(width**0.5).requires_grad_()
    teacher_NH = hidden_NH.detach() + 0.3 * torch.randn(tokens, width, generator=generator)
    weights_N = torch.full((tokens,), 1 / tokens)
    with Peak() as peak:
        began = time.perf_counter()
        if side == "fused":
            loss, _ = fused_divergence(hidden_NH, weight_VH, teacher_NH, weight_VH.detach(), weights_N, jsd(0.5))
        else:
            teacher_NV = teacher_NH @ weight_VH.detach().T
            loss = divergence_N(teacher_NV, hidden_NH @ weight_VH.T, jsd(0.5)).mean()
        loss.backward()
        seconds = time.perf_counter() - began
    pipe.send({"seconds": seconds, "extra_bytes": peak.extra, "loss": loss.item()})


def run(side: str, shape: tuple[int, int, int]) -> dict[str, Any]:
    if side == "trl":
        with trl("loss", tokens=shape[0], vocabulary=shape[1], width=shape[2]) as turn:
            return turn()
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=measure, args=(side, shape, theirs))
    process.start()
    theirs.close()
    result: dict[str, float] = ours.recv()
    process.join()
    return result


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="the most rounds of any side")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"conditions": conditions(), "cases": {}}
    for name in ("peak_ratio", "time_ratio", "peak_ratio_to_trl", "time_ratio_to_trl"):
        result[name] = {}
    for name, shape in CASES.items():
        sides: dict[str, list[dict[str, Any]]] = {side: [] for side in ROUNDS[name]}
        for number in range(arguments.rounds):
            for side, runs in sides.items():
                if number < ROUNDS[name][side]:
                    runs.append(run(side, shape))
        figures = {
            side: {key: statistics.median(figure[key] for figure in runs) for key in ("seconds", "extra_bytes", "loss")}
            | {"rounds": len(runs)}
            for side, runs in sides.items()
        }
        if "trl" in sides:
            result["conditions"]["trl"] = sides["trl"][0]["versions"]
        result["cases"][name] = figures
        for side, figure in figures.items():
            seconds, peak, loss = figure["seconds"], figure["extra_bytes"] / (1 << 20), figure["loss"]
            print(f"{name:<26} {side:<6} {seconds:7.2f} s {peak:9.0f} MiB  loss {loss:.5f}", flush=True)
        for side, suffix in (("plain", ""), ("trl", "_to_trl")):
            if side in figures:
                for ratio, key in (("peak_ratio", "extra_bytes"), ("time_ratio", "seconds")):
                    result[ratio + suffix][name] = figures["fused"][key] / figures[side][key]
    few, many = (result["cases"][name]["fused"]["extra_bytes"] for name in (LARGE, ALONE))
    hidden = 4 * (CASES[ALONE][0] - CASES[LARGE][0]) * CASES[ALONE][2]
    result["growth"] = {"extra_bytes": many - few, "hidden_bytes": hidden, "of_hidden": (many - few) / hidden}
    print(f"from {LARGE} to {ALONE}: extra memory grows by {result['growth']['of_hidden']:.2f} hidden states")
    publish("divergence", result, arguments)


if __name__ == "__main__":
    main()
