"""A teacher whose tokens are not the student's: what it wrote is trained on as text."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import AutoTokenizer

from infra.models import ModelRef
from infra.store import LocalStore
from tasks.foreign import InStudentTokens
from tests.flows.tiny import save_model

PROMPT = {"messages": [{"role": "user", "content": "1 + 1 = ?"}]}
SAMPLE = {"revision": "t", "prompt_token_ids": [1, 2], "token_ids": [3], "text": "It is 2.", "finish_reason": "stop"}


def rows_for(folder: Path, teacher_tokens: str) -> InStudentTokens:
    student = ModelRef(name="s", revision="s", id=str(folder / "student"), tokenizer_hash="own")
    teacher = ModelRef(name="t", revision="t", tokenizer_hash=teacher_tokens)
    models = {"teacher": teacher.model_dump(), "student": student.model_dump()}
    stage: Any = SimpleNamespace(input=lambda _: SimpleNamespace(facts={"models": models}), store=LocalStore(folder))
    return InStudentTokens(stage, {})


def test_answers_of_another_family_are_in_the_students_tokens(tmp_path: Path) -> None:
    save_model(tmp_path / "student", seed=1)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "student")
    rows = rows_for(tmp_path, "other")
    row = rows.of(PROMPT, SAMPLE)
    assert tokenizer.decode(row["prompt_token_ids"]) == "<|user|>1 + 1 = ?</s><|assistant|>"
    assert tokenizer.decode(row["token_ids"]) == "It is 2.</s>"
    assert row["token_ids"][-1] == tokenizer.eos_token_id
    cut = rows.of(PROMPT, {**SAMPLE, "finish_reason": "length"})
    assert tokenizer.decode(cut["token_ids"]) == "It is 2."
    # The student's own text, a peer's, a mentor's.
    own = {**SAMPLE, "revision": "s"}
    assert rows.of(PROMPT, own) is own


def test_rows_of_the_same_tokens_and_of_endpoints_stay(tmp_path: Path) -> None:
    for tokens in ("own", ""):
        assert rows_for(tmp_path, tokens).of(PROMPT, SAMPLE) is SAMPLE
