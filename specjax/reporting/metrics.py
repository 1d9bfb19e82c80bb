"""Computes the metrics of an evaluation, with bootstrap intervals, from counts and seconds.

Every metric is a ratio of sums over prompts, not a mean of ratios, so longer texts have more weight. Intervals are 95%
percentile intervals of the bootstrap (Efron and Tibshirani 1993, chapter 13).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from specjax.runtime.errors import InexactText

RESAMPLES = 2000
LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Counts:
    """Counts of decoding for each prompt, up to EOS or the length limit.

    Raises ValueError if the counts contradict each other.
    """

    emitted: Int[np.ndarray, "N"]
    """Number of tokens that the user receives."""
    target_calls: Int[np.ndarray, "N"]
    """Number of verifications by the target; prefill is not counted."""
    drafted: Int[np.ndarray, "N"]
    """Number of drafted tokens, including those after a rejected one."""
    accepted: Int[np.ndarray, "N"]
    """Number of emitted tokens that were drafted."""
    drafted_at: Int[np.ndarray, "N gamma"]
    """Number of blocks that drafted position i and accepted all earlier positions."""
    accepted_at: Int[np.ndarray, "N gamma"]
    """Number of blocks that accepted position i."""
    emitted_more_than: Int[np.ndarray, "N gamma"]
    """In column w - 1 the number of target calls that emitted more than w tokens, w = 1 .. gamma."""

    def __post_init__(self):
        claims = {
            "emitted = target_calls + sum of emitted_more_than": np.array_equal(
                self.emitted, self.target_calls + self.emitted_more_than.sum(1)
            ),
            "accepted = sum of accepted_at": np.array_equal(self.accepted, self.accepted_at.sum(1)),
            "accepted_at <= drafted_at": bool((self.accepted_at <= self.drafted_at).all()),
            "accepted <= drafted": bool((self.accepted <= self.drafted).all()),
        }
        broken = [claim for claim, holds in claims.items() if not holds]
        if broken:
            raise ValueError(f"the counts of decoding contradict each other: not {'; not '.join(broken)}")


@dataclasses.dataclass(frozen=True)
class Timing:
    """The speed of a method on each unit: a batch of prompts, or a question."""

    emitted: Int[np.ndarray, "U"]
    """Number of emitted tokens."""
    seconds: Float[np.ndarray, "U"]
    """Wall-clock seconds, with prefill and without compilation."""


def evaluate_row(counts: Counts, timing: Timing, baseline: Timing, *, seed: int) -> dict:
    """The measured fields of an evaluation row: sums, ratios, speed, and their intervals (None where undefined).

    `block_efficiency = 1 + sum(ctar)` holds exactly, because `Counts` checks it in integers. For the interval of
    `speedup`, method and baseline are resampled with the same units, so a unit that is slow for both does not widen it.
    An interval over fewer than two prompts (or units) is None.

    Args:
      baseline: plain decoding of the same units, measured in alternation with the method.
    """
    emitted, calls, drafted, accepted = (
        int(array.sum()) for array in (counts.emitted, counts.target_calls, counts.drafted, counts.accepted)
    )
    speed, baseline_speed = (_ratio(each.emitted.sum(), each.seconds.sum()) for each in (timing, baseline))
    over_prompts = _resampling_weights(len(counts.emitted), seed)
    over_units = _resampling_weights(len(timing.seconds), seed)
    return {
        "emitted_tokens": emitted,
        "target_calls": calls,
        "drafted_tokens": drafted,
        "accepted_tokens": accepted,
        "block_efficiency": _ratio(emitted, calls),
        "block_efficiency_ci": interval(_ratios(over_prompts, counts.emitted, counts.target_calls)),
        "acceptance_rate": _ratio(accepted, drafted),
        "acceptance_rate_ci": interval(_ratios(over_prompts, counts.accepted, counts.drafted)),
        "sequence_acceptance": _ratio(accepted, emitted),
        "acceptance_by_position": [
            _ratio(*pair) for pair in zip(counts.accepted_at.sum(0), counts.drafted_at.sum(0), strict=True)
        ],
        "ctar": [_ratio(more, calls) for more in counts.emitted_more_than.sum(0)],
        "tokens_per_second": speed,
        "baseline_tokens_per_second": baseline_speed,
        "speedup": None if speed is None or not baseline_speed else speed / baseline_speed,
        "speedup_ci": interval(
            _ratios(over_units, timing.emitted, timing.seconds)
            / _ratios(over_units, baseline.emitted, baseline.seconds)
        ),
    }


def paired_difference(counts_a: Counts, counts_b: Counts, seed: int) -> dict:
    """Difference a - b and ratio a / b of two block efficiencies on the same prompts, with paired bootstrap intervals.

    Each resample has the same prompts for both, so differences between prompts cancel. Raises ValueError if the numbers
    of prompts differ.
    """
    prompts = len(counts_a.emitted)
    if len(counts_b.emitted) != prompts:
        raise ValueError(f"a paired comparison needs the same prompts: {prompts} against {len(counts_b.emitted)}")
    one, weights = np.ones((1, prompts)), _resampling_weights(prompts, seed)
    efficiency_a, efficiency_b = (_ratios(one, c.emitted, c.target_calls)[0] for c in (counts_a, counts_b))
    resampled_a, resampled_b = (_ratios(weights, c.emitted, c.target_calls) for c in (counts_a, counts_b))
    return {
        "prompts": prompts,
        "block_efficiency_difference": _finite(efficiency_a - efficiency_b),
        "block_efficiency_difference_ci": interval(resampled_a - resampled_b),
        "block_efficiency_ratio": _finite(efficiency_a / efficiency_b),
        "block_efficiency_ratio_ci": interval(resampled_a / resampled_b),
    }


def comparisons(pairs: Sequence[tuple[str, str]], counts: Mapping[tuple, Counts], seed: int) -> list[dict]:
    """Rows with the `paired_difference` of each pair of drafters, for each rule, gamma and setting that both have.

    Args:
      counts: counts by (setting, drafter, rule, lenience, gamma); a setting has a temperature and a batch_size.
    """
    rows = []
    for first, second in pairs:
        for (setting, name, rule, lenience, gamma), mine in counts.items():
            theirs = counts.get((setting, second, rule, lenience, gamma))
            if name != first or theirs is None:
                continue
            shared = {"temperature": setting.temperature, "batch_size": setting.batch_size, "gamma": gamma}
            who = {"drafter": first, "against": second, "rule": rule, "lenience": lenience}
            rows.append(who | shared | paired_difference(mine, theirs, seed))
    return rows


def intervals(
    values: Callable[[Float[np.ndarray, "N"]], dict[str, float]], size: int, *, seed: int
) -> dict[str, list[float] | None]:
    """Bootstrap intervals, by name, of statistics of a set of `size` items; None if there are fewer than two items.

    `values` computes the statistics from the weight of each item (how often it was drawn).
    """
    resampled = [values(weights) for weights in _resampling_weights(size, seed)]
    names = resampled[0] if resampled else values(np.ones(size))
    return {name: interval(np.asarray([one[name] for one in resampled])) for name in names}


def count_differences(identical: Mapping) -> tuple[int, int]:
    """The numbers of ties and of true differences in an `identical_to_baseline`; old records have no key "tie"."""
    ties = [difference.get("tie", difference["top2_gap"] < 1e-5) for difference in identical["differences"]]
    return sum(ties), len(ties) - sum(ties)


def check_exact(rows: Sequence[Mapping]) -> None:
    """Raises InexactText if a row has text that truly differs from plain decoding's under an exact rule."""
    for row in rows:
        identical = row.get("identical_to_baseline")
        different = count_differences(identical)[1] if identical else 0
        if different:
            raise InexactText(
                f"{different} of {identical['of']} texts of {row['drafter']} (rule {row['rule']}, "
                f"gamma {row['gamma']}, temperature {row['temperature']:g}) differ from plain decoding's by more than "
                "rounding; results.json lists them, and this is a bug: report it with the config"
            )


def _resampling_weights(size: int, seed: int) -> Float[np.ndarray, "R N"]:
    """How often each of `size` items is drawn in each resample; no resamples if `size` is below 2."""
    if size < 2:
        return np.zeros((0, size))
    return np.random.default_rng(seed).multinomial(size, np.full(size, 1 / size), size=RESAMPLES).astype(float)


def _ratios(weights: np.ndarray, numerator: np.ndarray, denominator: np.ndarray) -> Float[np.ndarray, "R"]:
    """The ratio of the weighted sums in each resample; NaN if the denominator is 0."""
    below = weights @ denominator
    return np.divide(weights @ numerator, below, out=np.full(len(weights), np.nan), where=below > 0)


def interval(values: Float[np.ndarray, "R"]) -> list[float] | None:
    """The 95% percentile interval of a statistic's values in the resamples; None if none is finite."""
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    return [float(edge) for edge in np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])]


def _ratio(numerator: float | int | np.number, denominator: float | int | np.number) -> float | None:
    return float(numerator) / float(denominator) if denominator else None


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
