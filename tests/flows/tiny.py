"""A whole run's models and settings small enough for tests: byte tokenizer, Llama shapes vLLM serves on CPU."""

from pathlib import Path
from typing import Any

import yaml

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def save_model(folder: Path, *, seed: int, layers: int = 2, width: int = 64) -> None:
    """A random model whose tokens are bytes, as a plain Hugging Face folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<unk>", "<s>", "</s>", *letters])}
    words = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        max_position_embeddings=512,
        initializer_range=0.1,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def settings(folder: Path) -> dict[str, Any]:
    """Settings of a run that takes every stage through its paces in as little as its start-up."""
    teacher = {"type": "huggingface", "id": str(folder / "teacher")}
    engine = {"max_model_len": 256, "kv_cache_gib": 0.05, "max_num_seqs": 64}
    train = {"steps": 3, "batch_size": 4, "micro_batch": 2, "max_length": 224, "validate_every": 2}
    tasks = [{"name": "chain_sum", "size": 60, "options": {"min_terms": 2, "max_terms": 3}}]
    return {
        "name": "tiny",
        "seed": 3,
        "models": {
            "teacher": teacher,
            "assistant": teacher,
            "student": {"type": "prune", "of": teacher, "layers": [1]},
        },
        "prompts": {
            "sources": [{"type": "reasoning_gym", "seed": 5, "tasks": tasks}],
            "heldout": 6,
            "max_prompt_tokens": 120,
            "near_duplicates": {"enabled": False},
        },
        "budget": {"queries": 24, "warmup_share": 0.5, "price": {"input": 0.5, "output": 1.5}},
        "sampling": {
            "teacher": {"max_tokens": 12},
            "student": {"temperature": 0.7, "max_tokens": 12, "samples": 3},
            "shard_size": 8,
            "distributions": {"type": "top"},
        },
        "signals": {
            "candidates": 20,
            "select": {"rule": "signals"},
            "keep": {"rule": "quantile", "threshold": 0.2, "drop_truncated": False},
        },
        "warmup": {**train, "method": {"type": "sft"}},
        "train": {**train, "method": {"type": "switch", "max_new_tokens": 12, "annotated": "stored"}},
        "evaluate": {"seeds": [1, 2], "max_tokens": 12, "reference": "teacher", "bootstrap": 200},
        "engines": {"teacher": engine, "assistant": engine, "student": engine},
    }


def recurring(folder: Path, inbox: Path, **changes: Any) -> dict[str, Any]:
    """The same for runs that follow each other on what comes into ``inbox``."""
    data = settings(folder)
    fields = {"prompt": "prompt", "answer": "answer"}
    data["prompts"]["sources"] = [{"type": "inbox", "path": str(inbox), "quiet_seconds": 0, "fields": fields}]
    data["models"]["student"] = {"type": "promoted", "first": data["models"]["student"]}
    data["recurring"] = {"min_prompts": 8, "heldout_renewal": 0.5, **changes}
    return data


def write_config(folder: Path) -> Path:
    """Models and settings below ``folder``; returns the settings file."""
    save_model(folder / "teacher", seed=1)
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings(folder)))
    return path
