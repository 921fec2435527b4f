"""Tiny models and data for the training tests: a word tokenizer, Llama shapes of a few thousand parameters, Parquet."""

from typing import Any

import pyarrow as pa
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from infra.manifest import Manifest, commit_manifest
from infra.models import ModelRef
from infra.store import LocalStore
from tasks.schemas import CHARGED, KEPT
from tasks.stage import Stage, StageSpec
from tasks.train import TrainSettings

WORDS, EOS = 300, 2


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def save_model(
    store: LocalStore, name: str, *, seed: int, hidden: int = 32, layers: int = 2, spread: float = 0.02, **more: Any
) -> ModelRef:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        initializer_range=spread,
        bos_token_id=1,
        eos_token_id=EOS,
        **more,
    )
    model = LlamaForCausalLM(config)
    folder = store.root / "toys" / name
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return ModelRef(
        name=name,
        revision=f"{name}-{seed}",
        path=f"toys/{name}",
        vocab_size=WORDS,
        tokenizer_hash="toy",
        eos_token_ids=[EOS],
        parameters=model.num_parameters(),
    )


def pair(store: LocalStore) -> dict[str, ModelRef]:
    """A student, and a teacher of another width that is sure of more."""
    student = save_model(store, "student", seed=1)
    return {"student": student, "teacher": save_model(store, "teacher", seed=2, hidden=64, spread=0.2)}


def kept_rows(count: int, seed: int = 0) -> pa.Table:
    """Rows of unequal lengths whose response counts upwards from the prompt's last word: easy to learn."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        prompt_length, length = (int(torch.randint(2, high, (), generator=generator)) for high in (8, 12))
        prompt = torch.randint(3, 40, (prompt_length,), generator=generator).tolist()
        response = [prompt[-1] + k for k in range(1, length)] + [EOS]
        ids = {"row_id": f"row-{i}", "prompt_id": f"prompt-{i}", "sample_id": f"sample-{i}", "source": "toy"}
        rows.append(ids | {"prompt_token_ids": [1, *prompt], "token_ids": response, "weight": 1.0})
    return pa.Table.from_pylist(rows, KEPT)


def commit_inputs(store: LocalStore, models: dict[str, ModelRef], rows: pa.Table) -> dict[str, str]:
    """Manifests of models and of kept rows, as earlier stages leave them; by input name."""
    inputs = {}
    for name in ("models", "keep"):
        spec = StageSpec(stage=name, module=f"tasks.{name}", root=store.uri)
        stage: Stage[Any] = Stage(spec, None)  # type: ignore[arg-type]
        if name == "models":
            stage.facts["models"] = {key: ref.model_dump() for key, ref in models.items()}
        else:
            stage.write_table("kept", rows)
            stage.write_table("charged", rows.select(CHARGED.names))
        manifest: Manifest = commit_manifest(store, stage.manifest)
        inputs[name] = manifest.path
    return inputs


def stage_of(
    store: LocalStore,
    inputs: dict[str, str],
    train: dict[str, Any],
    runtime: dict[str, Any] | None = None,
    redo: int = 0,
    **settings: Any,
) -> Stage[TrainSettings]:
    values = {"train": train, "seed": 7, "rows": ["keep"], "stage_name": "train"} | settings
    spec = StageSpec(
        stage="train",
        module="tasks.train",
        settings=values,
        inputs=inputs,
        redo=redo,
        root=store.uri,
        runtime={"threads": 1, **(runtime or {})},
    )
    return Stage(spec, TrainSettings.model_validate(values))
