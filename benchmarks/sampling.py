"""The sample stage against a bare ``vllm.LLM.generate``, and where the time of a whole run goes.

    python -m benchmarks.sampling --json
    python -m benchmarks.sampling --set train.steps=8 --folder FOLDER      a smaller run, kept, and used again

A quickstart run (or that of other settings) goes through once, its time noted by part (``benchmarks/parts.py``). Then
its student answers the candidates again, in turn as the stage does it and as vLLM alone: the stage reads prompts,
cuts shards, asks the run's kind of engine in its actor, and commits samples; the bare side hands the same token ids and
the same sampling parameters to one ``LLM.generate`` of an engine with the same settings. Both engines are warm; medians
of the rounds. Imports and loading are no part of it: they stand under ``start-up`` among the run's parts.
"""

import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.conditions import conditions, options, publish
from benchmarks.parts import spans, summary, traced_run
from infra.engine import GIB, cpu_environment
from infra.manifest import commit_manifest
from infra.models import local_folder
from tasks.sample import SampleSettings, run, sample_seed, slices
from tasks.stage import Stage, StageSpec

CONFIG = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
STAGE = "student-sample"


class Speed(NamedTuple):
    """Of one round, a second."""

    rows: float
    tokens: float


class Bare:
    """vLLM with the stage's weights, engine settings and requests."""

    def __init__(self, stage: Stage[SampleSettings]) -> None:
        from vllm import LLM, SamplingParams

        from tasks.engines import model_of

        settings, sampling = stage.settings, stage.settings.sampling
        engine = stage.spec.runtime.engines[settings.engine]
        model = model_of(stage, settings.weights or "models", "student")
        self.llm = LLM(
            model=str(local_folder(stage.store, model)),
            dtype="float32",
            max_model_len=engine["max_model_len"],
            max_num_seqs=engine["max_num_seqs"],
            max_num_batched_tokens=max(engine["max_model_len"], 4096),
            kv_cache_memory_bytes=int(engine["kv_cache_gib"] * GIB),
            enable_chunked_prefill=False,
            enforce_eager=True,
            disable_log_stats=True,
        )
        tokenizer = self.llm.get_tokenizer()
        self.prompts: list[Any] = []
        self.parameters = []
        for _, rows in slices(stage, "prompts", settings.table, settings.shard_size, settings.limit):
            for row in rows.to_pylist():
                text = tokenizer.apply_chat_template(row["messages"], tokenize=False, add_generation_prompt=True)
                token_ids = tokenizer.encode(text, add_special_tokens=False)
                for index in range(sampling.samples):
                    seed = sample_seed(settings.seed, settings.role, row["prompt_id"], index)
                    self.prompts.append({"prompt_token_ids": token_ids})
                    self.parameters.append(
                        SamplingParams(
                            temperature=sampling.temperature,
                            top_p=sampling.top_p,
                            max_tokens=sampling.max_tokens,
                            seed=seed % (1 << 31),
                            logprobs=0 if settings.logprobs else None,
                            flat_logprobs=True,
                            detokenize=False,
                        )
                    )

    def speed(self) -> Speed:
        began = time.perf_counter()
        outputs = self.llm.generate(self.prompts, self.parameters, use_tqdm=False)
        seconds = time.perf_counter() - began
        return Speed(len(outputs) / seconds, sum(len(output.outputs[0].token_ids) for output in outputs) / seconds)


def stage_of(root: Path, number: int) -> Stage[SampleSettings]:
    """The run's stage, to be done again under another number."""
    (path,) = root.glob(f"stages/{STAGE}/*/spec.json")
    spec = StageSpec.model_validate_json(path.read_text())
    runtime = spec.runtime.model_copy(update={"namespace": None})
    again = spec.model_copy(update={"redo": number, "root": str(root), "runtime": runtime})
    return Stage(again, SampleSettings.model_validate(spec.settings))


def ours(root: Path, number: int) -> Speed:
    """The whole stage, from its first read to its manifest."""
    stage = stage_of(root, number)
    began = time.perf_counter()
    run(stage)
    commit_manifest(stage.store, stage.manifest)
    seconds = time.perf_counter() - began
    rows = stage.manifest.tables["samples"].rows
    return Speed(rows / seconds, stage.facts["completion_tokens"] / seconds)


def throughput(run_root: Path, rounds: int) -> dict[str, Any]:
    """Both sides in turn, after a round that warms up."""
    import ray

    from infra.engine_room import open_room

    # Stages that are done again stand beside a copy of the run, not in it.
    with tempfile.TemporaryDirectory(prefix="sampling-", dir=run_root.parent) as folder:
        root = Path(folder) / "root"
        shutil.copytree(run_root, root, copy_function=os.link, ignore=shutil.ignore_patterns(".prefect", "checkpoints"))
        ray.init(address="local", num_cpus=os.cpu_count(), include_dashboard=False, log_to_driver=False)
        try:
            room = open_room()
            bare = Bare(stage_of(root, 0))
            found: dict[str, list[Speed]] = {"ours": [], "bare": []}
            for number in range(rounds + 1):
                pair = {"ours": ours(root, 1000 + number), "bare": bare.speed()}
                if number:
                    for side, speed in pair.items():
                        found[side].append(speed)
            del room
        finally:
            ray.shutdown()
    middle = {side: statistics.median(speed.tokens for speed in speeds) for side, speeds in found.items()}
    return {
        "throughput_ratio": round(middle["ours"] / middle["bare"], 3),
        "rows": len(bare.prompts),
        **{
            f"{unit}_per_second": {side: [round(getattr(speed, unit), 1) for speed in found[side]] for side in found}
            for unit in Speed._fields
        },
    }


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the run is kept; one that is there is not run again")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="a setting of the run")
    arguments = parser.parse_args()
    # Before torch is imported anywhere in this process.
    os.environ.update(cpu_environment())
    folder = (arguments.folder or Path(tempfile.mkdtemp(prefix="switchyard-sampling-", dir="."))).absolute()
    root, trace = folder / "root", folder / "trace"
    try:
        done = (trace / "run.json").exists()
        found = spans(root, trace) if done else traced_run(CONFIG, root, trace, arguments.set)
        result = {"settings": arguments.set, **summary(found), **throughput(root, arguments.rounds)}
    finally:
        if not arguments.folder:
            shutil.rmtree(folder, ignore_errors=True)
    result = {"conditions": conditions(), "rounds": arguments.rounds, **result}
    print(f"the sample stage has {result['throughput_ratio']} of bare vLLM's tokens per second")
    print(f"{100 * result['overhead_share']:.1f} % of {result['seconds']} s outside engines, training and start-up:")
    for part, seconds in result["parts"].items():
        print(f"  {part}: {seconds} s")
    print("start-up: " + ", ".join(f"{kind} {seconds} s" for kind, seconds in result["start_up"].items()))
    publish("sampling", result, arguments)


if __name__ == "__main__":
    main()
