"""A distillation from beginning to end. This file is the story; everything else says how.

    switchyard run configs/quickstart.yaml --root runs/quickstart

A stage is a function from manifests to a manifest: ``stage(name, module, settings, **inputs)`` returns the place of its
result, and does the work only where that result is not there yet.
"""

from typing import Any

from prefect import flow, get_run_logger
from prefect.states import Failed

from flows.approval import above, wait_for_approval
from flows.cycle import identities
from flows.ends import StageDamaged, end_of
from flows.mentor import mentor
from flows.runner import Runner, run_name
from flows.story import Pipeline, Planner
from flows.targets import auxiliary
from flows.teachers import annotate, last, together
from tasks.accounts import annotates
from tasks.config.preset import Settings
from tasks.config.run import OPERATIONAL
from tasks.promoted import Promotion


def prepare(pipeline: Pipeline, found: dict[str, Any]) -> tuple[str, str]:
    """Models and prompts, which everything else starts from. Of runs that follow each other each takes new prompts."""
    config, stage, after = pipeline.config, pipeline.stage, found["after"]
    plain = config.model_dump(mode="json", exclude=OPERATIONAL)
    further = {peer["name"]: peer["model"] for peer in plain["peers"]["teachers"]} if config.peers else {}
    further |= {"mentor": plain["mentor"]["model"]} if config.mentor else {}
    settings = {"models": plain["models"], "identities": found["models"], **({"further": further} if further else {})}
    models = stage("models", "tasks.models", settings)
    earlier = {f"earlier-{number}": path for number, path in enumerate(after["earlier"], 1)} if after else {}
    follows = config.recurring and {
        "earlier": list(earlier),
        "renewal": config.recurring.heldout_renewal,
        "least": config.recurring.min_prompts,
    }
    prompts = stage(
        "prompts",
        "tasks.prompts",
        {
            "prompts": plain["prompts"],
            "identities": found["sources"],
            "seed": config.seed,
            "warmup": config.warmup_prompts,
            "queries": config.warmup_prompts + config.selected_prompts,
            "candidates": config.candidates,
            "chat_template_args": config.models.chat_template_args,
            "after": follows,
            # The tokenizer that counts: an endpoint's is not known.
            "tokenizer_key": "student" if config.text_only else "teacher",
        },
        models=models,
        **earlier,
    )
    return models, prompts


def story(pipeline: Pipeline, found: dict[str, Any]) -> str:
    """All stages in order; returns the report's manifest. Planned and run by the same lines."""
    config, stage = pipeline.config, pipeline.stage
    plain = config.model_dump(mode="json")
    budget, shard_size = config.budget, config.sampling.shard_size
    template_args, compares = config.models.chat_template_args, config.train.method.compares
    shared = {"shard_size": shard_size, "template_args": template_args}
    rival: Promotion | None = found["promoted"]
    # A warm start: the student that learns is the promoted one, and so is what it is compared with.
    warm = {"promoted": rival.manifest} if rival and found["warm"] else {}

    def keep(name: str, table: str, prompts: str, samples: str, own: dict[str, str], charged: bool = True) -> str:
        """The TA scores the teachers' answers; a rule keeps or drops them. What nobody was charged for is a mentor's,
        which nobody reviews. ``own``: the student's answers that may stand in."""
        rule = {key: value for key, value in plain["signals"]["keep"].items() if own or key != "stand_in"}
        settings = {"table": table, "confidence": plain["signals"]["confidence"], "keep": rule}
        if config.peers and config.peers.review and charged:
            settings["peer_review"] = config.peers.review.threshold
        if not charged:
            settings["charges"] = False
            # All of a mentor's rows are trained on.
            settings |= {"drop_calibrating": True} if config.signals.keep.calibrate else {}
        if own or rule["answers"] == "majority":
            settings["same_text"] = config.signals.select.same_text
        if config.signals.keep.calibrate:
            settings |= {"validation_share": config.calibration_share, "seed": config.seed}
        return stage(name, "tasks.keep", {**settings, **shared}, models=models, prompts=prompts, samples=samples, **own)

    # Prepare: models that load anywhere; prompts that are whole, new and apart from the held-out ones.
    models, prompts = prepare(pipeline, found)

    # Warm up: a small share of the budget on random prompts makes a student whose signals mean something. In a run of
    # one stage it stays as it comes.
    share, at_warmup = budget.warmup_share, {"table": "warmup", **shared}
    nothing: dict[str, str] = {}
    warmup_samples, warmup_review, warmup_kept, targets, warmed = nothing, nothing, nothing, nothing, nothing
    student, weights = warm, "promoted" if warm else None
    if config.warms_up:
        warmup_samples = annotate(pipeline, "warmup-annotate", (0.0, share), {}, at_warmup, models, prompts)
        warmup_answers = together(pipeline, "warmup-review", warmup_samples, at_warmup, models, prompts)
        warmup_review = {"warmup_review": warmup_answers} if config.peers else {}
        warmup_kept = {"warmup_keep": keep("warmup-keep", "warmup", prompts, warmup_answers, {})}
        targets = auxiliary(pipeline, "warmup-auxiliary", share, last(warmup_samples), at_warmup, models, prompts)
        trained = stage(
            "warmup-train",
            "tasks.train",
            {
                "train": plain["warmup"],
                "seed": config.seed,
                "student_input": weights or "models",
                "rows": ["warmup-keep"],
                "stage_name": "warmup",
                **({"auxiliary": list(targets)} if targets else {}),
            },
            models=models,
            **warmup_kept,
            **student,
            **targets,
        )
        warmed = {"warmup_train": trained}
        student, weights = warmed, "warmup-train"

    # Signals: where the student contradicts itself, and where the TA doubts it, the teacher is worth asking.
    student_samples = stage(
        "student-sample",
        "tasks.sample",
        {
            "role": "student",
            "engine": "student",
            "weights": weights,
            "table": "candidates",
            "sampling": plain["sampling"]["student"],
            "logprobs": compares,
            "seed": config.seed,
            **shared,
        },
        models=models,
        prompts=prompts,
        **student,
    )
    selected = stage(
        "select",
        "tasks.select",
        {
            "select": plain["signals"]["select"],
            "confidence": plain["signals"]["confidence"],
            "queries": config.selected_prompts,
            "seed": config.seed,
            **shared,
        },
        models=models,
        prompts=prompts,
        samples=student_samples,
    )

    # Annotate: the rest of the budget, on the selected prompts.
    charged, at_selected = last(targets or warmup_samples), {"table": "selected", **shared}
    samples = annotate(pipeline, "annotate", (share, 1.0), charged, at_selected, models, selected)
    answers = together(pipeline, "review", samples, at_selected, models, selected)
    own = {"select": selected, "student_sample": student_samples} if config.signals.keep.stand_in else {}
    kept = keep("keep", "selected", selected, answers, own)
    targets = targets | auxiliary(pipeline, "auxiliary", 1.0, last(samples), at_selected, models, selected)

    # Mentor: a model between both learns what was kept, and annotates prompts that the teacher was not asked about.
    mentored = {}
    if config.mentor:
        rows = {**warmup_kept, "keep": kept}
        mentored = mentor(pipeline, rows, shared, models=models, prompts=prompts, select=selected)
        mentored["mentor_keep"] = keep(
            "mentor-keep", "candidates", prompts, mentored["mentor_annotate"], {}, charged=False
        )

    learnt = ["warmup-keep", "keep"] if config.warms_up else ["keep"]

    # Replay: rows that earlier runs kept, so that the student does not forget them.
    replayed = {}
    if config.recurring and found["after"]["kept"] and config.recurring.replay_share:
        earlier = {f"earlier-{number}": path for number, path in enumerate(found["after"]["kept"], 1)}
        settings = {
            "share": config.recurring.replay_share,
            "draw": found["after"]["number"],
            "seed": config.seed,
            "earlier": list(earlier),
            "rows": learnt,
            "stored": plain["train"]["method"].get("annotated") == "stored",
        }
        inputs = {"models": models, **warmup_kept, "keep": kept, **earlier}
        replayed = {"replay": stage("replay", "tasks.replay", settings, **inputs)}

    # Train: SWITCH on the student's own sequences, mixed with everything kept.
    final = stage(
        "train",
        "tasks.train",
        {
            "train": plain["train"],
            "seed": config.seed,
            "student_input": weights or "models",
            "samples": {"teacher": "annotate", "student": "student-sample"} if compares else {},
            "rows": [*learnt, *replayed],
            "stage_name": "train",
            "online_teacher_tokens": budget.online_teacher_tokens,
            **({"soft_rows": "mentor-keep", "soft_share": config.mentor.soft_share} if config.mentor else {}),
            **({"auxiliary": list(targets)} if targets else {}),
        },
        models=models,
        **student,
        **warmup_kept,
        keep=kept,
        **replayed,
        **targets,
        **({"mentor_keep": mentored["mentor_keep"]} if mentored else {}),
        **({"annotate": samples["annotate"], "student_sample": student_samples} if compares else {}),
    )

    # Evaluate: base and teacher once and for all; warmed-up and final student with every change. The promoted student
    # too, on the same rows: a new one has to beat it. An endpoint is asked for annotations only: nothing but the
    # budget's ledger lets requests out.
    entries = [{"label": "warmup", "engine": "student", "weights": "warmup-train"}] if config.warms_up else []
    entries.append({"label": "final", "engine": "student", "weights": "train"})
    base = {"label": "base", "engine": "student", **({"weights": "promoted"} if warm else {})}
    if rival and not warm:
        entries.append({"label": "promoted", "engine": "student", "weights": "promoted"})
    measure = {"evaluate": plain["evaluate"], "seed": config.seed, **shared}
    before = stage(
        "evaluate-before",
        "tasks.evaluate",
        {**measure, "entries": [base] if config.text_only else [{"label": "teacher", "engine": "teacher"}, base]},
        models=models,
        prompts=prompts,
        **warm,
    )
    after = stage(
        "evaluate-after",
        "tasks.evaluate",
        {
            **measure,
            "entries": entries,
            "references": "evaluate-before",
        },
        models=models,
        prompts=prompts,
        evaluate_before=before,
        **warmed,
        train=final,
        **({"promoted": rival.manifest} if rival and not warm else {}),
    )

    # Report and promote.
    return stage(
        "report",
        "tasks.report",
        {
            "name": config.name,
            "seed": config.seed,
            "config": config.model_dump(mode="json", exclude=OPERATIONAL),
            "evaluate": plain["evaluate"],
            "promote": plain["promote"],
            "rival": rival and {"label": "base" if warm else "promoted", "fingerprint": rival.fingerprint},
            "budget": plain["budget"],
        },
        models=models,
        prompts=prompts,
        **warmup_samples,
        **warmup_kept,
        **warmed,
        student_sample=student_samples,
        select=selected,
        **samples,
        keep=kept,
        train=final,
        evaluate_before=before,
        evaluate_after=after,
        **replayed,
        **({**warmup_review, "review": answers} if config.peers else {}),
        **mentored,
        **targets,
    )


def approve(runner: Runner, found: dict[str, Any], approved: bool) -> None:
    """See that somebody agrees to what the run will spend, where it is more than the settings leave to it."""
    budget, record = runner.config.budget, runner.record
    planner = Planner(runner.config, runner.store.uri, runner.run, runner.redo)
    story(planner, found)
    asks = any(not runner.store.exists(spec.manifest_path) for spec in planner.specs if annotates(spec.stage))
    if asks and not record.approved and (what := above(budget)):
        if not approved:
            wait_for_approval(what, budget)
        record.approved = True
        record.save(runner.store)


def tell(runner: Runner, found: dict[str, Any]) -> None:
    """Follow the story; where a part turns out to be damaged, once more, which makes it anew."""
    try:
        story(runner, found)
    except StageDamaged as damaged:
        get_run_logger().warning("%s", damaged)
        runner.record.stages.clear()
        story(runner, found)


@flow(name="distill", flow_run_name=run_name, log_prints=False, validate_parameters=False)
def distill(config: Settings, root: str = "runs/default", redo_from: str | None = None, approved: bool = False) -> Any:
    """Distil the teacher into the student: prompts in, a promoted student and its report out. ``approved``: what
    budget.approve_above would ask for is agreed to."""
    # The plan follows this story, so it knows this file.
    from flows.prelude import planned

    try:
        settings = planned(config, root, redo_from)
        if settings.recurring:
            return Failed(message="recurring: this flow runs once: use distill-recurring, or leave the section out")
        with Runner.open(settings, root, redo_from) as runner:
            found = {**identities(settings, {}), "promoted": runner.record.promoted}
            approve(runner, found, approved)
            tell(runner, found)
            return runner.outcome()
    except Exception as error:
        return end_of(error)
