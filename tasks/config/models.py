"""Where models come from, and the engines that serve them."""

from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from tasks.config.base import Config
from tasks.config.confidential import refuse_secrets


class HuggingFaceModel(Config):
    """A model folder, or an id on the Hugging Face hub."""

    type: Literal["huggingface"] = "huggingface"
    id: str = Field(min_length=1)
    """Hub id such as ``Qwen/Qwen3-8B``, or the path of a model folder, which every machine that works has to see."""
    revision: str | None = None
    """Commit, tag or branch on the hub; resolved to a commit before the run. Not for folders."""


class GgufModel(Config):
    """A GGUF file, converted once to safetensors and kept in the store."""

    type: Literal["gguf"] = "gguf"
    file: str = Field(min_length=1)
    """Path of the file; relative to the package where one is named."""
    package: str | None = None
    """An installed Python package that carries the file."""


class PrunedModel(Config):
    """Chosen layers of a larger model, with its embeddings and tokenizer."""

    type: Literal["prune"] = "prune"
    of: HuggingFaceModel | GgufModel = Field(discriminator="type")
    """The model that gives the layers."""
    layers: list[Annotated[int, Field(ge=0)]] = Field(min_length=1)
    """Indices of the layers that stay, ascending."""


class FreshModel(Config):
    """A new, randomly initialised decoder of a given shape with another model's tokenizer."""

    type: Literal["fresh"] = "fresh"
    tokenizer_of: HuggingFaceModel | GgufModel = Field(discriminator="type")
    """The model whose tokenizer, chat template and vocabulary size are taken over: the teacher's, as a rule."""
    hidden_size: int = Field(ge=32, le=16384)
    """Width. On CPU the serving engine wants a head size of 32, 64, 80, 96, 112, 128 or 256."""
    intermediate_size: int = Field(ge=32)
    """Width of the feed-forward layers."""
    layers: int = Field(ge=1, le=200)
    """Number of layers."""
    heads: int = Field(ge=1)
    """Attention heads; divides the width."""
    kv_heads: int | None = Field(default=None, ge=1)
    """Key-value heads; the attention heads where absent."""
    seed: int = 0
    """Seed of the initial weights."""


class Service(Config):
    """How an endpoint is asked. Nothing here changes what it answers."""

    requests_per_minute: float | None = Field(default=None, gt=0)
    """Most requests a minute; no limit where absent."""
    concurrency: int = Field(default=8, ge=1, le=1024)
    """Requests under way at once."""
    timeout_seconds: float = Field(default=120.0, gt=0)
    """Longest wait for an answer."""
    tries: int = Field(default=6, ge=1, le=20)
    """How often a request is sent before its prompt stays without an answer; with exponential backoff and jitter, or as
    long apart as the endpoint asks. Tries whose reply was lost count against ``budget.spending_factor``."""
    template_tokens: int = Field(default=16, ge=0)
    """Tokens the endpoint's chat template may add to a message: its tokenizer is not known here, and budgets are held
    at the worst case."""
    limit_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """Name of the request's length limit: servers differ."""


class OpenAIModel(Config):
    """A model behind an OpenAI-compatible endpoint. It writes text and shows no distributions, so it fits the methods
    ``sft`` and ``seqkd``; it is not asked but for annotations, within the budget."""

    type: Literal["openai"] = "openai"
    model: str = Field(min_length=1)
    """The endpoint's name of the model."""
    base_url: str = Field(pattern=r"^https?://[^\s@?#]+$")
    """Address up to and without ``/chat/completions``, such as https://api.openai.com/v1."""
    key_variable: str | None = Field(default=None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """Environment variable that holds the key, here and on the cluster's nodes; absent: no key. The key itself is never
    stored, passed on or logged."""
    send_seed: bool = True
    """Send each query's seed: endpoints that heed it write the same again."""
    extra: dict[str, Any] = Field(default_factory=dict)
    """Further fields of every request, as they are; none of those that say what is asked, or how much is written."""
    service: Service = Service()
    """How it is asked."""

    @model_validator(mode="after")
    def _no_key_in_the_clear(self) -> "OpenAIModel":
        refuse_secrets(self.extra, "extra")
        if given := sorted(self.extra.keys() & REQUEST_FIELDS):
            raise ValueError(
                f"extra: {given[0]} is set by the request itself, which the budget covers: use sampling.teacher"
            )
        host = urlsplit(self.base_url).hostname
        if self.key_variable and self.base_url.startswith("http://") and host not in ("127.0.0.1", "localhost", "::1"):
            raise ValueError(f"base_url {self.base_url} would carry the key unencrypted: use https, or no key_variable")
        return self


ModelSource = Annotated[
    HuggingFaceModel | GgufModel | PrunedModel | FreshModel,
    Field(discriminator="type"),
]


class PromotedModel(Config):
    """The student that is promoted when the run begins, under this run's name and root."""

    type: Literal["promoted"] = "promoted"
    first: ModelSource
    """The model to start from while none is promoted yet."""


StudentSource = Annotated[
    HuggingFaceModel | GgufModel | PrunedModel | FreshModel | PromotedModel,
    Field(discriminator="type"),
]
TeacherSource = Annotated[
    HuggingFaceModel | GgufModel | PrunedModel | FreshModel | OpenAIModel,
    Field(discriminator="type"),
]


class Models(Config):
    """The three models of a run."""

    teacher: TeacherSource
    """Expensive and imperfect: annotates, and intervenes during stage 2."""
    assistant: ModelSource
    """The teaching assistant (TA): scores what student and teacher wrote. May be the teacher."""
    student: StudentSource
    """The model that is trained."""
    chat_template: str | None = None
    """Jinja chat template for all three; the tokenizer's own where absent."""
    chat_template_args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the template, such as ``enable_thinking: false``."""


# Fields of a request that infra/endpoint.py gives itself, and others by which more would be billed than is expected.
REQUEST_FIELDS = {
    *("model", "messages", "temperature", "top_p", "seed", "max_tokens", "max_completion_tokens"),
    *("n", "best_of", "stream", "prompt_logprobs", "echo"),
}

# Arguments of ``vllm.LLM`` that infra/engine.py gives itself.
ENGINE_ARGUMENTS = {
    *("model", "dtype", "tensor_parallel_size", "max_model_len", "max_num_seqs", "max_num_batched_tokens"),
    *("enable_chunked_prefill", "seed", "max_logprobs", "enforce_eager", "disable_log_stats"),
    *("gpu_memory_utilization", "kv_cache_memory_bytes"),
}


class EngineConfig(Config):
    """How one model is served by vLLM."""

    replicas: int = Field(default=1, ge=1, le=512)
    """Engines of this model; shards are spread over them."""
    tensor_parallel: int = Field(default=1, ge=1, le=64)
    """GPUs an engine spreads one model over."""
    max_model_len: int = Field(default=1024, ge=32)
    """Longest prompt and answer together, tokens."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """``auto``: bfloat16 on GPUs, float32 on CPU (bfloat16 is several times slower on most CPUs)."""
    kv_cache_gib: float = Field(default=0.5, gt=0)
    """Key-value cache of an engine on CPU, GiB."""
    gpu_memory_share: float = Field(default=0.85, gt=0, lt=1)
    """Share of a GPU's memory an engine may take."""
    max_num_seqs: int = Field(default=64, ge=1, le=4096)
    """Sequences an engine works on at once."""
    threads: int = Field(default=0, ge=0)
    """CPU threads of an engine without a GPU; 0: all cores."""
    deadline_seconds: float = Field(default=1800, gt=0)
    """An engine that finishes no shard for so long, loading included, counts as hung and is started again."""
    vllm: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of ``vllm.LLM``, as they are."""

    @model_validator(mode="after")
    def _no_secrets(self) -> "EngineConfig":
        refuse_secrets(self.vllm, "vllm")
        if given := sorted(self.vllm.keys() & ENGINE_ARGUMENTS):
            raise ValueError(f"vllm: {given[0]} is set by the engine itself: use the settings beside it")
        return self


class Engines(Config):
    """Engines by role. Roles with the same model and settings share their engines."""

    teacher: EngineConfig = EngineConfig()
    """Serves the teacher."""
    assistant: EngineConfig = EngineConfig()
    """Serves the TA."""
    student: EngineConfig = EngineConfig()
    """Serves the student and its checkpoints."""
