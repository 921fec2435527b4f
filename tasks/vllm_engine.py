"""SWITCH decoding inside vLLM: the engine, and what is changed in it.

vLLM's draft-model speculative decoding has SWITCH's shape: the student drafts γ tokens, the teacher scores them in one
forward. Two of its private hooks are replaced: how a draft token is drawn, and which tokens of a block stand; both ask
the rules that all decoders share. A block emits at most γ tokens and no bonus token, as the student has no distribution
there. The prompt is sent without its last token, which is forced as the first one "generated": so the student drafts
from response position 0.

``tasks/vllm_decode.py`` decides whether this engine may be used. vLLM is imported where it is used.

Shapes: N sequences, B rows of a step, G positions of a block, V vocabulary, D the teacher's width, H the student's.
"""

from typing import Any

import torch
from torch import Tensor

from infra.engine import GIB, repack_tied_head
from kernels.rollout import Forwards, Record, Rollout
from kernels.rules import Rules


class SwitchWorker:
    """What vLLM's worker is extended with. `begin` and `finish` enclose a rollout."""

    model_runner: Any
    _head: Tensor  # what the teacher's projection was last given
    _seq_B: Tensor  # whose rows drafted last
    _drafted: list[Tensor]  # with these log-probabilities [B, V], by position

    def switch_install(self) -> None:
        """Replace the hooks, once."""
        runner = self.model_runner
        project = runner.model.compute_logits

        def remember(hidden_ND: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            self._head = hidden_ND
            return project(hidden_ND, *args, **kwargs)

        runner.model.compute_logits = remember
        runner._sample, runner.drafter._sample_draft_tokens = self._settle, self._draft

    def switch_begin(self, rules: Rules, last: list[int], keep_hidden: bool) -> None:
        self._rules, self._last, self._keep_hidden = rules, last, keep_hidden
        self._record = Record(rules.limits_N, rules.dtype)
        self._written_N = torch.full_like(rules.limits_N, -1)  # tokens so far; -1: the prompt is not read yet
        self._student, self._teacher = Forwards(), Forwards()

    def switch_finish(self) -> Rollout:
        return self._record.finish(self._written_N.tolist(), self._student, self._teacher)

    def switch_load(self, weights: dict[str, Tensor]) -> None:
        """The drafter's weights, by transformers' names."""
        from vllm.model_executor.model_loader.reload.layerwise import (
            finalize_layerwise_reload,
            initialize_layerwise_reload,
        )

        drafter = self.model_runner.drafter
        initialize_layerwise_reload(drafter.model)
        drafter.model.load_weights(weights.items())
        finalize_layerwise_reload(drafter.model, drafter.draft_model_config)
        repack_tied_head(drafter.model)

    def _sequences(self) -> list[int]:
        """Which sequence each row of vLLM's batch is."""
        runner = self.model_runner
        return [runner.requests[name].sampling_params.extra_args["sequence"] for name in runner.input_batch.req_ids]

    def _draft(self, hidden_BH: Tensor, _: Any) -> tuple[Tensor, None]:
        """One more draft token of each row [B]."""
        rules, seq_B = self._rules, self._seq_B
        logprobs_BV = rules.logprobs(self.model_runner.drafter.model.compute_logits(hidden_BH))
        t_B = self._written_N[seq_B] + len(self._drafted)
        self._drafted.append(logprobs_BV)
        self._student.ran(t_B.tolist(), 1, rules.limits_N[seq_B].tolist())
        return rules.draw("student", logprobs_BV, rules.noise("student", seq_B, t_B, logprobs_BV.shape[1])), None

    def _settle(self, logits_NV: Tensor, metadata: Any) -> Any:
        """What each row emits: the tokens of its block that stand, or the forced one behind a prompt [B, G + 1]."""
        from vllm.v1.outputs import SamplerOutput

        width, seq, counts = self.model_runner.num_spec_tokens, self._sequences(), metadata.num_draft_tokens
        emitted_BG = torch.full((len(seq), width + 1), -1, dtype=torch.int32)
        for row, sequence in enumerate(seq):
            # A row that lost its place, or drafts less, would need a distribution that nobody has computed.
            assert counts[row] == (width if self._written_N[sequence] >= 0 else 0), "vLLM scheduled another block"
            if not counts[row]:
                emitted_BG[row, 0], self._written_N[sequence] = self._last[sequence], 0
        if any(counts):
            rows = [row for row, count in enumerate(counts) if count]
            where = metadata.target_logits_indices
            drafted_BG = metadata.draft_token_ids.long().unflatten(0, (len(rows), width))
            logits_BGV = logits_NV[where].unflatten(0, (len(rows), width))
            hidden_BGD = self._head[where].unflatten(0, (len(rows), width))
            seated_B = torch.tensor([seq[row] for row in rows])
            first, limits = self._written_N[seated_B].tolist(), self._rules.limits_N[seated_B].tolist()
            self._teacher.ran(first, width, limits)
            emitted_BG[rows, :width] = self._stand([seq[row] for row in rows], drafted_BG, logits_BGV, hidden_BGD)
        self._seq_B, self._drafted = torch.tensor(seq), []
        return SamplerOutput(sampled_token_ids=emitted_BG, logprobs_tensors=None)

    @torch.inference_mode(False)  # what the rollout keeps takes part in a loss
    def _stand(self, seq: list[int], drafted_BG: Tensor, logits_BGV: Tensor, hidden_BGD: Tensor) -> Tensor:
        """The tokens of these rows' blocks up to the first that is not the draft or ends its row; -1 behind [B, G]."""
        rules, record, seq_B = self._rules, self._record, torch.tensor(seq)
        # Rows may have changed places since they drafted.
        at_B = torch.tensor([self._seq_B.tolist().index(sequence) for sequence in seq])
        written_B, live_B = self._written_N[seq_B], torch.ones(len(seq), dtype=torch.bool)
        emitted = []
        for j, draft_B in enumerate(drafted_BG.unbind(1)):
            t_B, p_BV, q_BV = written_B + j, rules.logprobs(logits_BGV[:, j]), self._drafted[j][at_B]
            teacher_B = rules.draw("teacher", p_BV, rules.noise("teacher", seq_B, t_B, p_BV.shape[1]))
            token_B = rules.settle(record, seq_B, t_B, p_BV, q_BV, teacher_B, draft_B)
            record.keep_cut(seq_B, t_B, token_B != draft_B)
            if self._keep_hidden:
                record.keep_hidden(seq_B, t_B, hidden_BGD[:, j])
            emitted.append(torch.where(live_B, token_B, -1))
            self._written_N[seq_B] += live_B
            live_B &= (token_B == draft_B) & ~rules.ends(token_B, seq_B, t_B)
        return torch.stack(emitted, 1).int()


def room(length: int, block: int) -> int:
    """Positions that vLLM asks for a row: behind its last token, it may score one block and draft another."""
    return length + 2 * block + 2


class SwitchEngine:
    """A vLLM engine of teacher and student, in this process or as a Ray actor."""

    def __init__(self, teacher: str, student: str, block: int, max_length: int) -> None:
        from vllm import LLM

        self.block = block
        self.llm = LLM(
            model=teacher,
            speculative_config={"method": "draft_model", "model": student, "num_speculative_tokens": block},
            worker_extension_cls=f"{SwitchWorker.__module__}.{SwitchWorker.__name__}",
            skip_tokenizer_init=True,
            dtype="float32",
            max_model_len=max_length,
            max_num_batched_tokens=max_length,
            # A row takes a block, the token before it and a place to draft behind it.
            max_num_seqs=max_length // (block + 2),
            kv_cache_memory_bytes=GIB,
            # What a prompt left in the cache is of no use to the next student.
            enable_prefix_caching=False,
            enable_chunked_prefill=False,
            async_scheduling=False,
            enforce_eager=True,
            disable_log_stats=True,
        )
        self.llm.collective_rpc("switch_install")

    def ready(self) -> None:
        """Returns once the engine is up."""

    def decode(self, prompts: list[list[int]], rules: Rules, keep_hidden: bool) -> Rollout:
        """Continue the prompts, of at least two tokens each, the last no end token."""
        from vllm import SamplingParams

        cache, limits = self.llm.llm_engine.vllm_config.cache_config, rules.limits_N.tolist()
        # All rows at work must fit into the cache: a row that loses its place cannot come back.
        pages = -(-room(max(map(len, prompts)) + max(limits), self.block) // cache.block_size)
        together = max(1, (cache.num_gpu_blocks - 1) // pages)
        self.llm.collective_rpc("switch_begin", args=(rules, [prompt[-1] for prompt in prompts], keep_hidden))
        requests = [
            (
                {"prompt_token_ids": prompt[:-1]},
                SamplingParams(
                    max_tokens=limit + 1,
                    stop_token_ids=rules.eos_E.tolist(),
                    detokenize=False,
                    extra_args={"sequence": sequence},
                ),
            )
            for sequence, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))
        ]
        for start in range(0, len(requests), together):
            texts, parameters = zip(*requests[start : start + together], strict=True)
            self.llm.generate(list(texts), list(parameters), use_tqdm=False)
        return self.llm.collective_rpc("switch_finish")[0]

    def load(self, weights: dict[str, Tensor]) -> None:
        """Let the student have these weights from now on."""
        self.llm.collective_rpc("switch_load", args=(weights,))
