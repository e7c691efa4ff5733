"""chrF (Popović 2015): the overlap of a completion with the author's text, as sacrebleu computes it."""

from functools import cache

from sacrebleu.metrics import CHRF


@cache
def _metric(beta: float) -> CHRF:
    return CHRF(beta=beta)  # type: ignore[arg-type]  # character n-grams up to 6, no word n-grams


def chrf(completion: str, reference: str, beta: float = 1.0) -> float:
    """Sentence-level chrF, from 0 (no common character n-gram, or an empty completion) to 100 (equal).

    In the F-score recall counts beta² times as much as precision. sacrebleu's default of 2 favours longer texts.
    """
    return _metric(beta).sentence_score(completion, [reference]).score
