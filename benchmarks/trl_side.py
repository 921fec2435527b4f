"""TRL's side of a comparison. Runs in TRL's own environment: nothing of this project but the meter beside it.

python trl_side.py loss|same|step        (the first line of its input: options as JSON)

Every further line of its input is a turn: a loss, or a training step. Each is answered by a line, one JSON object.
"""

import contextlib
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from meter import Peak


def trainer_class() -> Any:
    try:
        from trl.experimental.gkd import GKDTrainer
    except ImportError:
        from trl import GKDTrainer
    return GKDTrainer


def await_turn() -> None:
    if not sys.stdin.readline():
        sys.exit()


def answer(**figures: float) -> None:
    versions = {name: version(name) for name in ("trl", "torch", "transformers")}
    print(json.dumps({**figures, "versions": versions}), flush=True)


def loss(tokens: int, vocabulary: int, width: int) -> None:
    """GKD's loss, forward and backward from hidden states; the inputs are those of ``benchmarks/divergence.py``."""
    objective = trainer_class().generalized_jsd_loss
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(tokens, width, generator=generator).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator).div_(width**0.5).requires_grad_()
    teacher = hidden.detach() + 0.3 * torch.randn(tokens, width, generator=generator)
    labels = torch.zeros(1, tokens, dtype=torch.int64)
    await_turn()
    with Peak() as peak:
        began = time.perf_counter()
        with torch.no_grad():
            teacher_logits = teacher @ weight.T
        value = objective((hidden @ weight.T)[None], teacher_logits[None], labels=labels, beta=0.5)
        value.backward()
        seconds = time.perf_counter() - began
    answer(seconds=seconds, extra_bytes=peak.extra, loss=value.item())


def same(teacher: list[Any], student: list[Any], kept: list[int], betas: list[float]) -> None:
    """GKD's loss by beta, and MiniLLM's single-step loss and undiscounted returns, of given logits [T][V] at the
    positions that are kept; ``kept`` holds -100 at the others. Returns are of the log-probabilities of token 0."""
    from types import SimpleNamespace

    teacher_TV, student_TV, kept_T = torch.tensor(teacher), torch.tensor(student), torch.tensor(kept)
    objective = trainer_class().generalized_jsd_loss
    await_turn()
    figures = {
        f"gkd {beta}": objective(student_TV[None], teacher_TV[None], labels=kept_T[None], beta=beta).item()
        for beta in betas
    }
    # Later releases have no MiniLLM.
    with contextlib.suppress(ImportError):
        from trl.experimental.minillm import MiniLLMTrainer as Peer

        log_p_TV, log_q_TV = teacher_TV.log_softmax(-1), student_TV.log_softmax(-1)
        single = Peer._single_step_decomposition_loss(None, log_q_TV[None], log_p_TV[None], kept_T[None] != -100)
        plain = SimpleNamespace(gamma=1.0, length_normalization=True)
        returns = Peer._compute_advantage(plain, log_q_TV[None, :, 0], log_p_TV[None, :, 0])[0].tolist()
        figures |= {"minillm": single.item(), **{f"return {at}": value for at, value in enumerate(returns)}}
    answer(**figures)


def step(teacher: str, student: str, prompts: list[list[int]], new_tokens: int, steps: int, output: str) -> None:
    """Seconds of each GKD step, with every sequence sampled by the student."""
    import importlib

    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    module = importlib.import_module(trainer_class().__module__.rsplit(".", 1)[0])
    config_class = getattr(module, "GKDConfig", None) or importlib.import_module("trl").GKDConfig
    tokenizer = AutoTokenizer.from_pretrained(student)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    rows = [
        {
            "messages": [
                {"role": "user", "content": question(tokenizer.decode(ids))},
                {"role": "assistant", "content": "x"},
            ]
        }
        for ids in prompts
    ]

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            await_turn()
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            answer(seconds=time.perf_counter() - self.began)

    arguments = config_class(
        output_dir=output,
        per_device_train_batch_size=len(prompts),
        max_steps=steps,
        lmbda=1.0,
        beta=0.5,
        temperature=1.0,
        max_new_tokens=new_tokens,
        max_length=512,
        learning_rate=0.0,
        report_to=[],
        save_strategy="no",
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
    )
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (student, teacher)]
    for model in models:
        # As ours: every sequence is as long as allowed.
        model.generation_config.eos_token_id = None
    trainer = trainer_class()(
        model=models[0],
        teacher_model=models[1],
        args=arguments,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows * steps),
        callbacks=[Clock()],
    )
    trainer.generation_config.eos_token_id = None
    trainer.generation_config.min_new_tokens = new_tokens
    trainer.train()


def question(text: str) -> str:
    """The user's turn of a chat in the template's markup."""
    return text.split("user\n", 1)[-1].split("<|im_end|>", 1)[0]


if __name__ == "__main__":
    {"loss": loss, "same": same, "step": step}[sys.argv[1]](**json.loads(sys.stdin.readline()))
