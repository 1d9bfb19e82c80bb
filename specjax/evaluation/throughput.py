"""Throughput model: speed from part times and acceptance ("Decoding Speculative Decoding", arXiv 2402.01528).

    throughput(gamma) = emitted(gamma) / (gamma * draft step + target(gamma + 1 tokens) + rule)

Acceptance always has the form `ctar`: index w - 1 holds the probability that w drafted tokens in a row are accepted,
w = 1 .. gamma (Kangaroo's CTAR, arXiv 2404.18911), so a block emits 1 + sum(ctar) tokens on average. `iid` and
`by_position` compute it from rates. Its first g entries serve a smaller gamma g, as if blocks could begin anywhere in
the text: nearly true, and exact if all positions have the same acceptance.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

# Halvings of [0, 1] until the rest is below the resolution of a float32.
_BISECTIONS = 40


def iid(acceptance: float, gamma: int) -> tuple[float, ...]:
    """`ctar` if every drafted token is accepted with the same probability: acceptance ** w (arXiv 2211.17192)."""
    return tuple(acceptance**w for w in range(1, gamma + 1))


def by_position(rates: Sequence[float | None]) -> tuple[float, ...]:
    """`ctar` from the probability that position i is accepted once all earlier ones are (`acceptance_by_position`).

    None stands for a position that no block reached.
    """
    return tuple(float(x) for x in np.cumprod([rate or 0.0 for rate in rates]))


def rates_of(ctar: Sequence[float]) -> tuple[float, ...]:
    """The inverse of `by_position`; 0 after a position that is never accepted."""
    before = (1.0, *ctar)
    return tuple(now / last if last else 0.0 for now, last in zip(ctar, before, strict=False))


def emitted(ctar: Sequence[float], gamma: int) -> float:
    """Expected tokens per block, including the recovered or bonus token: TAR, block efficiency, compression rate."""
    return 1.0 + float(sum(_upto(ctar, gamma)))


def _upto(values: Sequence[float], gamma: int) -> Sequence[float]:
    if not 0 <= gamma <= len(values):
        raise ValueError(f"gamma {gamma} exceeds the {len(values)} positions with a known acceptance")
    return values[:gamma]


@dataclasses.dataclass(frozen=True)
class Costs:
    """Seconds of the parts of a block with an independent draft.

    Attributes:
      draft_step: one drafted token.
      verify: index k: the target on k + 1 tokens per row; index 0 is its plain step.
      rule: rule and bookkeeping of a block.
    """

    draft_step: float
    verify: tuple[float, ...]
    rule: float = 0.0

    def block(self, gamma: int) -> float:
        """Seconds of a block with gamma drafted tokens; gamma 0 is a step of plain decoding."""
        return gamma * self.draft_step + _at(self.verify, gamma) + self.rule

    def with_draft(self, factor: float) -> "Costs":
        """The same costs with a draft that takes `factor` times as long."""
        return dataclasses.replace(self, draft_step=factor * self.draft_step)


@dataclasses.dataclass(frozen=True)
class SharedCosts:
    """Seconds of the parts of a block whose draft uses the target's first layers (Kangaroo, arXiv 2404.18911).

    These layers run once per token, for draft and verification together: on the pending token and on every drafted one,
    including the last:

        block(k drafted) = (k + 1) * shallow + k * adapter + deep(k + 1 tokens) + rule

    Attributes:
      shallow: the first layers on one token.
      adapter: everything else per drafted token: adapter, norm and head.
      deep: index k: the other layers and the head on k + 1 tokens per row.
      rule: rule and bookkeeping of a block.
    """

    shallow: float
    adapter: float
    deep: tuple[float, ...]
    rule: float = 0.0

    def block(self, gamma: int) -> float:
        """As `Costs.block`."""
        return (gamma + 1) * self.shallow + gamma * self.adapter + _at(self.deep, gamma) + self.rule

    def with_draft(self, factor: float) -> "SharedCosts":
        """The same costs with an adapter that takes `factor` times as long; the shared layers belong to the target."""
        return dataclasses.replace(self, adapter=factor * self.adapter)


BlockCosts = Costs | SharedCosts


def _at(seconds: Sequence[float], drafted: int) -> float:
    if drafted >= len(seconds):
        raise ValueError(f"there are target seconds for 1 .. {len(seconds)} tokens, not for {drafted + 1}")
    return seconds[drafted]


def interpolated(measured: Mapping[int, float], longest: int) -> tuple[float, ...]:
    """Seconds at 0 .. longest drafted tokens, interpolated from some; extrapolated linearly beyond the last one."""
    at = sorted(measured)
    if at[0] != 0 or len(at) < 2:
        raise ValueError(f"seconds are needed at 0 drafted tokens and at one more number, not at {at}")
    known = [measured[k] for k in at]
    slope = (known[-1] - known[-2]) / (at[-1] - at[-2])
    inside = np.interp(np.arange(longest + 1), at, known)
    return tuple(float(x) + slope * max(k - at[-1], 0) for k, x in enumerate(inside))


def throughput(ctar: Sequence[float], costs: BlockCosts, gamma: int) -> float:
    """Tokens per second of one row."""
    return emitted(ctar, gamma) / costs.block(gamma)


def speedup(ctar: Sequence[float], costs: BlockCosts, gamma: int) -> float:
    """Throughput over that of plain decoding."""
    return throughput(ctar, costs, gamma) * costs.block(0)


def expected_rounds(ctars: Sequence[Sequence[float]], tokens: int | Sequence[int]) -> float:
    """Expected blocks until every row of a batch has emitted its tokens: the maximum over rows.

    Exact if the blocks of a row are independent and identically distributed: P(all rows done after r blocks) is the
    product over rows of P(r blocks emit enough).

    Args:
      ctars: of each row.
      tokens: emitted by each row; one number for all rows, or one per row.
    """
    wanted = [tokens] * len(ctars) if isinstance(tokens, int) else list(tokens)
    running = np.zeros((len(ctars), max(wanted, default=0)))
    for row, (ctar, count) in enumerate(zip(ctars, wanted, strict=True)):
        running[row, :count] = _still_running(ctar, count)
    return float(np.sum(1.0 - np.prod(1.0 - running, axis=0)))


def _still_running(ctar: Sequence[float], tokens: int) -> np.ndarray:
    """Probability that r blocks have emitted fewer than `tokens`, r = 0 .. tokens - 1 (each emits at least one)."""
    block = -np.diff((1.0, *ctar, 0.0))  # probability that a block emits 1, 2, .. gamma + 1 tokens
    total = np.zeros(tokens)  # probability of each total so far below `tokens`
    total[:1] = 1.0
    running = np.zeros(tokens)
    for r in range(tokens):
        running[r] = total.sum()
        total = np.convolve(total, np.concatenate([[0.0], block]))[:tokens]
    return running


def batch_throughput(ctars: Sequence[Sequence[float]], costs: BlockCosts, gamma: int, tokens: int) -> float:
    """Tokens per second of a batch whose rows emit `tokens` each; the batch runs as long as its slowest row.

    Args:
      ctars: of each row.
      costs: of a block of the whole batch.
    """
    rounds = expected_rounds([_upto(ctar, gamma) for ctar in ctars], tokens)
    return len(ctars) * tokens / (rounds * costs.block(gamma))


def best_gamma(ctar: Sequence[float], costs: BlockCosts, longest: int | None = None) -> int:
    """The gamma in 0 .. longest with the highest throughput; 0 if speculation does not pay."""
    longest = len(ctar) if longest is None else longest
    return max(range(longest + 1), key=lambda gamma: throughput(ctar, costs, gamma))


def break_even_emitted(costs: BlockCosts, gamma: int) -> float:
    """Tokens that a block must emit to be as fast as plain decoding; above gamma + 1 it never is."""
    return costs.block(gamma) / costs.block(0)


def break_even_acceptance(costs: BlockCosts, gamma: int) -> float | None:
    """The i.i.d. acceptance at which speculation is as fast as plain decoding; None if no acceptance is enough."""
    needed = break_even_emitted(costs, gamma)
    if needed > gamma + 1:
        return None
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if emitted(iid(middle, gamma), gamma) >= needed else (middle, high)
    return high


def parity_draft_step(block_efficiency: float, gamma: int, throughput: float, target_seconds: float) -> float | None:
    """Seconds of a draft step at which this draft reaches the throughput of another draft.

    `(TAR_A / throughput_B - t_target) / gamma`; None if even a draft that takes no time is slower.

    Args:
      block_efficiency: of this draft.
      throughput: of the other draft, in tokens per second.
      target_seconds: of a verification, rule included.
    """
    seconds = (block_efficiency / throughput - target_seconds) / gamma
    return seconds if seconds > 0 else None


def sensitivity(ctar: Sequence[float], costs: BlockCosts, gamma: int, change: float = 0.1) -> dict[str, float]:
    """Throughput with a better draft at this gamma, relative to today's.

    Returns:
      "acceptance": if the acceptance of every position is higher by the share `change` (at most 1);
      "latency": if a draft step takes less time by the share `change`.
    """
    better = by_position([min(1.0, (1 + change) * rate) for rate in rates_of(ctar)])
    now = throughput(ctar, costs, gamma)
    return {
        "acceptance": throughput(better, costs, gamma) / now,
        "latency": throughput(ctar, costs.with_draft(1 - change), gamma) / now,
    }


@dataclasses.dataclass(frozen=True)
class PartSeconds:
    """Seconds of the parts of a block, each timed separately from the run whose speed they predict.

    Attributes:
      draft_step: one drafted token (the proposal's seconds divided by gamma).
      target_step: the target on one token per row.
      verify: the target on gamma + 1 tokens per row.
      rule: rule and bookkeeping of a block.
      baseline_rule: the same at gamma = 0.
    """

    draft_step: float
    target_step: float
    verify: float
    rule: float
    baseline_rule: float

    def block(self, gamma: int) -> float:
        """Seconds of one speculative block."""
        return gamma * self.draft_step + self.verify + self.rule

    @property
    def baseline(self) -> float:
        """Seconds of one plain token per row."""
        return self.target_step + self.baseline_rule

    def cost_ratio(self) -> float:
        """c of DistillSpec: draft step over target step."""
        return self.draft_step / self.target_step


def predicted_speedup(
    parts: PartSeconds,
    gamma: int,
    *,
    emitted: int,
    iterations: int,
    prefill_seconds: float,
    baseline_emitted: int,
    baseline_iterations: int,
    baseline_prefill_seconds: float,
) -> float:
    """Tokens per second with speculation over tokens per second without, prefill included on both sides."""
    seconds = prefill_seconds + iterations * parts.block(gamma)
    baseline_seconds = baseline_prefill_seconds + baseline_iterations * parts.baseline
    return (emitted / seconds) / (baseline_emitted / baseline_seconds)


def memory_bound_speedup(block_efficiency: float, gamma: int, target_params: int, draft_params: int) -> float:
    """MBSU of arXiv 2403.00858: rho * tau / (gamma + rho), rho = target parameters / draft parameters."""
    ratio = target_params / draft_params
    return ratio * block_efficiency / (gamma + ratio)
