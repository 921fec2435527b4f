"""One vLLM engine as a Ray actor: exact token ids in and out, columns instead of objects.

Every request names the weights it wants: an actor that Ray restarted comes back with its constructor's weights, and
loads the right ones on the first mismatch. Ray and vLLM are imported where they are used.
"""

import hashlib
import os
import uuid
from typing import Any, ClassVar

import pyarrow as pa
from pydantic import BaseModel, Field

from infra.models import ModelRef, local_folder
from infra.store import open_store

GIB = 1 << 30


# What ``Engine.generate`` returns, one row a conversation and seed.
ANSWERS = pa.schema(
    [
        ("conversation", pa.int32()),
        ("seed", pa.int64()),
        ("prompt_token_ids", pa.list_(pa.int32())),
        ("token_ids", pa.list_(pa.int32())),
        ("text", pa.string()),
        ("finish_reason", pa.string()),
        ("logprob", pa.float32()),
        ("token_logprobs", pa.list_(pa.float32())),
        ("best_ids", pa.list_(pa.int32())),
        ("best_logprobs", pa.list_(pa.float32())),
    ]
)


class EngineSpec(BaseModel):
    """Everything an engine is started with. Equal specs share engines: ``key`` names them in the run's namespace."""

    model: ModelRef
    root: str
    replicas: int = 1
    tensor_parallel: int = 1
    max_model_len: int = 1024
    dtype: str = "auto"
    kv_cache_gib: float = 0.5
    gpu_memory_share: float = 0.85
    max_num_seqs: int = 64
    threads: int = 0
    gpu: bool = False
    seed: int = 0
    max_logprobs: int = 20
    deadline_seconds: float = 1800
    vllm: dict[str, Any] = Field(default_factory=dict)
    trunk: bool = False  # hidden states in place of answers: infra/trunk.py

    @property
    def key(self) -> str:
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:12]

    def actor_name(self, replica: int) -> str:
        return f"engine-{self.key}-{replica}"

    @property
    def environment(self) -> dict[str, str]:
        """Of the actor's process. On CPU the engine core runs inside it: its own process takes 20 s more to start."""
        if self.gpu:
            return {"HF_HUB_DISABLE_TELEMETRY": "1", "VLLM_NO_USAGE_STATS": "1"}
        return cpu_environment(self.threads)


def cpu_environment(threads: int = 0) -> dict[str, str]:
    """Of a process that runs vLLM on a CPU with so many threads (0: all cores)."""
    return {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # Bound threads would pin every engine of a machine to the same cores as the trainer's.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(threads or os.cpu_count() or 1),
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }


class Engine:
    """The actor. Methods take and return plain Python and Arrow; lists run over requests."""

    # What a kind of engine tells vLLM beside its spec.
    OWN: ClassVar[dict[str, Any]] = {}

    def __init__(self, spec: dict[str, Any]) -> None:
        from vllm import LLM

        self.spec = EngineSpec.model_validate(spec)
        self.store = open_store(self.spec.root)
        self.revision = self.spec.model.revision
        folder = local_folder(self.store, self.spec.model)
        if self.spec.gpu:
            memory: dict[str, Any] = {"gpu_memory_utilization": self.spec.gpu_memory_share}
        else:
            memory = {"kv_cache_memory_bytes": int(self.spec.kv_cache_gib * GIB)}
        dtype = self.spec.dtype if self.spec.gpu or self.spec.dtype != "auto" else "float32"
        self.llm = LLM(
            model=str(folder),
            dtype=dtype,
            tensor_parallel_size=self.spec.tensor_parallel,
            max_model_len=self.spec.max_model_len,
            max_num_seqs=self.spec.max_num_seqs,
            # On CPU a generator has no offset to set back, as a split prompt of a seeded request needs.
            enable_chunked_prefill=self.spec.gpu,
            max_num_batched_tokens=max(self.spec.max_model_len, 4096),
            seed=self.spec.seed,
            max_logprobs=self.spec.max_logprobs,
            enforce_eager=not self.spec.gpu,
            disable_log_stats=True,
            **memory,
            **self.OWN,
            **self.spec.vllm,
        )
        self.tokenizer = self.llm.get_tokenizer()
        if self.spec.model.chat_template is not None:
            self.tokenizer.chat_template = self.spec.model.chat_template
        self.life = uuid.uuid4().hex

    def ready(self) -> str:
        """Names this life of the actor, which ends with its process; returns once the engine is up."""
        return self.life

    def load(self, model: ModelRef) -> None:
        """Serve these weights from now on. They must be of the engine's own architecture."""
        if model.revision == self.revision:
            return
        folder = local_folder(self.store, model)
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        if not self.spec.gpu:
            self.llm.apply_model(repack_tied_head)
        self.llm.reset_prefix_cache()
        self.revision = model.revision

    def _tokens(
        self, conversation: list[dict[str, str]], template_args: dict[str, Any], prefill: str = ""
    ) -> list[int]:
        text = self.tokenizer.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=True, **template_args
        )
        # The template writes the special tokens itself.
        return self.tokenizer.encode(text + prefill, add_special_tokens=False)

    def generate(
        self,
        model: dict[str, Any],
        conversations: list[list[dict[str, str]]],
        seeds: list[list[int]],
        *,
        temperature: float,
        top_p: float,
        max_tokens: int,
        logprobs: bool = False,
        best_tokens: int = 0,
        template_args: dict[str, Any] | None = None,
    ) -> pa.Table:
        """One response per conversation and seed, conversation-major. Columns: conversation (index), seed,
        prompt_token_ids, token_ids, text, finish_reason; and null unless asked: logprob and token_logprobs (nats, at
        temperature 1), and best_ids and best_logprobs, flat: so many likeliest tokens (at most ``max_logprobs``) of one
        position after the other."""
        from vllm import SamplingParams

        self.load(ModelRef.model_validate(model))
        asked = best_tokens or (0 if logprobs else None)
        prompts, parameters, index = [], [], []
        for number, (conversation, own_seeds) in enumerate(zip(conversations, seeds, strict=True)):
            token_ids = self._tokens(conversation, template_args or {})
            for seed in own_seeds:
                index.append((number, seed))
                prompts.append({"prompt_token_ids": token_ids})
                parameters.append(
                    SamplingParams(
                        temperature=temperature,
                        top_p=top_p,
                        max_tokens=max_tokens,
                        seed=seed % (1 << 31) if temperature > 0 else None,
                        logprobs=asked,
                        flat_logprobs=True,
                        detokenize=False,
                    )
                )
        outputs = self.llm.generate(prompts, parameters, use_tqdm=False)
        completions = [output.outputs[0] for output in outputs]
        written = [list(completion.token_ids) for completion in completions]
        return pa.table(
            {
                "conversation": [number for number, _ in index],
                "seed": [seed for _, seed in index],
                "prompt_token_ids": [prompt["prompt_token_ids"] for prompt in prompts],
                "token_ids": written,
                "text": self.tokenizer.batch_decode(written, skip_special_tokens=True),
                "finish_reason": [completion.finish_reason for completion in completions],
                "logprob": [c.cumulative_logprob if logprobs else None for c in completions],
                "token_logprobs": [chosen(c.logprobs) if logprobs else None for c in completions],
                "best_ids": [best(c.logprobs, c.logprobs.token_ids) if best_tokens else None for c in completions],
                "best_logprobs": [best(c.logprobs, c.logprobs.logprobs) if best_tokens else None for c in completions],
            },
            schema=ANSWERS,
        )

    def choice(
        self,
        model: dict[str, Any],
        questions: list[str],
        *,
        prefill: str,
        first: str,
        second: str,
        template_args: dict[str, Any] | None = None,
    ) -> list[float]:
        """P(first) / (P(first) + P(second)) of the token that follows each question and the prefilled start of the
        model's turn: p_true of Kadavath et al. (2022). A continuation is read by its first token."""
        from math import exp

        from vllm import SamplingParams

        self.load(ModelRef.model_validate(model))
        # Tokens depend on what stands before them: the continuation is what encoding both adds to encoding the prefill.
        start = len(self.tokenizer.encode(prefill, add_special_tokens=False))
        ids = [self.tokenizer.encode(prefill + word, add_special_tokens=False)[start:][:1] for word in (first, second)]
        if not all(ids) or ids[0] == ids[1]:
            raise ValueError(
                f"confidence: {first!r} and {second!r} begin with one token: choose words that differ at once"
            )
        (first_id,), (second_id,) = ids
        parameters = SamplingParams(
            temperature=0, max_tokens=1, logprob_token_ids=[first_id, second_id], detokenize=False
        )
        prompts = [
            {"prompt_token_ids": self._tokens([{"role": "user", "content": text}], template_args or {}, prefill)}
            for text in questions
        ]
        shares = []
        for output in self.llm.generate(prompts, parameters, use_tqdm=False):
            read = output.outputs[0].logprobs[0]
            shares.append(1 / (1 + exp(read[second_id].logprob - read[first_id].logprob)))
        return shares

    def mean_logprob(
        self,
        model: dict[str, Any],
        conversations: list[list[dict[str, str]]],
        texts: list[str],
        *,
        template_args: dict[str, Any] | None = None,
    ) -> tuple[list[float], list[int]]:
        """Mean log-probability (nats a token) of each text as the model's turn, its end token included, and its length
        in tokens. Texts are encoded with this model's own tokenizer; what exceeds the context is left out."""
        from vllm import SamplingParams

        self.load(ModelRef.model_validate(model))
        parameters = SamplingParams(
            temperature=0, max_tokens=1, prompt_logprobs=0, flat_logprobs=True, detokenize=False
        )
        prompts, starts = [], []
        for conversation, text in zip(conversations, texts, strict=True):
            asked = self._tokens(conversation, template_args or {})
            response = [*self.tokenizer.encode(text, add_special_tokens=False), self.tokenizer.eos_token_id]
            # One place is left for the token that vLLM insists on generating.
            prompts.append({"prompt_token_ids": [*asked, *response][: self.spec.max_model_len - 1]})
            starts.append(len(asked))
        means, counts = [], []
        for output, prompt, start in zip(
            self.llm.generate(prompts, parameters, use_tqdm=False), prompts, starts, strict=True
        ):
            response = prompt["prompt_token_ids"][start:]
            read = output.prompt_logprobs[start:]
            total = sum(entry[token].logprob for entry, token in zip(read, response, strict=True))
            means.append(total / max(1, len(response)))
            counts.append(len(response))
        return means, counts


def repack_tied_head(model: Any) -> None:
    """On CPU vLLM multiplies by a packed copy of the output projection, and reloading leaves the copy of a tied one as
    it was: hidden states of the new weights, logits of the old."""
    head = getattr(model, "lm_head", None)
    if head is not None:
        head.quant_method.process_weights_after_loading(head)


def chosen(read: Any) -> list[float]:
    """Log-probabilities of the tokens written, from vLLM's flat list: each position's first entry."""
    return [read.logprobs[start] for start in read.start_indices]


def best(read: Any, values: list[Any]) -> list[Any]:
    """Of ids or log-probabilities in vLLM's flat list, the best tokens: all but each position's first."""
    return [
        value
        for start, end in zip(read.start_indices, read.end_indices, strict=True)
        for value in values[start + 1 : end]
    ]
