"""The picture of docs/blocks.md: one row of a real rollout, token by token and in blocks.

python -m benchmarks.blocks_picture        (writes docs/blocks.png)
"""

from pathlib import Path
from typing import Any

import torch

from benchmarks.pairs import load, notices, templated_pair
from benchmarks.replay import stood
from kernels.decode import Rollout, blockwise, reference
from kernels.gate import ExponentialDecay
from kernels.noise import sequence_key

BLOCK, TOKENS = 8, 32
STUDENT, TEACHER, CUT, GREY = "#dbe7f5", "#f6dcc4", "#c0392b", "#8a8a8a"


def draw(axes: Any, rollout: Rollout, words: list[str]) -> None:
    """Tokens as boxes, coloured by who wrote them; below, each decoder's forwards of the teacher."""
    from matplotlib.patches import Rectangle

    wrote, stands = rollout.teacher_wrote[0].tolist(), stood(rollout, "student")[0]
    for place, (word, teacher) in enumerate(zip(words, wrote, strict=True)):
        axes.add_patch(Rectangle((place, 2.1), 0.88, 0.8, facecolor=TEACHER if teacher else STUDENT))
        axes.text(place + 0.44, 2.5, word, ha="center", va="center", fontsize=6.5, rotation=90 if len(word) > 4 else 0)
        axes.add_patch(Rectangle((place, 1.35), 0.88, 0.3, facecolor=GREY))
    start, blocks = 0, 0
    while start < len(words):
        cut = next((place for place in range(start, min(start + BLOCK, len(words))) if not stands[place]), None)
        width, end = min(BLOCK, len(words) - start), start + BLOCK if cut is None else cut + 1
        end = min(end, len(words))
        axes.add_patch(Rectangle((start, 0.55), width - 0.12, 0.3, facecolor=GREY))
        if cut is not None:
            axes.plot([end - 0.06] * 2, [0.35, 2.95], color=CUT, linewidth=1.4)
            axes.add_patch(Rectangle((end, 0.55), start + width - end - 0.12, 0.3, facecolor="#d5d5d5"))
        start, blocks = end, blocks + 1
    left = -0.4
    axes.text(left, 2.5, "tokens, the same\nfrom both", ha="right", va="center", fontsize=8)
    axes.text(left, 1.5, f"teacher, token by token:\n{len(words)} forwards", ha="right", va="center", fontsize=8)
    axes.text(left, 0.7, f"teacher, in blocks of {BLOCK}:\n{blocks} forwards", ha="right", va="center", fontsize=8)
    for x, color, label in ((6, STUDENT, "written by the student"), (14, TEACHER, "written by the teacher")):
        axes.add_patch(Rectangle((x, 3.15), 0.5, 0.3, color=color))
        axes.text(x + 0.7, 3.3, label, va="center", fontsize=8)
    axes.plot([22, 22.5], [3.3, 3.3], color=CUT, linewidth=1.4)
    axes.text(22.8, 3.3, "cut: not the student's draft", va="center", fontsize=8)
    axes.set_xlim(left, len(words))
    axes.set_ylim(0.2, 3.6)
    axes.axis("off")


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from infra.models import load_tokenizer

    pair = templated_pair()
    tokenizer = load_tokenizer(pair.teacher)
    prompts = [row.prompt for row in notices(tokenizer, 1, seed=4)]
    # A student half-way: one at the end is hardly ever cut in so short a text.
    given = (load(pair.students[20]), load(pair.teacher), prompts, torch.tensor([sequence_key(4, "picture")]))
    gate, settings = ExponentialDecay(), {"max_new_tokens": TOKENS, "eos_ids": [tokenizer.eos_token_id]}
    one, other = reference(*given, gate, **settings), blockwise(*given, gate, block=BLOCK, **settings)
    assert one.tokens[0].tolist() == other.tokens[0].tolist()
    words = [tokenizer.decode([token]).strip().replace("\n", "↵") or "↵" for token in one.tokens[0].tolist()]
    figure, axes = pyplot.subplots(figsize=(11, 2.6))
    draw(axes, one, words)
    figure.savefig(Path(__file__).parent.parent / "docs" / "blocks.png", dpi=160, bbox_inches="tight")


if __name__ == "__main__":
    main()
