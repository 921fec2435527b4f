"""House models as they are before they are taught: sizes, the tokenizer of all three, fresh weights.

Single characters are tokens, and whole tokens stand for the words that every problem of a family shares. Used by
``python -m benchmarks.house``.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tasks.config.signals import P_TRUE, PTrue

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
    "Solve the following multiplication:",
    "Give only the result as your final answer.",
    "Answer:",
    "Question:",
    ". ",
    ", ",
    *(f" {sign} " for sign in "+-*%="),
    "Proposed answer:",
    P_TRUE.partition("{answer}")[2],
    PTrue().prefill,
]
BATCH = 32
MEASURED, COLD = 100, 0.05  # problems a task, temperature
DRILLED = 6000  # problems a task, taken apart into steps


@dataclass(frozen=True)
class Shape:
    """A model's size, how long it is taught at most, and the share of right answers that is enough for a task. The TA
    is the teacher as it stood when that was its mean share, and is then taught to judge."""

    width: int
    layers: int
    steps: int
    enough: float
    problems: int = 10_000  # of each task
    learning_rate: float = 1.5e-3
    judge_steps: int = 0
    drill_steps: int = 0
    worked: float = 1.0  # share of whole solutions among drills


SHAPES = {
    "student": Shape(
        width=128, layers=4, steps=0, enough=0.0, problems=300, learning_rate=2e-3, drill_steps=5000, worked=0.03
    ),
    "teacher": Shape(width=160, layers=4, steps=9000, enough=0.8),
    "assistant": Shape(width=160, layers=4, steps=0, enough=0.55, judge_steps=5000),
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
            initializer_range=0.7 * shape.width**-0.5,
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
