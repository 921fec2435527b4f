"""The finished student's model card: README.md with the front matter that Hugging Face reads."""

import html
import json
import re
from typing import Any

import yaml

from infra.models import ModelRef
from tasks.accounts import Manifests, teacher_queries
from tasks.config.methods import Switch
from tasks.config.models import HuggingFaceModel
from tasks.config.run import RunConfig
from tasks.config.train import TrainConfig
from tasks.metrics import METRICS, Results
from tasks.verdict import NAMES, SHOWN, verdict

TEXT = """{front}
# {name}

{parameters}, distilled from {teacher} with Switchyard. {verdict}

## Results

{problems:,} held-out problems, {seeds} sampled responses each at temperature {temperature:g}. In brackets the \
{confidence:g} % bootstrap interval over problems and seeds.

{results}

{meanings}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # where this file is
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
messages = [{system}{{"role": "user", "content": "What is 12 + 30?"}}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"{template_args}
)
output = model.generate(**inputs, max_new_tokens={max_tokens})
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

```sh
vllm serve . --served-model-name {name}
```

## How it was made

| | |
|---|---|
{facts}

The method: {signals} {method}

It shares the limits of its teacher, and was measured on held-out problems of the data above only.
"""


def plain(text: Any) -> str:
    """Any text as Markdown that shows it and does nothing else, on one line."""
    return re.sub(r"([\\`*_\[\]|#~!])", r"\\\1", html.escape(" ".join(str(text).split()), quote=False))


def card(config: RunConfig, manifests: Manifests, results: Results, student: ModelRef, fingerprint: str) -> str:
    """The card's text. ``student`` is the finished one; ``fingerprint`` names the report that measured it."""
    evaluate = config.evaluate
    models = {role: ref["name"] for role, ref in model_facts(manifests).items()}
    system = {"role": "system", "content": config.prompts.system}
    arguments = "".join(f", {key}={value!r}" for key, value in config.models.chat_template_args.items())
    return TEXT.format(
        front=front_matter(config, results),
        name=config.name,
        parameters=f"{student.parameters:,} parameters" if student.parameters else "A language model",
        teacher=plain(models.get("teacher", "a teacher")),
        verdict=verdict(results, evaluate.confidence),
        problems=results.problems,
        seeds=len(evaluate.seeds),
        temperature=evaluate.temperature,
        confidence=100 * evaluate.confidence,
        results=table(results),
        meanings=(
            "Response loss: cross entropy of the reference response, lower is better. ROUGE-L: overlap with the "
            "reference. Accuracy: final answers that the task's verifier accepts."
        ),
        # As a Python literal, without a backtick that would end the block.
        system=code(system) + ", " if config.prompts.system else "",
        template_args=code_text(arguments),
        max_tokens=evaluate.max_tokens,
        facts="\n".join(f"| {name} | {plain(value)} |" for name, value in rows(config, manifests, fingerprint)),
        signals=signals_text(config),
        method=method_text(config.train),
    )


def front_matter(config: RunConfig, results: Results) -> str:
    """YAML between two rules. A base model is named only where it is on the hub."""
    final = results.metrics["final"]
    data: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["distillation", "switchyard", config.train.method.type],
    }
    base = config.models.student
    if isinstance(base, HuggingFaceModel) and re.fullmatch(r"[\w.-]+/[\w.-]+", base.id):
        data["base_model"] = base.id
    measured = [
        {"type": metric, "name": f"{SHOWN[metric].name} ({SHOWN[metric].unit})", "value": SHOWN[metric].factor * value}
        for metric in METRICS
        if (value := final[metric]) is not None
    ]
    if measured:
        dataset = {"type": "held-out", "name": f"held-out problems of {config.name}"}
        result = {"task": {"type": "text-generation"}, "dataset": dataset, "metrics": measured}
        data["model-index"] = [{"name": config.name, "results": [result]}]
    return f"---\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True)}---"


def table(results: Results) -> str:
    """Means with intervals, one row a model that was measured."""
    metrics = [metric for metric in METRICS if results.known(metric)]
    if not metrics:
        return "Not measured."
    lines = ["| Model | " + " | ".join(f"{SHOWN[metric].name} ({SHOWN[metric].unit})" for metric in metrics) + " |"]
    lines.append("|---|" + "---:|" * len(metrics))
    for label in results.metrics:
        row = results.metrics[label]
        if any(row[metric] is not None for metric in metrics):
            cells = [
                SHOWN[metric].number(row[metric])
                + (f" [{SHOWN[metric].interval(row[f'{metric}_ci'])}]" if row[f"{metric}_ci"] else "")
                for metric in metrics
            ]
            lines.append(f"| {NAMES[label]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def model_facts(manifests: Manifests) -> dict[str, Any]:
    return manifests["models"].facts.get("models", {}) if "models" in manifests else {}


def rows(config: RunConfig, manifests: Manifests, fingerprint: str) -> list[tuple[str, str]]:
    """What went into the student, as (name, value)."""
    found = [
        (role.capitalize() if role != "assistant" else "Teaching assistant", f"{ref['name']} at {ref['revision']}")
        for role, ref in model_facts(manifests).items()
    ]
    found.append(("Data", "; ".join(describe(source) for source in config.prompts.sources)))
    queries = teacher_queries(manifests)
    if queries is not None:
        found.append(("Teacher queries", f"{queries:,} of {config.budget.queries:,}"))
    if config.warms_up:
        found.append(("Stage 1", training(config.warmup)))
    found.append(("Stage 2", training(config.train)))
    if config.mentor:
        found.append(("Mentor's training", training(config.mentor.train)))
    return [*found, ("Seed", str(config.seed)), ("Run and report", f"{config.name}, {fingerprint}")]


def describe(source: Any) -> str:
    """A prompt source in a few words."""
    if source.type == "reasoning_gym":
        return "reasoning-gym: " + ", ".join(f"{task.name} ({task.size:,})" for task in source.tasks)
    return f"{source.type}: {getattr(source, 'id', None) or source.path}"


def training(config: TrainConfig) -> str:
    return (
        f"{config.method.type}, {config.steps:,} steps of {config.batch_size} sequences, "
        f"learning rate {config.learning_rate:g}"
    )


def signals_text(config: RunConfig) -> str:
    """What decided, before and behind the teacher."""
    select, keep = config.signals.select.rule, config.signals.keep
    told = [
        "a small warm-up trained the student on a few of the teacher's answers." if config.warms_up else "one stage."
    ]
    told.append(
        {
            "signals": "Its own answers, and a teaching assistant's confidence in them, decided which prompts were "
            "worth a teacher query (Zhou & Ai 2024, arXiv 2406.05322).",
            "random": "Prompts were drawn at random.",
            "oracle": "Prompts that the student was known to get wrong were asked about.",
        }[select]
    )
    if keep.rule != "all" or keep.agreement or keep.stand_in:
        told.append(
            "What the assistant said of the teacher's answers decided which were learnt, or how much each counted."
        )
    return "\n".join(told)


def method_text(config: TrainConfig) -> str:
    """What stage 2 minimises, in words."""
    method = config.method
    if not isinstance(method, Switch):
        return f"Stage 2 is {method.type}."
    gate = ", ".join(f"{key} {value}" for key, value in method.gate.model_dump().items() if key != "type")
    return (
        "Stage 2 is SWITCH (Koo et al. 2025, arXiv 2410.19503): the student writes, the teacher takes over where the "
        f"Jensen-Shannon divergence of both exceeds a threshold ({plain(method.gate.type)}: {gate}), and "
        f"{plain(method.divergence.name)} (alpha {method.divergence.alpha:g}) is minimised on what they wrote, mixed "
        f"with annotated rows (share of rollouts {method.on_policy_share:g})."
    )


def code(value: Any) -> str:
    return code_text(json.dumps(value, ensure_ascii=False))


def code_text(text: str) -> str:
    return text.replace("`", "\\u0060")
