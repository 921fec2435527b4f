"""What can be known to go wrong with models before they are loaded: their files, templates, vocabularies, caches."""

from typing import Any

from flows.estimate import GIB
from flows.story import on_gpu
from tasks.config import RunConfig
from tasks.config.models import (
    FreshModel,
    GgufModel,
    HuggingFaceModel,
    OpenAIModel,
    PromotedModel,
    PrunedModel,
    StudentSource,
)
from tasks.model_files import check_weights, model_files
from tasks.models import gguf_path


def origin(source: StudentSource) -> HuggingFaceModel | GgufModel:
    """Where a model's tokenizer and vocabulary come from."""
    if isinstance(source, PromotedModel):
        return origin(source.first)
    if isinstance(source, HuggingFaceModel | GgufModel):
        return source
    return source.of if isinstance(source, PrunedModel) else source.tokenizer_of


def whole(source: StudentSource | OpenAIModel) -> None:
    """ValueError where the files of a model on this machine are damaged or cut off."""
    if not isinstance(source, OpenAIModel):
        check_weights(origin(source))


def templates(config: RunConfig) -> list[str]:
    """Every tokenizer that prompts go through has a chat template."""
    if config.models.chat_template:
        return []
    return [
        f"{model.field}: its tokenizer has no chat template: set models.chat_template"
        for model in config.served.values()
        if not isinstance(model.source, OpenAIModel) and not model_files(origin(model.source)).has_template
    ]


def cached_values(source: StudentSource | OpenAIModel) -> int | None:
    """Numbers that a token takes in the model's key-value cache; None where that is not known."""
    if isinstance(source, PromotedModel):
        return cached_values(source.first)
    if isinstance(source, OpenAIModel):
        return None
    if isinstance(source, FreshModel):
        return 2 * source.layers * (source.kv_heads or source.heads) * (source.hidden_size // source.heads)
    files = model_files(origin(source))
    layers = len(source.layers) if isinstance(source, PrunedModel) else files.layers
    return None if files.cache_values is None else layers * files.cache_values


def cache(config: RunConfig) -> list[str]:
    """On CPU, where its size is a setting, an engine's key-value cache holds one sequence of the greatest length."""
    found = []
    for model in config.served.values() if not on_gpu(config) else ():
        engine, values = model.engine, cached_values(model.source)
        if values is None:
            continue
        token_bytes = values * (4 if engine.dtype in ("auto", "float32") else 2)
        needed = engine.max_model_len * token_bytes / GIB
        if engine.kv_cache_gib < needed:
            tokens = int(engine.kv_cache_gib * GIB / token_bytes)
            found.append(
                f"{model.engine_field}.kv_cache_gib: {engine.kv_cache_gib:g} hold {tokens:,} tokens, one sequence of "
                f"max_model_len {engine.max_model_len} takes {needed:.2g} GiB: raise it, or lower max_model_len"
            )
    return found


def text_only(config: RunConfig) -> list[str]:
    """What an endpoint cannot do: it shows no distributions, and is asked for annotations only."""
    found = [
        f"{name}.method: {settings.method.type} compares distributions, which models.teacher (openai) does not show: "
        "use sft or seqkd, or a teacher that runs here"
        for name, settings in config.trainings.items()
        if settings.method.compares
    ]
    if config.sampling.distributions:
        found.append("sampling.distributions: models.teacher (openai) shows none: leave it out")
    if config.evaluate.reference == "teacher":
        found.append("evaluate.reference: teacher would ask models.teacher (openai) outside the budget: set source")
    return found


def distributions(config: RunConfig) -> list[str]:
    """For methods that compare distributions: one token map, one width of logits, one end of sequence."""
    assert not isinstance(config.models.teacher, OpenAIModel)
    teacher, student = origin(config.models.teacher), origin(config.models.student)
    comparing = [settings.method.type for settings in config.trainings.values() if settings.method.compares]
    if not comparing or teacher == student:
        return []
    try:
        ours, theirs = vocabulary(student), vocabulary(teacher)
    except (ValueError, OSError) as error:
        said = " ".join(str(error).split())[:300]
        return [f"models: the tokenizers of teacher and student cannot be compared ({said}): give whole models"]
    found = []
    method = comparing[-1]
    if ours["tokens"] != theirs["tokens"]:
        found.append(
            f"models.student: its tokenizer differs from the teacher's, and train.method {method} compares "
            "distributions: take a student of the teacher's family, or train.method sft"
        )
    elif ours["width"] != theirs["width"]:
        found.append(
            f"models.student: its logits are {ours['width']} wide, the teacher's {theirs['width']} (padded): "
            "resize one model's embeddings to the other's, or use train.method sft"
        )
    elif ours["end"] != theirs["end"]:
        found.append(
            f"models.student: it ends with token {ours['end']}, the teacher with {theirs['end']}: set eos_token_id in "
            "its generation_config.json"
        )
    return found


def family(config: RunConfig) -> list[str]:
    """Further teachers that run here, and a mentor, write the student's tokens: its rows are theirs."""
    student, found = origin(config.models.student), []
    for model in list(config.served.values())[3:]:
        if isinstance(model.source, OpenAIModel) or origin(model.source) == student:
            continue
        try:
            ours, theirs = vocabulary(student), vocabulary(origin(model.source))
        except (ValueError, OSError) as error:
            found.append(f"{model.field}: its tokenizer cannot be read ({' '.join(str(error).split())[:300]})")
            continue
        if (ours["tokens"], ours["end"]) != (theirs["tokens"], theirs["end"]):
            mentor = model.field == "mentor.model"
            fix = "take one of its family" if mentor else "serve it behind an endpoint, as type openai"
            found.append(f"{model.field}: its tokens, or how it ends, differ from the student's: {fix}")
    return found


def vocabulary(source: HuggingFaceModel | GgufModel) -> dict[str, Any]:
    """Token map, width of the logits, and end-of-sequence ids, without loading weights."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    if isinstance(source, GgufModel):
        path = gguf_path(source)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
        end = config.eos_token_id
    else:
        place: dict[str, Any] = {"revision": source.revision, "trust_remote_code": False}
        tokenizer = AutoTokenizer.from_pretrained(source.id, **place)
        config = AutoConfig.from_pretrained(source.id, **place).get_text_config()
        try:
            end = GenerationConfig.from_pretrained(source.id, revision=source.revision).eos_token_id
        except OSError:
            end = config.eos_token_id
    return {"tokens": tokenizer.get_vocab(), "width": config.vocab_size, "end": end}
