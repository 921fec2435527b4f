"""Models on disk: a reference that stages exchange, and loading it in torch.

torch and transformers are imported where a model is loaded, never with this module.
"""

from pathlib import Path
from typing import Any

from pydantic import BaseModel

from infra.store import Store, StorePath


class ModelRef(BaseModel):
    """A model that a stage can load: a folder in the store, or a hub id at a commit. ``revision`` names its weights."""

    name: str
    revision: str
    path: StorePath | None = None  # folder in the store
    id: str | None = None  # hub id, or a folder outside the store
    hub_revision: str | None = None
    vocab_size: int = 0  # width of the logits
    tokenizer_hash: str = ""  # of the token map and special tokens
    eos_token_ids: list[int] = []
    chat_template: str | None = None  # in place of its tokenizer's own
    parameters: int = 0
    bytes: int = 0


def local_folder(store: Store, model: ModelRef, *, weights: bool = True) -> Path:
    """A local folder with the model's files, fetched first where it is not on this machine; without ``weights``,
    perhaps only what stands beside them: tokenizer and configuration."""
    if model.path:
        return store.localise(model.path, "" if weights else ".safetensors")
    assert model.id, "a model is in the store or has an id"
    if Path(model.id).is_dir():
        return Path(model.id)
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            model.id,
            revision=model.hub_revision,
            allow_patterns=["*.json", "*.jinja", "*.model", "*.txt", *(["*.safetensors"] if weights else [])],
        )
    )


def load_tokenizer(folder: Path, chat_template: str | None = None) -> Any:
    """A folder's tokenizer, with another chat template where one is given."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def load_model(folder: Path, dtype: str) -> Any:
    """The causal language model in eval mode, from safetensors only. ``dtype``: a torch dtype's name."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), use_safetensors=True, trust_remote_code=False
    )
    return model.eval()
