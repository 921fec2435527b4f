"""Free texts that say the same: clusters by ROUGE-L, so that self-consistency can count what nobody can normalise."""

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from tasks import forms
from tasks.verify import rouge_l

# A table has a cell for each pair of words, and there is one for each pair of a prompt's samples.
CHARACTERS = 2_000


@lru_cache(maxsize=1)
def tokenizer() -> Any:
    from rouge_score.tokenizers import DefaultTokenizer

    return DefaultTokenizer(use_stemmer=True)


def clustered(texts: Sequence[str], least: float) -> list[str | None]:
    """Each text's cluster, named by the normalised text that began it; None for an empty text, which agrees with none.

    In their order, each text joins the cluster whose first text is nearest to it by ROUGE-L (F1, 0 to 100, of the first
    2,000 characters), if that is at least ``least``, and begins one otherwise. Texts that are equal but for case, white
    space and outer punctuation are always together; those mostly written in letters that ROUGE-L does not count agree
    with nothing else.
    """
    firsts: dict[str, tuple[str, Counter[str]]] = {}
    cluster: dict[str, str] = {}
    found: list[str | None] = []
    for text in texts:
        answer = forms.exact(text)
        if answer is not None and answer not in cluster:
            said = forms.tail(text)[:CHARACTERS]
            words = Counter(tokenizer().tokenize(said)) if counted(said) else Counter()
            near = {
                name: rouge_l(said, [first])
                for name, (first, others) in firsts.items()
                # A common subsequence is no longer than the words in common: most pairs need no table.
                if 200 * (words & others).total() >= least * max(1, words.total() + others.total())
            }
            nearest = max(near, key=near.__getitem__, default=answer)
            if near.get(nearest, 0.0) >= least:
                cluster[answer] = nearest
            else:
                cluster[answer], firsts[answer] = answer, (said, words)
        found.append(answer and cluster[answer])
    return found


def counted(text: str) -> bool:
    """Whether ROUGE-L sees at least half of the letters and digits."""
    letters = [letter for letter in text if letter.isalnum()]
    return 2 * sum(letter.isascii() for letter in letters) >= len(letters)
