"""House models: a teacher, a TA and a student, trained here on worked solutions for the comparison of methods.

    python -m benchmarks.house [--folder FOLDER] [--only ROLE …] [--measure]        (or: make house-models)

The teacher is imperfect, the student weak but not at zero, the TA between them. The student is drilled in single steps
and sees few whole solutions: it can calculate and hardly knows how to go about a problem, so that a run of some hundred
annotations can teach it something. The TA is also taught to judge: answers that the other two wrote, right or wrong by
the task's own verifier, in the words in which a run asks it. One tokenizer: single characters, and whole tokens for
the words that every problem of a family shares. Training problems and those of runs come from different seeds.
"""

import argparse
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.house_card import card
from benchmarks.house_model import BATCH, COLD, DRILLED, MEASURED, SHAPES, Shape, fresh, prompt_ids, tokenizer_of
from benchmarks.lessons import HOUSE, TASKS, Lesson, drills, lessons
from benchmarks.pairs import load, response_states
from kernels.calibration import auroc
from kernels.decode import Sampling, alone
from kernels.fused import fused_cross_entropy
from kernels.noise import sequence_key
from tasks.batches import Batch, Sequence, collate
from tasks.config.signals import P_TRUE, PTrue
from tasks.score import filled
from tasks.student import head_of

POOL = 20  # batches drawn and sorted at once
LONGEST = 72  # tokens of a response
MEASURE_EVERY = 100
REVIEW = 0.4  # weight of a task that is known well enough
PRACTICE = 0.05  # weight of a task beside judging


def taught(tokenizer: Any, lesson: Lesson) -> Sequence:
    response = [*tokenizer.encode(lesson.solution, add_special_tokens=False), tokenizer.eos_token_id]
    return Sequence(lesson.task, prompt_ids(tokenizer, lesson.question), torch.tensor(response))


def batches(rows: dict[str, list[Sequence]], weights: dict[str, float], steps: int, seed: int) -> Iterator[Batch]:
    """Rows drawn again and again, tasks by weight; those of a batch alike in length, which spares padding."""
    generator = random.Random(seed)
    tasks, shares = list(weights), list(weights.values())
    for start in range(0, steps, POOL):
        drawn = generator.choices(tasks, shares, k=POOL * BATCH)
        pool = [generator.choice(rows[task]) for task in drawn]
        pool.sort(key=lambda row: len(row.prompt) + len(row.response))
        parts = [pool[first : first + BATCH] for first in range(0, len(pool), BATCH)]
        generator.shuffle(parts)
        for part in parts[: steps - start]:
            yield collate(part, torch.device("cpu"))


def learn(model: Any, optimizer: torch.optim.Optimizer, data: Iterator[Batch], rates: Iterator[float]) -> float:
    """Cross entropy per token; the mean loss."""
    model.train()
    losses = []
    for batch, rate in zip(data, rates, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast("cpu", torch.bfloat16):
            hidden_NH = response_states(model, batch)
        weights_N = batch.weights_N / len(batch.weights_N)
        loss, _ = fused_cross_entropy(hidden_NH.float(), head_of(model).weight_VH, batch.targets_N, weights_N)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return sum(losses) / len(losses)


def school(model: Any, tokenizer: Any, shape: Shape, rows: dict[str, list[Sequence]], folder: Path, done: int) -> None:
    """Teach all tasks, those that are known well enough less, until all are; so many steps are done. Saves on the way,
    the weights only: what goes on begins with an optimiser that knows nothing."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    weights, began, middle = dict.fromkeys(rows, 1.0), time.monotonic(), False
    if done >= shape.steps:
        weights = {
            task: 1.0 if share < shape.enough else REVIEW for task, share in measure(model, tokenizer, 24).items()
        }
    for step in range(done, shape.steps, MEASURE_EVERY):
        rates = (shape.learning_rate * min(1.0, (step + part) / 50) for part in range(1, MEASURE_EVERY + 1))
        loss = learn(model, optimizer, batches(rows, weights, MEASURE_EVERY, seed=step), rates)
        found = measure(model, tokenizer, 24, seed=555)
        print(f"{step + MEASURE_EVERY} steps, {time.monotonic() - began:.0f} s, loss {loss:.3f}, {found}", flush=True)
        model.save_pretrained(folder)
        if not middle and sum(found.values()) / len(found) >= SHAPES["assistant"].enough and folder.name == "teacher":
            model.save_pretrained(folder.with_name("assistant"))
            middle = True
        weights = {task: 1.0 if share < shape.enough else REVIEW for task, share in found.items()}
        if min(found.values()) >= shape.enough:
            break


def drill(model: Any, tokenizer: Any, shape: Shape, rows: dict[str, list[Sequence]]) -> None:
    """Teach single steps, and whole solutions now and then, with a rate that falls to 0."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    weights = dict.fromkeys(rows, shape.worked)
    for number, task in enumerate(TASKS):
        rows = rows | {f"drill-{task}": [taught(tokenizer, each) for each in drills(task, DRILLED, 2_500_000 + number)]}
        weights[f"drill-{task}"] = 1.0
    rates = (
        shape.learning_rate * min(1.0, (step + 1) / 50) * (1 - step / shape.drill_steps)
        for step in range(shape.drill_steps)
    )
    for step in range(0, shape.drill_steps, 10 * MEASURE_EVERY):
        loss = learn(model, optimizer, batches(rows, weights, 10 * MEASURE_EVERY, seed=step), rates)
        print(f"{step + 10 * MEASURE_EVERY} steps, loss {loss:.3f}, {measure(model, tokenizer, 24)}", flush=True)


def answers(model: Any, tokenizer: Any, problems: list[Lesson], temperature: float, seed: int) -> list[str]:
    """The model's responses."""
    texts: list[str] = []
    for start in range(0, len(problems), 100):
        prompts = [prompt_ids(tokenizer, lesson.question) for lesson in problems[start : start + 100]]
        keys_B = torch.tensor([sequence_key(seed, start + row) for row in range(len(prompts))])
        rollout = alone(
            model,
            prompts,
            keys_B,
            max_new_tokens=LONGEST,
            eos_ids=[tokenizer.eos_token_id],
            sampling=Sampling(temperature),
        )
        texts += [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in rollout.tokens]
    return texts


def right(lesson: Lesson, text: str) -> bool:
    """The answer that stands after "Answer:" is the known one."""
    return text.rpartition("Answer:")[2].strip() == lesson.answer


def judged(tokenizer: Any, models: list[Any], count: int, seed: int) -> dict[str, list[Sequence]]:
    """What a TA is asked about others' answers, with the verdict of the known answer."""
    problems = [lesson for task in TASKS for lesson in lessons(task, count // len(TASKS), seed)]
    sides: dict[str, list[Sequence]] = {"right": [], "wrong": []}
    for number, model in enumerate(models):
        for lesson, text in zip(problems, answers(model, tokenizer, problems, 0.8, seed + number), strict=True):
            true = right(lesson, text)
            prompt = prompt_ids(tokenizer, filled(P_TRUE, lesson.question, text), PTrue().prefill)
            verdict = tokenizer.encode(PTrue().true if true else PTrue().false, add_special_tokens=False)
            sides["right" if true else "wrong"].append(Sequence(lesson.task, prompt, torch.tensor(verdict)))
    return sides


def measure(model: Any, tokenizer: Any, count: int = MEASURED, seed: int = 5_000_000) -> dict[str, float]:
    """Share of right answers by task, greedy for all purposes."""
    found = {}
    for task in TASKS:
        problems = list(lessons(task, count, seed))
        texts = answers(model, tokenizer, problems, COLD, seed)
        found[task] = round(sum(map(right, problems, texts)) / count, 3)
    return found


def judge(model: Any, tokenizer: Any, shape: Shape, rows: dict[str, list[Sequence]], others: list[Any]) -> None:
    """Teach to tell right answers from wrong ones, beside the tasks."""
    asked = judged(tokenizer, others, 16_000, 2_000_000)
    print({verdict: len(side) for verdict, side in asked.items()}, flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    weights = {"right": 1.5, "wrong": 1.5, **dict.fromkeys(TASKS, PRACTICE)}
    rates = (0.6 * shape.learning_rate * (1 - step / shape.judge_steps) for step in range(shape.judge_steps))
    loss = learn(model, optimizer, batches(rows | asked, weights, shape.judge_steps, seed=9), rates)
    print(f"judge: loss {loss:.3f}", flush=True)


@torch.no_grad()
def discernment(model: Any, tokenizer: Any, others: list[Any], seed: int = 6_000_000) -> dict[str, float]:
    """By task, how well the TA tells right answers from wrong ones that the others wrote: AUROC of p_true."""
    yes, no = (tokenizer.encode(text, add_special_tokens=False)[0] for text in (PTrue().true, PTrue().false))
    found: dict[str, list[tuple[float, bool]]] = {task: [] for task in TASKS}
    for verdict, rows in judged(tokenizer, others, MEASURED * len(TASKS), seed).items():
        for row in rows:
            logits_V = model(row.prompt[None]).logits[0, -1]
            found[row.name].append((torch.sigmoid(logits_V[yes] - logits_V[no]).item(), verdict == "right"))
    return {task: round(auroc(*zip(*pairs, strict=True)), 3) for task, pairs in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=HOUSE)
    parser.add_argument("--only", nargs="+", choices=list(SHAPES), default=list(SHAPES), help="these roles only")
    parser.add_argument("--done", type=int, default=0, help="go on from saved weights, so many steps old")
    parser.add_argument("--measure", action="store_true", help="train nothing, measure what is there")
    arguments = parser.parse_args()
    for role in arguments.only:
        shape, folder = SHAPES[role], arguments.folder / role
        tokenizer = tokenizer_of(folder)
        if not arguments.measure:
            rows = {
                task: [taught(tokenizer, lesson) for lesson in lessons(task, shape.problems, 1_000_000 + number)]
                for number, task in enumerate(TASKS)
            }
            model = load(folder) if shape.judge_steps or arguments.done else fresh(shape, tokenizer, seed=len(role))
            print(f"{role}: {sum(parameter.numel() for parameter in model.parameters())} parameters", flush=True)
            if shape.drill_steps:
                drill(model, tokenizer, shape, rows)
            elif not shape.judge_steps:
                school(model, tokenizer, shape, rows, folder, arguments.done)
            else:
                judge(model, tokenizer, shape, rows, [load(arguments.folder / name) for name in ("teacher", "student")])
            model.save_pretrained(folder)
        model = load(folder)
        found = measure(model, tokenizer)
        told = {}
        if shape.judge_steps:
            told = discernment(model, tokenizer, [load(arguments.folder / name) for name in ("teacher", "student")])
        (folder / "README.md").write_text(card(role, model.num_parameters(), found, told))
        print(json.dumps({role: found, "judges": told}), flush=True)


if __name__ == "__main__":
    main()
