"""House models: a teacher, a TA and a student, trained here on worked solutions so that methods can be compared in minutes.

    python -m benchmarks.house [--folder FOLDER] [--only ROLE] [--measure]        (or: make house-models)

The teacher is imperfect, the student weak but not at zero, the TA between them; the TA is also taught to judge: answers
that the other two wrote, right or wrong by the task's own verifier, in the words in which a run asks it. One tokenizer:
single characters, and whole tokens for the words that every problem of a family shares. Training problems and those
of runs come from different seeds.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.lessons import TASKS, Lesson, lessons
from benchmarks.pairs import load, trained
from kernels.decode import Sampling, alone
from kernels.noise import sequence_key
from tasks.batches import Batch, Sequence, collate
from tasks.config.signals import P_TRUE, PTrue
from tasks.score import filled

FOLDER = Path(__file__).parent / "house"
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if not loop.last or message['role'] != 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PHRASES = [
    "State the final answer to the following arithmetic problem:",
    "Find the Greatest Common Divisor (GCD) of these numbers:",
    "Give only the GCD as your final answer.",
    "Your task is to count how many legs there are in total when given a list of animals.\n\n",
    "Now, how many legs are there in total if you have",
    "How many times does the letter",
    "appear in the text:",
    "Spell this word backward (example: sun -> nus):",
    "Answer:",
    "Question:",
    "Proposed answer:",
    P_TRUE.partition("{answer}")[2],
    PTrue().prefill,
]
BATCH = 64
LONGEST = 110  # tokens of a response


@dataclass(frozen=True)
class Shape:
    """A model's size and how long it is trained."""

    width: int
    layers: int
    steps: int
    learning_rate: float
    judge_steps: int = 0


SHAPES = {
    "teacher": Shape(width=192, layers=6, steps=2600, learning_rate=2e-3),
    "student": Shape(width=128, layers=4, steps=500, learning_rate=2e-3),
    "assistant": Shape(width=160, layers=5, steps=1500, learning_rate=2e-3, judge_steps=600),
}


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer of all three, made once: bytes, shared phrases, animals and the marks of a chat."""
    from reasoning_gym.arithmetic.leg_counting import ANIMALS
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<unk>", "<s>", "</s>", *letters])}
    words = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words.decoder = decoders.ByteLevel()
    words.add_tokens([AddedToken(phrase, normalized=False) for phrase in [*PHRASES, *sorted(ANIMALS)]])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|system|>", "<|user|>", "<|assistant|>"]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer


def fresh(shape: Shape, tokenizer: Any, seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    heads = shape.width // 32
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=shape.width,
            intermediate_size=shape.width * 8 // 3 // 32 * 32,
            num_hidden_layers=shape.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    )


def prompt_ids(tokenizer: Any, question: str, prefill: str = "") -> torch.Tensor:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    return torch.tensor(tokenizer.encode(text + prefill, add_special_tokens=False))


def taught(tokenizer: Any, lesson: Lesson) -> Sequence:
    response = tokenizer.encode(lesson.solution, add_special_tokens=False) + [tokenizer.eos_token_id]
    return Sequence(lesson.task, prompt_ids(tokenizer, lesson.question), torch.tensor(response))


def batches(rows: list[Sequence], steps: int, seed: int) -> list[Batch]:
    """Rows drawn again and again, those of a batch alike in length: padding would cost half the time."""
    generator, made = random.Random(seed), []
    while len(made) < steps:
        pool = sorted(generator.sample(rows, 16 * BATCH), key=lambda row: len(row.prompt) + len(row.response))
        parts = [pool[start : start + BATCH] for start in range(0, len(pool), BATCH)]
        generator.shuffle(parts)
        made += [collate(part, torch.device("cpu")) for part in parts]
    return made[:steps]


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


def judged(tokenizer: Any, models: list[Any], count: int, seed: int) -> list[Sequence]:
    """What a TA is asked about others' answers, with the verdict of the known answer; as many right as wrong."""
    problems = [lesson for task in TASKS for lesson in lessons(task, count // len(TASKS), seed)]
    sides: dict[bool, list[Sequence]] = {True: [], False: []}
    for number, model in enumerate(models):
        for lesson, text in zip(problems, answers(model, tokenizer, problems, 0.8, seed + number), strict=True):
            true = right(lesson, text)
            prompt = prompt_ids(tokenizer, filled(P_TRUE, lesson.question, text), PTrue().prefill)
            verdict = tokenizer.encode(PTrue().true if true else PTrue().false, add_special_tokens=False)
            sides[true].append(Sequence(lesson.task, prompt, torch.tensor(verdict)))
    even = min(map(len, sides.values()))
    return sides[True][:even] + sides[False][:even]


def measure(model: Any, tokenizer: Any, count: int = 60, seed: int = 999_999) -> dict[str, float]:
    """Share of right answers by task, greedy for all purposes."""
    found = {}
    for task in TASKS:
        problems = list(lessons(task, count, seed))
        texts = answers(model, tokenizer, problems, 0.05, seed)
        found[task] = round(sum(map(right, problems, texts)) / count, 3)
    return found


def roles(chosen: str | None) -> Iterator[str]:
    yield from ([chosen] if chosen else SHAPES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--only", choices=list(SHAPES), help="train this one only")
    parser.add_argument("--problems", type=int, default=20_000, help="training problems of each task")
    parser.add_argument("--measure", action="store_true", help="train nothing, measure what is there")
    arguments = parser.parse_args()
    rows: list[Sequence] = []
    for role in roles(arguments.only):
        shape, folder = SHAPES[role], arguments.folder / role
        tokenizer = tokenizer_of(folder)
        if not arguments.measure:
            if not rows:
                rows = [
                    taught(tokenizer, lesson)
                    for number, task in enumerate(TASKS)
                    for lesson in lessons(task, arguments.problems, 1_000_000 + number)
                ]
                print(
                    f"{len(rows)} solutions, longest {max(len(row.response) for row in rows)} tokens", file=sys.stderr
                )
            model = fresh(shape, tokenizer, seed=len(role))
            print(f"{role}: {sum(parameter.numel() for parameter in model.parameters())} parameters", file=sys.stderr)
            for _ in trained(model, batches(rows, shape.steps, seed=7), shape.learning_rate, None):
                pass
            if shape.judge_steps:
                others = [load(arguments.folder / other) for other in ("teacher", "student")]
                asked = judged(tokenizer, others, 10_000, 2_000_000)
                mixed = asked + random.Random(8).sample(rows, min(len(rows), len(asked)))
                for _ in trained(model, batches(mixed, shape.judge_steps, seed=9), shape.learning_rate / 2, None):
                    pass
            model.save_pretrained(folder)
        print(json.dumps({role: measure(load(folder), tokenizer)}), flush=True)


if __name__ == "__main__":
    main()
