"""An auxiliary target: what the teacher is asked beside the answer, and the student learns in the same run."""

from pydantic import Field, model_validator

from tasks.config.base import Config

PLACE = "{question}"
KEY_FACTS = f"""{PLACE}

Do not answer yet. List the key facts that an answer needs, one a line."""


class Auxiliary(Config):
    """Every annotated prompt is asked once more, by a template, as MediExtract asks for key facts. Each target is a
    teacher query, and a training row with a weight of its own. Nothing is evaluated by it."""

    template: str = KEY_FACTS
    """What is asked in place of the prompt's last user turn, which is filled in for {question}."""
    weight: float = Field(default=0.5, gt=0)
    """Loss weight of the target's tokens; an answer's have 1, or the TA's confidence."""
    max_tokens: int = Field(default=128, ge=1)
    """Longest target, tokens."""

    @model_validator(mode="after")
    def _question_once(self) -> "Auxiliary":
        count = self.template.count(PLACE)
        if count != 1:
            raise ValueError(f"template: {PLACE} stands in it {count} times: give it once")
        return self

    @property
    def template_tokens(self) -> int:
        """The most tokens that the template adds to a prompt: no tokenizer makes more of a text than it has bytes."""
        return len(self.template.encode()) - len(PLACE)
