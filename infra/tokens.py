"""Conversations and answers in the tokens of one model: what of another's text a student is trained on."""

from typing import Any

from infra.models import ModelRef, load_tokenizer, local_folder
from infra.store import Store


class Tokens:
    """A model's tokenizer and chat template."""

    def __init__(self, store: Store, model: ModelRef) -> None:
        self.tokenizer = load_tokenizer(local_folder(store, model, weights=False), model.chat_template)

    def prompt(self, conversation: list[dict[str, str]], template_args: dict[str, Any]) -> list[int]:
        """Token ids up to the answer's beginning."""
        text = self.tokenizer.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=True, **template_args
        )
        # The template writes the special tokens itself.
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def response(self, text: str, finish_reason: str | None) -> list[int]:
        """Token ids of an answer, ended where its writer ended it."""
        ids = list(self.tokenizer.encode(text, add_special_tokens=False))
        return [*ids, self.tokenizer.eos_token_id] if finish_reason == "stop" else ids
