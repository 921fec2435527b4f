"""A whole run's manifests with made-up but plausible tables, so that the report runs for real without any model."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa

from infra.manifest import Manifest, commit_manifest
from tasks import schemas
from tasks.config.run import RunConfig
from tasks.report import ReportSettings
from tasks.report import run as run_report
from tasks.stage import Stage, StageSpec

CONFIG = {
    "name": "synthetic",
    "models": {
        "teacher": {"type": "huggingface", "id": "house/teacher-7b"},
        "assistant": {"type": "huggingface", "id": "house/assistant-1b"},
        "student": {"type": "huggingface", "id": "house/student-135m"},
    },
    "prompts": {
        "sources": [{"type": "reasoning_gym", "tasks": [{"name": "chain_sum", "size": 3000}]}],
        "system": "Answer with a number.",
    },
    "budget": {
        "queries": 400,
        "tokens": 50_000,
        "price": {"input": 0.1, "output": 0.5},
        "online_teacher_tokens": 60000,
    },
    "evaluate": {"seeds": [1, 2, 3], "bootstrap": 300},
}
HOSTILE = (
    """</div></title></style></textarea>"'`--><script>alert("x")</script><img src="https://evil.example/x.png" """
    """onerror=alert(1)><svg onload=alert(2)>"""
    """<iframe srcdoc="<script>parent.alert(3)</script>"></iframe><a href="javascript:alert(4)">x</a>"""
    """<link rel=stylesheet href=https://evil.example/y.css><meta http-equiv=refresh content=0;url=https://evil.example>"""
    """{{ 7 * 7 }}<form action=https://evil.example><input autofocus onfocus=alert(5)>"""
)
HOSTILE_NAME = """</div><script>alert("y")</script><img src=https://evil.example/z.png onerror=alert(6)>"""
# Accuracy and loss of each model on a problem of average difficulty.
SKILL = {
    "base": (0.16, 2.05),
    "warmup": (0.31, 1.62),
    "final": (0.52, 1.24),
    "teacher": (0.8, 0.83),
    "promoted": (0.52, 1.24),
}


class SyntheticRun:
    """Makes manifests in a store, then the report over them."""

    def __init__(self, root: Path, config: dict | None = None, seed: int = 0) -> None:
        self.root, self.random = root, np.random.default_rng(seed)
        self.config = RunConfig.model_validate({**CONFIG, **(config or {})})
        self.paths: dict[str, str] = {}
        self.charged: dict[str, int] = {}

    def stage(self, name: str, tables: dict[str, tuple[pa.Schema, list[dict]]], **facts) -> Stage:
        """A complete stage with these rows. ``facts`` may hold ``files``: {name: folder}."""
        settings = {"select": {"rule": "signals"}} if name == "select" else {}
        spec = StageSpec(stage=name, module=f"tasks.{name}", root=str(self.root), settings=settings)
        stage = Stage(spec, self.config)
        for table, (schema, rows) in tables.items():
            half = max(1, len(rows) // 2)
            # Two parts: readers must not take the first for all.
            for shard, part in enumerate([rows[:half], rows[half:]]):
                stage.commit(table, shard, pa.Table.from_pylist(part, schema=schema))
            stage.close_table(table, schema)
        for key, folder in facts.pop("files", {}).items():
            stage.add_files(key, folder)
        stage.facts.update(facts)
        commit_manifest(stage.store, stage.manifest)
        self.paths[name] = spec.manifest_path
        return stage

    def whole(self, problems: int = 90) -> "SyntheticRun":
        """Every input of the report."""
        self.models()
        self.prompts(problems)
        self.annotations("warmup", 80)
        self.student("warmup-train", steps=40)
        self.signals(900)
        self.annotations("", 320)
        self.student("train", steps=120, on_policy=True)
        self.evaluation("evaluate-before", ["teacher", "base"], problems)
        self.evaluation("evaluate-after", ["warmup", "final"], problems)
        return self

    def models(self) -> None:
        names = {"teacher": "house/teacher-7b", "assistant": "house/assistant-1b", "student": "house/student-135m"}
        refs = {
            role: {"name": name, "revision": f"{role}0123456789", "id": name, "parameters": 1000, "bytes": 5_000_000}
            for role, name in names.items()
        }
        self.stage("models", {}, models=refs)

    def prompts(self, problems: int) -> None:
        def rows(kind: str, count: int) -> list[dict]:
            return [
                {
                    "prompt_id": f"{kind}{number:05}",
                    "source": ["chain_sum", HOSTILE_NAME, "word $orting_$"][number % 3],
                    "messages": [
                        {"role": "system", "content": "Answer with a number."},
                        {"role": "user", "content": f"What is {number} + {number}? {HOSTILE if number % 2 else ''}"},
                    ],
                    "answer": str(2 * number),
                    "reference": f"{number} + {number} = {2 * number}. The answer is {2 * number}.",
                    "verifier": "number",
                    "entry": None,
                }
                for number in range(count)
            ]

        reasons = ["duplicate"] * 130 + ["too_long"] * 21 + ["empty"] * 4
        refused = [
            {"source": "chain_sum", "position": number, "reason": reason, "raw": HOSTILE}
            for number, reason in enumerate(reasons)
        ]
        tables = {
            "prompts": (schemas.PROMPT, rows("p", 2700)),
            "warmup": (schemas.PROMPT, rows("w", 80)),
            "heldout": (schemas.PROMPT, rows("h", problems)),
            "quarantine": (schemas.QUARANTINE, refused),
        }
        self.stage("prompts", tables, counts={"read": 2700 + problems + len(refused)})

    def annotations(self, kind: str, queries: int) -> None:
        prefix = f"{kind}-" if kind else ""
        calibrated = self.config.signals.keep.calibrate is not None
        correct = self.random.random(queries) < 0.75
        confidence = np.clip(self.random.normal(0.45 + 0.3 * correct, 0.18), 0, 1)
        scores, kept = [], []
        for number in range(queries):
            reason = "truncated" if number % 40 == 0 else "kept" if confidence[number] > 0.4 else "below_threshold"
            shared = {"sample_id": f"{prefix}s{number}", "prompt_id": f"{prefix}{number}", "source": "chain_sum"}
            scores.append(
                {
                    **shared,
                    "text": HOSTILE,
                    "final_answer": "1",
                    "correct": bool(correct[number]),
                    "ta_teacher": float(confidence[number]),
                    "calibrated": float(confidence[number] > 0.6) if calibrated else None,
                    "calibrates": number % 5 == 0 if calibrated else None,
                    "kept": reason == "kept",
                    "reason": reason,
                }
            )
            if reason == "kept":
                kept.append(
                    {**shared, "row_id": f"r{number}", "prompt_token_ids": [1], "token_ids": [2], "weight": 1.0}
                )
        tokens = {"prompt_tokens": 60 * queries, "completion_tokens": 48 * queries, "tokens_per_second": 310.5}
        own = {"queries": queries, "prompt_tokens": 60 * queries, "completion_tokens": 48 * queries}
        self.charged = {name: own[name] + self.charged.get(name, 0) for name in own}
        spent = {**self.charged, "queries": self.charged["queries"] + 30}
        facts = {"charged": own, "charged_in_all": self.charged, "spent": own, "spent_in_all": spent}
        self.stage(f"{prefix}annotate", {"samples": (schemas.SAMPLE, [])}, queries=queries, **tokens, **facts)
        tables = {"scores": (schemas.SCORE, scores), "kept": (schemas.KEPT, kept), "charged": (schemas.CHARGED, [])}
        facts = {"calibration": {"known": queries // 5, "used": True}} if calibrated else {}
        self.stage(f"{prefix}keep", tables, threshold=0.4, kept=len(kept), scored=queries, **facts)

    def signals(self, candidates: int) -> None:
        unique = 1 + self.random.binomial(4, 0.45, candidates)
        correct = self.random.random(candidates) < 1.05 - 0.22 * unique
        confidence = np.clip(self.random.normal(0.35 + 0.25 * correct, 0.2), 0, 1)
        rows = [
            {
                "prompt_id": f"p{number}",
                "source": "chain_sum",
                "samples": 5,
                "unique_answers": int(unique[number]),
                "majority_share": 1 / float(unique[number]),
                "entropy": 0.5,
                "majority_answer": "1",
                "majority_text": "1",
                "correct": None if number % 50 == 0 else bool(correct[number]),
                "ta_student": float(confidence[number]),
                "uncertainty": 0.5,
                "selected": number < 320,
                "reason": "selected" if number < 320 else "budget_exhausted",
            }
            for number in range(candidates)
        ]
        self.stage("select", {"signals": (schemas.SIGNAL, rows), "selected": (schemas.PROMPT, [])})
        counts = {"completion_tokens": 5 * 40 * candidates, "tokens_per_second": 1210.0, "queries": 5 * candidates}
        self.stage("student-sample", {"samples": (schemas.SAMPLE, [])}, **counts)

    def student(self, name: str, steps: int, on_policy: bool = False) -> None:
        rows = []
        for step in range(1, steps + 1):
            loss = 0.8 + 1.4 * np.exp(-3 * step / steps) + self.random.normal(0, 0.06)
            validated = step % 20 == 0 or step == steps
            rolled = {
                "loss_on_policy": loss * 1.1,
                "loss_off_policy": loss * 0.9,
                "rollout_seconds": 0.4,
                "intervention_rate": 0.55 - 0.2 * step / steps + self.random.normal(0, 0.03),
                "response_length": 30 + 14 * step / steps + self.random.normal(0, 2),
                "eos_rate": min(1.0, 0.6 + 0.35 * step / steps + self.random.normal(0, 0.04)),
                "teacher_tokens": 160,
            }
            rows.append(
                {
                    "step": step,
                    "loss": loss,
                    "validation_loss": 0.95 + 1.3 * np.exp(-3 * step / steps) if validated else None,
                    "learning_rate": 5e-4 * min(step / 5, 0.1 + 0.9 * np.cos(step / steps * np.pi / 2) ** 2),
                    "gradient_norm": 1.0,
                    "tokens": 400,
                    "seconds": 0.9,
                    **(rolled if on_policy else {}),
                }
            )
        places = np.arange(64)
        emitted = (6000 * np.exp(-places / 40)).astype(int)
        taken = (emitted * np.clip(0.9 * (1 - np.exp(-places / 15)), 0, 1)).astype(int)
        positions = [
            {"position": t, "emitted": e, "interventions": i, "agreeing": i // 2, "cuts": i // 2}
            for t, e, i in zip(places.tolist(), emitted.tolist(), taken.tolist(), strict=True)
        ]
        folder = self.root / f"made-{name}"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(name.encode() * 100)
        (folder / "config.json").write_text(json.dumps({"made": name}))
        (folder / "README.md").write_text("the training stage's own card")
        reference = {"name": "house/student-135m", "revision": name, "parameters": 135_000_000, "bytes": 1200}
        tables = {"steps": (schemas.STEP, rows), "positions": (schemas.POSITION, positions if on_policy else [])}
        stage_folder = StageSpec(stage=name, module=f"tasks.{name}", root=str(self.root)).folder
        self.stage(
            name,
            tables,
            files={"student": folder},
            models={"student": {**reference, "path": f"{stage_folder}/files/student"}},
            tokens=400 * steps,
            tokens_per_second=444.0,
            start_validation_loss=2.3,
            best_validation_loss=0.99,
            best_step=steps,
            data={"rows": 250, "validation_rows": 28, "rows_too_long": 3},
            online_teacher_tokens=160 * steps if on_policy else 0,
            intervention_rate=0.42 if on_policy else None,
            agreeing_interventions=0.5 if on_policy else None,
            rollouts=480 if on_policy else 0,
            parity={"teacher": {"sequences": 4, "tokens": 210, "mean": 4.2e-06, "largest": 3.1e-05}}
            if on_policy
            else {},
        )

    def evaluation(self, name: str, labels: list[str], problems: int) -> None:
        ease = np.random.default_rng(9).normal(0, 0.16, problems)
        evaluations, losses = [], []
        for label in labels:
            skill, loss = SKILL[label]
            for number in range(problems):
                shared = {"label": label, "prompt_id": f"h{number:05}"}
                shared["source"] = ["chain_sum", HOSTILE_NAME, "word $orting_$"][number % 3]
                for index, seed in enumerate(self.config.evaluate.seeds):
                    correct = bool(self.random.random() < np.clip(skill + ease[number], 0, 1))
                    wrong = f"I think it is {number}, but I am not certain. {HOSTILE}"
                    answer = f"{number} + {number} = {2 * number}."
                    evaluations.append(
                        {
                            **shared,
                            "sample_index": index,
                            "seed": seed,
                            "text": answer if correct else wrong,
                            "final_answer": str(2 * number) if correct else str(number),
                            "correct": correct,
                            "rouge_l": float(np.clip(self.random.normal(30 + 50 * skill, 8), 0, 100)),
                            "tokens": 24,
                            "finish_reason": "stop" if correct else "length",
                        }
                    )
                losses.append({**shared, "loss": loss - ease[number] + self.random.normal(0, 0.05), "tokens": 20})
        tables = {"evaluations": (schemas.EVALUATION, evaluations), "losses": (schemas.RESPONSE_LOSS, losses)}
        self.stage(name, tables, completion_tokens=24 * len(evaluations), rows=len(evaluations))

    def report(
        self, inputs: list[str] | None = None, rival: dict | None = None, run: str = "alone"
    ) -> tuple[Stage, Manifest]:
        """Run the report over these inputs, over all where none is named."""
        config = self.config.model_dump(mode="json")
        settings = {key: config[key] for key in ("name", "seed", "evaluate", "promote", "budget")}
        spec = StageSpec(
            stage="report",
            module="tasks.report",
            root=str(self.root),
            settings={**settings, "config": config, "rival": rival},
            inputs={name: self.paths[name] for name in (self.paths if inputs is None else inputs)},
            runtime={"run": run},
        )
        stage = Stage(spec, ReportSettings.model_validate(spec.settings))
        run_report(stage)
        return stage, commit_manifest(stage.store, stage.manifest)
