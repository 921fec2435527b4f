"""Rows in the student's tokens, where a teacher of another family wrote them.

Methods that train on text alone may learn from any teacher: its answers are read as text, and written down anew. Those
that compare distributions refuse such a pair (``flows/model_checks.py``).
"""

from typing import Any

from infra.models import ModelRef
from infra.tokens import Tokens
from tasks.stage import Stage

ROLES = ("teacher", "student")
# Of a stage that is run alone, on samples of one model.
NOBODY = {"name": "", "revision": ""}


class InStudentTokens:
    """Puts what the teacher wrote into the student's tokens; rows of models that share them stay as they are."""

    def __init__(self, stage: Stage[Any], template_args: dict[str, Any]) -> None:
        models, self.template_args, self.tokens = stage.input("models").facts["models"], template_args, None
        teacher, student = (ModelRef.model_validate(models.get(role, NOBODY)) for role in ROLES)
        self.revision = teacher.revision
        # An endpoint's rows are the student's already: it has no tokenizer of its own.
        if teacher.tokenizer_hash and teacher.tokenizer_hash != student.tokenizer_hash:
            self.tokens = Tokens(stage.store, student)

    def of(self, prompt: dict[str, Any], sample: dict[str, Any]) -> dict[str, Any]:
        """A sample's row, its ``prompt_token_ids`` and ``token_ids`` the student's."""
        if self.tokens is None or sample["revision"] != self.revision:
            return sample
        return {
            **sample,
            "prompt_token_ids": self.tokens.prompt(prompt["messages"], self.template_args),
            "token_ids": self.tokens.response(sample["text"], sample["finish_reason"]),
        }
