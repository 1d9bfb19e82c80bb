"""Throughput model: predicts speed from part times and acceptance ("Decoding Speculative Decoding", arXiv 2402.01528).

    throughput(gamma) = emitted(gamma) / (gamma * draft step + target(gamma + 1 tokens) + rule)

Acceptance always has the form `ctar` (cumulative token acceptance rate, arXiv 2404.18911): entry w - 1 is the
probability that a block accepts at least w drafted tokens, w = 1 .. gamma, so a block emits 1 + sum(ctar) tokens on
average. `iid` and `by_position` compute it from acceptance rates. For a smaller gamma g the first g entries are used,
which is approximate, and exact if all positions have the same acceptance.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

# Number of bisections of [0, 1]; the remaining interval is below float32 resolution.
_BISECTIONS = 40


def iid(acceptance: float, gamma: int) -> tuple[float, ...]:
    """`ctar` if every drafted token is accepted with the same probability: acceptance ** w (arXiv 2211.17192)."""
    return tuple(acceptance**w for w in range(1, gamma + 1))


def by_position(rates: Sequence[float | None]) -> tuple[float, ...]:
    """`ctar` from the probabilities that position i is accepted if all earlier ones are (`acceptance_by_position`).

    None means that no block reached the position.
    """
    return tuple(float(x) for x in np.cumprod([rate or 0.0 for rate in rates]))


def rates_of(ctar: Sequence[float]) -> tuple[float, ...]:
    """The inverse of `by_position`; 0 after a position that is never accepted."""
    before = (1.0, *ctar)
    return tuple(now / last if last else 0.0 for now, last in zip(ctar, before, strict=False))


def emitted(ctar: Sequence[float], gamma: int) -> float:
    """Expected emitted tokens per block, recovered or bonus token included (block efficiency, also called TAR)."""
    return 1.0 + float(sum(_upto(ctar, gamma)))


def _upto(values: Sequence[float], gamma: int) -> Sequence[float]:
    if not 0 <= gamma <= len(values):
        raise ValueError(f"gamma {gamma} exceeds the {len(values)} positions with a known acceptance")
    return values[:gamma]


@dataclasses.dataclass(frozen=True)
class Costs:
    """Seconds of the parts of a block.

    The draft may use the target's first layers (Kangaroo, arXiv 2404.18911). These run once on the pending token and
    once on every drafted token, for draft and verification together.

    Attributes:
      draft_step: seconds per drafted token; with shared layers those of the adapter, norm and head.
      verify: at index k, seconds of the target on k + 1 tokens per row, without shared layers; index 0 is a plain step.
      rule: seconds of rule and bookkeeping per block.
      shared: seconds of the shared layers on one token; 0 for an independent draft.
    """

    draft_step: float
    verify: tuple[float, ...]
    rule: float = 0.0
    shared: float = 0.0

    def block(self, gamma: int) -> float:
        """Seconds of a block with gamma drafted tokens; gamma 0 is a plain decoding step."""
        if gamma >= len(self.verify):
            raise ValueError(f"there are target seconds for 1 .. {len(self.verify)} tokens, not for {gamma + 1}")
        return gamma * self.draft_step + self.verify[gamma] + self.rule + (gamma + 1) * self.shared


def interpolated(
    measured: Mapping[int, float], longest: int, size: Callable[[int], float] = float
) -> tuple[float, ...]:
    """Seconds at 0 .. longest drafted tokens, interpolated linearly, or extrapolated beyond the last measured one.

    Args:
      size: function from drafted tokens to the quantity in which the seconds are linear. For a sparse target it is the
        number of experts that the block uses (`expert_use.ExpertUse`), which grows ever more slowly.
    """
    at = sorted(measured)
    if at[0] != 0 or len(at) < 2:
        raise ValueError(f"seconds are needed at 0 drafted tokens and at one more number, not at {at}")
    known = [measured[k] for k in at]
    sizes, last = [size(k) for k in at], size(at[-1])
    slope = (known[-1] - known[-2]) / (last - sizes[-2])
    inside = np.interp([size(k) for k in range(longest + 1)], sizes, known)
    return tuple(float(x) + slope * max(size(k) - last, 0) for k, x in enumerate(inside))


def throughput(ctar: Sequence[float], costs: Costs, gamma: int) -> float:
    """Tokens per second of one row."""
    return emitted(ctar, gamma) / costs.block(gamma)


def speedup(ctar: Sequence[float], costs: Costs, gamma: int) -> float:
    """Throughput divided by that of plain decoding."""
    return throughput(ctar, costs, gamma) * costs.block(0)


# Number of samples in an estimate of the blocks of a refilled batch, which then varies by well below 1%.
_SAMPLES = 400


def expected_rounds(
    ctars: Sequence[Sequence[float]], tokens: Sequence[int], rows: int | None = None, group: int | None = None
) -> float:
    """Expected number of blocks until a batch has completed all texts, if a row whose text ends takes the next one.

    Blocks are assumed to be independent, and identically distributed in a text. It is exact for one row, and for as
    many rows as texts: P(all done after r blocks) is the product over texts of P(r blocks emit enough tokens).
    Otherwise it is estimated from samples of each text's number of blocks.

    Args:
      ctars: `ctar` of each text.
      tokens: number of tokens of each text, in the order in which they start.
      rows: number of rows of the batch; by default as many as texts.
      group: number of texts of which the last must end before the next group starts; by default all.
    """
    if group is not None:
        spans = [slice(first, first + group) for first in range(0, len(tokens), group)]
        return sum(expected_rounds(ctars[span], tokens[span], rows) for span in spans)
    running = np.zeros((len(tokens), max(tokens, default=0)))
    for text, (ctar, count) in enumerate(zip(ctars, tokens, strict=True)):
        running[text, :count] = _still_running(tuple(ctar), count)
    if rows is None or rows >= len(tokens):
        return float(np.sum(1.0 - np.prod(1.0 - running, axis=0)))
    if rows == 1:
        return float(np.sum(running))
    draws = np.random.default_rng(0).random((_SAMPLES, len(tokens)))
    ends, each = np.zeros((_SAMPLES, rows), int), np.arange(_SAMPLES)
    for text in range(len(tokens)):
        ends[each, ends.argmin(1)] += (draws[:, text : text + 1] < running[text]).sum(1)
    return float(ends.max(1).mean())


@functools.lru_cache(4096)
def _still_running(ctar: tuple[float, ...], tokens: int) -> np.ndarray:
    """For r = 0 .. tokens - 1, the probability that r blocks emit fewer than `tokens` tokens; a block emits >= 1."""
    block = -np.diff((1.0, *ctar, 0.0))  # probability that a block emits 1, 2, .. gamma + 1 tokens
    total = np.zeros(tokens)  # probability of each total so far below `tokens`
    total[:1] = 1.0
    running = np.zeros(tokens)
    for r in range(tokens):
        running[r] = total.sum()
        total = np.convolve(total, np.concatenate([[0.0], block]))[:tokens]
    return running


def batch_throughput(
    ctars: Sequence[Sequence[float]],
    tokens: Sequence[int],
    costs: Costs,
    gamma: int,
    rows: int | None = None,
    group: int | None = None,
) -> float:
    """Tokens per second of a batch, see `expected_rounds`; `costs` are those of a block of the whole batch."""
    ctars = [_upto(ctar, gamma) for ctar in ctars]
    return sum(tokens) / (expected_rounds(ctars, tokens, rows, group) * costs.block(gamma))


def best_gamma(ctar: Sequence[float], costs: Costs) -> int:
    """The gamma in 0 .. len(ctar) with the highest throughput; 0 if plain decoding is fastest."""
    return max(range(len(ctar) + 1), key=lambda gamma: throughput(ctar, costs, gamma))


def break_even_acceptance(costs: Costs, gamma: int) -> float | None:
    """The i.i.d. acceptance at which speculation is as fast as plain decoding; None if no acceptance is enough."""
    needed = costs.block(gamma) / costs.block(0)  # tokens that a block must emit
    if needed > gamma + 1:
        return None
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if emitted(iid(middle, gamma), gamma) >= needed else (middle, high)
    return high


def parity_draft_step(block_efficiency: float, gamma: int, throughput: float, target_seconds: float) -> float | None:
    """Seconds per draft step at which a draft A reaches the throughput of another draft B.

    `(TAR_A / throughput_B - t_target) / gamma`; None if A is slower even with draft steps of 0 seconds.

    Args:
      block_efficiency: TAR_A, tokens per block with draft A.
      throughput: throughput with draft B, in tokens per second.
      target_seconds: t_target, seconds of a verification with its rule.
    """
    seconds = (block_efficiency / throughput - target_seconds) / gamma
    return seconds if seconds > 0 else None


def sensitivity(ctar: Sequence[float], costs: Costs, gamma: int) -> dict[str, float]:
    """Throughput with a better draft at this gamma, relative to that with the given draft.

    Returns:
      "acceptance": with every position's acceptance rate multiplied by 1.1 (at most 1);
      "latency": with the seconds of a draft step multiplied by 0.9.
    """
    accepted = by_position([min(1.0, 1.1 * rate) for rate in rates_of(ctar)])
    faster = dataclasses.replace(costs, draft_step=0.9 * costs.draft_step)
    now = throughput(ctar, costs, gamma)
    return {
        "acceptance": throughput(accepted, costs, gamma) / now,
        "latency": throughput(ctar, faster, gamma) / now,
    }


@dataclasses.dataclass(frozen=True)
class PartSeconds:
    """Seconds of the parts of a block.

    Attributes:
      draft_step: seconds per drafted token (seconds of a proposal divided by gamma).
      target_step: seconds of the target on one token per row.
      verify: seconds of the target on gamma + 1 tokens per row.
      rule: seconds of rule and bookkeeping per block.
      baseline_rule: the same in plain decoding (gamma = 0).
      intervals: 95% interval of each, by name; None where fewer than two timings give none.
    """

    draft_step: float
    target_step: float
    verify: float
    rule: float
    baseline_rule: float
    intervals: Mapping[str, list[float] | None] = dataclasses.field(default_factory=dict)

    def block(self, gamma: int) -> float:
        """Seconds of one speculative block."""
        return gamma * self.draft_step + self.verify + self.rule

    @property
    def baseline(self) -> float:
        """Seconds of a plain decoding step, which emits one token per row."""
        return self.target_step + self.baseline_rule

    def cost_ratio(self) -> float | None:
        """DistillSpec's cost ratio c: draft step divided by target step; None if that is too short to be seen."""
        return self.draft_step / self.target_step if self.target_step else None


def memory_bound_speedup(block_efficiency: float, gamma: int, target_params: int, draft_params: int) -> float:
    """MBSU (arXiv 2403.00858): rho * tau / (gamma + rho), rho = target / draft parameters, tau = block efficiency."""
    ratio = target_params / draft_params
    return ratio * block_efficiency / (gamma + ratio)
