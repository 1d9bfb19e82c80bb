"""How good predicted texts are: exact match, ROUGE, BLEU, over a whole set of predictions.

BLEU of a set is not the mean over its sentences. So every metric here counts something for each prediction, and its
values are a function of the sums. That serves the whole set, any part of it, and the resamples of a bootstrap.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal

import numpy as np
from jaxtyping import Float

_ROUGE = ("rouge1", "rouge2", "rougeL")


@dataclass(frozen=True)
class Quality:
    """The counts of a metric, from which its values follow.

    Attributes:
      statistics: a row per prediction, to be summed.
      combine: from the sums to the metric's values, by name.
    """

    statistics: Float[np.ndarray, "N K"]
    combine: Callable[[Float[np.ndarray, "K"]], dict[str, float]]

    def values(self, weights: Float[np.ndarray, "N"] | None = None) -> dict[str, float]:
        """Returns the metric's values, each in 0..1.

        `weights` are whole numbers: how often each prediction counts (None: once).
        """
        sums = self.statistics.sum(0) if weights is None else weights @ self.statistics
        return self.combine(sums)

    def difference(self, other: "Quality", weights: Float[np.ndarray, "N"] | None = None) -> dict[str, float]:
        """The metric's values less those of other predictions for the same references, with the same weights."""
        others = other.values(weights)
        return {name: value - others[name] for name, value in self.values(weights).items()}


def mean(scores: Mapping[str, Sequence[float | bool]]) -> Quality:
    """The mean over the predictions of each score, in 0..1; the scores of a metric of your own, for example.

    Raises ValueError unless all scores have as many values.
    """
    statistics = np.asarray([[*values, 1.0] for values in zip(*scores.values(), strict=True)], float)
    return Quality(
        statistics.reshape(-1, len(scores) + 1),  # also without predictions
        lambda sums: {name: float(value / sums[-1]) for name, value in zip(scores, sums, strict=False)},
    )


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> Quality:
    """`exact_match`: the share of predictions whose final number equals the reference's in value.

    "1,200" is 1200 is "1200.0".
    """
    hits = [
        answer is not None and answer == final_number(reference)
        for answer, reference in zip(map(final_number, predictions), references, strict=True)
    ]
    return mean({"exact_match": hits})


def rouge(predictions: Sequence[str], references: Sequence[str]) -> Quality:
    """`rouge1`, `rouge2`, `rougeL`: mean F1 of unigrams, bigrams, longest common subsequence (Lin 2004).

    As the rouge-score package computes them by default, without stemming; so does T5's evaluation.
    """
    from rouge_score import rouge_scorer

    scorer = rouge_scorer.RougeScorer(list(_ROUGE))
    scores = [
        scorer.score(target=reference, prediction=prediction)
        for prediction, reference in zip(predictions, references, strict=True)
    ]
    return mean({name: [score[name].fmeasure for score in scores] for name in _ROUGE})


def bleu(predictions: Sequence[str], references: Sequence[str]) -> Quality:
    """`bleu`: BLEU of the whole set (Papineni et al. 2002), as sacrebleu computes it by default, over 100.

    13a tokens, case kept, exponential smoothing of orders without a match (Post 2018).
    """
    from sacrebleu.metrics import BLEU

    # sacrebleu asks for the effective order with single sentences; it changes none of the counts that are taken.
    scorer = BLEU(effective_order=True)
    scores = [
        scorer.sentence_score(prediction, [reference])
        for prediction, reference in zip(predictions, references, strict=True)
    ]
    counts = [[*score.counts, *score.totals, score.sys_len, score.ref_len] for score in scores]

    def combine(sums: np.ndarray) -> dict[str, float]:
        *ngrams, length, reference_length = sums.astype(int).tolist()
        score = BLEU.compute_bleu(ngrams[:4], ngrams[4:], length, reference_length, smooth_method="exp")
        return {"bleu": float(score.score / 100)}

    return Quality(np.asarray(counts, float), combine)


Metric = Callable[[Sequence[str], Sequence[str]], Quality]

METRICS: dict[str, Metric] = {"exact_match": exact_match, "rouge": rouge, "bleu": bleu}


_NUMBER = re.compile(r"(?:(?<![\w.)])-)?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)")


def final_number(text: str) -> Decimal | None:
    """Returns the number after the first "####", or the last number where that mark is missing, or None.

    The first mark counts because a model that does not stop continues with problems of its own.
    """
    _, mark, answer = text.partition("####")
    numbers = _NUMBER.findall(answer if mark else text)
    if not numbers:
        return None
    return Decimal(numbers[0 if mark else -1].replace(",", ""))
