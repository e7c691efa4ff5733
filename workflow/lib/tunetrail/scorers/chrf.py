"""chrF (Popović 2015): the overlap of a completion with the author's own text, as sacrebleu computes it."""

from functools import cache

from sacrebleu.metrics import CHRF


@cache
def _metric() -> CHRF:
    return CHRF()  # character n-grams up to 6, no word n-grams, beta 2: sacrebleu's default, "chrF2"


def chrf(completion: str, reference: str) -> float:
    """Sentence-level chrF, from 0 (no character n-gram in common, or an empty completion) to 100 (equal)."""
    return _metric().sentence_score(completion, [reference]).score
