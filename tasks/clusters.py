"""Free texts that say the same: clusters by ROUGE-L, so that self-consistency can count what nobody can normalise."""

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from tasks import forms
from tasks.verify import ROUGE_CHARACTERS, rouge_l


@lru_cache(maxsize=1)
def tokenizer() -> Any:
    from rouge_score.tokenizers import DefaultTokenizer

    return DefaultTokenizer(use_stemmer=True)


def clustered(texts: Sequence[str], least: float) -> list[str | None]:
    """Each text's cluster, named by the normalised text that began it; None for an empty text, which agrees with none.

    In their order, each text joins the cluster whose first text is nearest to it by ROUGE-L (F1, 0 to 100), if that is
    at least ``least``, and begins one otherwise. Texts that are equal but for case and white space are always together,
    also in scripts of which ROUGE-L counts no word.
    """
    clusters: dict[str, tuple[str, Counter[str]]] = {}
    found: list[str | None] = []
    for text in texts:
        answer = forms.exact(text)
        if answer is not None and answer not in clusters:
            said = forms.tail(text)[:ROUGE_CHARACTERS]
            words = Counter(tokenizer().tokenize(said))
            near = {
                name: rouge_l(said, [first])
                for name, (first, others) in clusters.items()
                # A common subsequence is no longer than the words in common: most pairs need no table.
                if 200 * (words & others).total() >= least * max(1, words.total() + others.total())
            }
            nearest = max(near, key=near.__getitem__, default=None)
            if nearest is not None and near[nearest] >= least:
                answer = nearest
            else:
                clusters[answer] = (said, words)
        found.append(answer)
    return found
