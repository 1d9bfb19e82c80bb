"""Quality metrics of predicted texts over a set of predictions: exact match, ROUGE and BLEU.

BLEU of a set is not the mean of BLEU over its sentences. So every metric here has statistics for each prediction, and
its values are a function of their sums, over the whole set, a part of it, or a resample of a bootstrap.
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
    """The statistics of a metric on a set of predictions, from which its values are computed.

    Attributes:
      statistics: one row per prediction; rows are summed.
      combine: function from the sums to the metric's values, by name.
    """

    statistics: Float[np.ndarray, "N K"]
    combine: Callable[[Float[np.ndarray, "K"]], dict[str, float]]

    def values(self, weights: Float[np.ndarray, "N"] | None = None) -> dict[str, float]:
        """Returns the metric's values by name, each between 0 and 1.

        `weights` are integers: how often each prediction is counted (None: once).
        """
        sums = self.statistics.sum(0) if weights is None else weights @ self.statistics
        return self.combine(sums)

    def difference(self, other: "Quality", weights: Float[np.ndarray, "N"] | None = None) -> dict[str, float]:
        """The metric's values minus those of `other` predictions for the same references, with the same weights."""
        others = other.values(weights)
        return {name: value - others[name] for name, value in self.values(weights).items()}


def mean(scores: Mapping[str, Sequence[float | bool]]) -> Quality:
    """A metric that is the mean over predictions of scores between 0 and 1, given by name; for metrics of your own.

    Raises ValueError unless all scores have the same number of values.
    """
    statistics = np.asarray([[*values, 1.0] for values in zip(*scores.values(), strict=True)], float)
    return Quality(
        statistics.reshape(-1, len(scores) + 1),  # the right shape also without predictions
        lambda sums: {name: float(value / sums[-1]) for name, value in zip(scores, sums, strict=False)},
    )


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> Quality:
    """`exact_match`: the share of predictions whose final number has the same value as the reference's.

    So "1,200", "1200" and "1200.0" are equal.
    """
    hits = [
        answer is not None and answer == final_number(reference)
        for answer, reference in zip(map(final_number, predictions), references, strict=True)
    ]
    return mean({"exact_match": hits})


def rouge(predictions: Sequence[str], references: Sequence[str]) -> Quality:
    """`rouge1`, `rouge2`, `rougeL`: mean F1 of unigrams, bigrams, longest common subsequence (Lin 2004).

    Computed by the rouge-score package without stemming, its default, as in T5's evaluation.
    """
    from rouge_score import rouge_scorer

    scorer = rouge_scorer.RougeScorer(list(_ROUGE))
    scores = [
        scorer.score(target=reference, prediction=prediction)
        for prediction, reference in zip(predictions, references, strict=True)
    ]
    return mean({name: [score[name].fmeasure for score in scores] for name in _ROUGE})


def bleu(predictions: Sequence[str], references: Sequence[str]) -> Quality:
    """`bleu`: corpus BLEU (Papineni et al. 2002) as sacrebleu computes it by default, divided by 100.

    The defaults are 13a tokenisation, case-sensitive, exponential smoothing of orders without a match (Post 2018).
    """
    from sacrebleu.metrics import BLEU

    # sacrebleu warns about single sentences without effective_order; it does not change the counts that we use.
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
    """Returns the number after the first "####", or without "####" the last number in the text, or None.

    The first "####" is used because a model that does not stop goes on to write further problems.
    """
    _, mark, answer = text.partition("####")
    numbers = _NUMBER.findall(answer if mark else text)
    if not numbers:
        return None
    return Decimal(numbers[0 if mark else -1].replace(",", ""))
