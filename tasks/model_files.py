"""What a model's files say of it, read without loading its weights."""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tasks.config.models import GgufModel, HuggingFaceModel


@dataclass(frozen=True)
class ModelFiles:
    """Whether the tokenizer has a chat template; layers; and how many numbers one token and layer takes in a key-value
    cache, None where its layers are of several kinds."""

    has_template: bool
    layers: int
    cache_values: int | None


def check_weights(source: HuggingFaceModel | GgufModel) -> None:
    """ValueError where files on this machine are no weights, or are cut off. Reads their heads alone."""
    if isinstance(source, GgufModel):
        from tasks.models import gguf_path

        path = gguf_path(source)
        try:
            gguf_head(path)
        except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
            raise ValueError(f"file: {str(path)!r} is no whole GGUF file ({error}): fetch it again") from None
        return
    from safetensors import SafetensorError, safe_open

    folder = Path(source.id)
    for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
        try:
            with safe_open(path, framework="numpy"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"id: {str(path)!r} is no whole safetensors file ({error}): fetch it again") from None
    if folder.is_dir():
        try:
            if not isinstance(json.loads((folder / "config.json").read_text()), dict):
                raise ValueError("no settings by name")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"id: {str(folder / 'config.json')!r} is no JSON ({error}): fetch it again") from None


@lru_cache(maxsize=8)
def gguf_head(path: Path) -> Any:
    """The reader of a GGUF file. Parsing its vocabulary takes a second or more."""
    from gguf import GGUFReader

    return GGUFReader(path)


@lru_cache(maxsize=8)
def model_files(source: HuggingFaceModel | GgufModel) -> ModelFiles:
    """Of a folder, a file, or a model on the hub, whose small files are fetched."""
    return of_gguf(source) if isinstance(source, GgufModel) else of_folder(source)


def of_gguf(source: GgufModel) -> ModelFiles:
    from tasks.models import gguf_path

    fields = gguf_head(gguf_path(source)).fields
    kind = fields["general.architecture"].contents()

    def value(name: str) -> int | None:
        """None also where layers differ: then it is a list."""
        found = fields[key].contents() if (key := f"{kind}.{name}") in fields else None
        return found if isinstance(found, int) else None

    heads, width = value("attention.head_count"), value("embedding_length")
    kv_heads, head = value("attention.head_count_kv"), value("attention.key_length")
    head = head or (width // heads if width and heads else None)
    plain = not value("attention.sliding_window")
    return ModelFiles(
        has_template="tokenizer.chat_template" in fields,
        layers=value("block_count") or 0,
        cache_values=2 * kv_heads * head if kv_heads and head and plain else None,
    )


def of_folder(source: HuggingFaceModel) -> ModelFiles:
    folder = Path(source.id)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(source.id, revision=source.revision, allow_patterns=["*.json", "*.jinja"]))

    def known(name: str) -> dict[str, Any]:
        path = folder / name
        return json.loads(path.read_text()) if path.is_file() else {}

    config = known("config.json")
    config = {**config, **(config.get("text_config") or {})}
    heads, width = config.get("num_attention_heads"), config.get("hidden_size")
    kv_heads = config.get("num_key_value_heads") or heads
    head = config.get("head_dim") or (width // heads if width and heads else None)
    kinds = set(config.get("layer_types") or ["full_attention"])
    plain = kinds == {"full_attention"} and not config.get("kv_lora_rank")
    template = known("tokenizer_config.json").get("chat_template") or known("chat_template.json")
    return ModelFiles(
        has_template=bool(template) or (folder / "chat_template.jinja").is_file(),
        layers=config.get("num_hidden_layers") or 0,
        cache_values=2 * kv_heads * head if kv_heads and head and plain else None,
    )
