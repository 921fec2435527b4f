"""Toys whose teacher has learnt the rows, so that a student's following it can be seen."""

import shutil
from pathlib import Path

from test_loop import Toys, run_all
from toys import commit_inputs, kept_rows, save_model

from infra.store import LocalStore


class Taught(Toys):
    """A store with a fresh student, a teacher of its size and 48 rows, and plans on them."""

    def __init__(self, root: Path) -> None:
        lessons = Toys(root / "lessons").plan(steps=80, validate_every=40, checkpoint_every=100)
        _, kept = run_all(lessons, root / "checkpoints")
        self.store = LocalStore(root / "store")
        student = save_model(self.store, "student", seed=1)
        shutil.copytree(kept[-1] / "student", self.store.root / "toys" / "teacher")
        place = {"name": "teacher", "path": "toys/teacher", "revision": "taught"}
        self.models = {"student": student, "teacher": student.model_copy(update=place), "twin": student}
        self.inputs = commit_inputs(self.store, self.models, kept_rows(48))
