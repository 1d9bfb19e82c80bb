"""What speculation should bring, from parts and acceptance ("Decoding Speculative Decoding", arXiv 2402.01528).

    throughput(gamma) = emitted(gamma) / (gamma * draft step + target(gamma + 1 tokens) + rule)

Acceptance enters in one form, `ctar`: at index w - 1 the chance that w drafted tokens in a row stand, w = 1 .. gamma
(Kangaroo's CTAR, arXiv 2404.18911), so that a block emits 1 + sum(ctar) tokens on average. `iid`, `by_position` and
`of_histogram` make it of what is known. Cut to its first g entries it serves a smaller gamma, which takes blocks to
begin anywhere in the text: nearly true, and exact where positions are alike.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

# Halvings of [0, 1] that leave less than a float32 tells apart.
_BISECTIONS = 40


def iid(acceptance: float, gamma: int) -> tuple[float, ...]:
    """`ctar` where every drafted token stands with the same chance: acceptance ** w (arXiv 2211.17192)."""
    return tuple(acceptance**w for w in range(1, gamma + 1))


def by_position(rates: Sequence[float | None]) -> tuple[float, ...]:
    """`ctar` from the chance that position i stands once all before it did (`acceptance_by_position`).

    None is of a position that no block came to.
    """
    return tuple(float(x) for x in np.cumprod([rate or 0.0 for rate in rates]))


def of_histogram(blocks: Sequence[int]) -> tuple[float, ...]:
    """`ctar` from how many blocks had 0, 1, .. gamma accepted tokens."""
    counts = np.asarray(blocks, float)
    return tuple(float(x) for x in (counts.sum() - np.cumsum(counts)[:-1]) / counts.sum())


def rates_of(ctar: Sequence[float]) -> tuple[float, ...]:
    """The inverse of `by_position`; 0 behind a position that never stands."""
    before = (1.0, *ctar)
    return tuple(now / last if last else 0.0 for now, last in zip(ctar, before, strict=False))


def emitted(ctar: Sequence[float], gamma: int) -> float:
    """Expected tokens of a block, the recovered or bonus token included: TAR, block efficiency, compression rate."""
    return 1.0 + float(sum(_upto(ctar, gamma)))


def _upto(values: Sequence[float], gamma: int) -> Sequence[float]:
    if not 0 <= gamma <= len(values):
        raise ValueError(f"gamma {gamma} is beyond the {len(values)} positions of which the acceptance is known")
    return values[:gamma]


def drafted_law(stop: float, gamma: int) -> tuple[float, ...]:
    """The chance that a block drafts k tokens, at index k, where it ends behind each with chance `stop`, at most gamma.

    The unsure token itself is kept and verified (arXiv 2404.18911, section 3.2), so a block drafts one at least.
    """
    if gamma == 0:
        return (1.0,)
    goes_on = 1.0 - stop
    return (0.0, *(goes_on ** (k - 1) * stop for k in range(1, gamma)), goes_on ** (gamma - 1))


@dataclasses.dataclass(frozen=True)
class Costs:
    """Seconds of the parts of a block with a draft of its own.

    Attributes:
      draft_step: one drafted token.
      verify: the target on k + 1 tokens a row, at index k; at 0 its plain step.
      rule: rule and bookkeeping of a block.
      stop: the chance that a block ends behind a drafted token, see `drafted_law`.
    """

    draft_step: float
    verify: tuple[float, ...]
    rule: float = 0.0
    stop: float = 0.0

    def block(self, gamma: int) -> float:
        """Expected seconds of a block that drafts at most gamma tokens; of gamma 0, a step of plain decoding."""
        seconds = (k * self.draft_step + _at(self.verify, k) for k in range(gamma + 1))
        return _expected(seconds, self.stop, gamma) + self.rule

    def with_draft(self, factor: float) -> "Costs":
        """The same with a draft that takes `factor` times as long."""
        return dataclasses.replace(self, draft_step=factor * self.draft_step)


@dataclasses.dataclass(frozen=True)
class SharedCosts:
    """Seconds of the parts of a block where the draft is the target's first layers (Kangaroo, arXiv 2404.18911).

    Those layers run on each token once, for the draft and the verification together, on the pending token and on every
    drafted one, the last included:

        block(k drafted) = (k + 1) * shallow + k * adapter + deep(k + 1 tokens) + rule

    Attributes:
      shallow: the first layers on one token.
      adapter: what else a drafted token takes: adapter, norm and head.
      deep: the other layers and the head on k + 1 tokens a row, at index k.
      rule: rule and bookkeeping of a block.
      stop: the chance that a block ends behind a drafted token, see `drafted_law`.
    """

    shallow: float
    adapter: float
    deep: tuple[float, ...]
    rule: float = 0.0
    stop: float = 0.0

    def block(self, gamma: int) -> float:
        """As `Costs.block`."""
        seconds = ((k + 1) * self.shallow + k * self.adapter + _at(self.deep, k) for k in range(gamma + 1))
        return _expected(seconds, self.stop, gamma) + self.rule

    def with_draft(self, factor: float) -> "SharedCosts":
        """Only the adapter is the draft's own: the layers that it shares are the target's."""
        return dataclasses.replace(self, adapter=factor * self.adapter)


BlockCosts = Costs | SharedCosts


def _at(seconds: Sequence[float], drafted: int) -> float:
    if drafted >= len(seconds):
        raise ValueError(f"the target's seconds on {drafted + 1} tokens are not among the {len(seconds)} given")
    return seconds[drafted]


def _expected(seconds, stop: float, gamma: int) -> float:
    return float(sum(chance * each for chance, each in zip(drafted_law(stop, gamma), seconds, strict=True)))


def interpolated(measured: Mapping[int, float], longest: int) -> tuple[float, ...]:
    """Seconds at 0 .. longest drafted tokens from those measured at some; beyond the last one the line goes on."""
    at = sorted(measured)
    if at[0] != 0 or len(at) < 2:
        raise ValueError(f"seconds are needed at 0 drafted tokens and at one more number of them, not at {at}")
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
    """Expected blocks until every row of a batch has its tokens: the maximum over rows, each with its own `ctar`.

    Exact where the blocks of a row are independent and alike: P(all rows done after r blocks) is the product over
    rows of P(r blocks emit enough).

    Args:
      tokens: that each row emits, or all of them.
    """
    wanted = [tokens] * len(ctars) if isinstance(tokens, int) else list(tokens)
    running = np.zeros((len(ctars), max(wanted, default=0)))
    for row, (ctar, count) in enumerate(zip(ctars, wanted, strict=True)):
        running[row, :count] = _still_running(ctar, count)
    return float(np.sum(1.0 - np.prod(1.0 - running, axis=0)))


def _still_running(ctar: Sequence[float], tokens: int) -> np.ndarray:
    """The chance that r blocks have emitted fewer than `tokens`, r = 0 .. tokens - 1 (each emits one at least)."""
    emits = -np.diff((1.0, *ctar, 0.0))  # of 1, 2, .. gamma + 1 tokens
    short = np.zeros(tokens)  # the chance of each number of tokens so far, below the wanted one
    short[:1] = 1.0
    chances = np.zeros(tokens)
    for r in range(tokens):
        chances[r] = short.sum()
        short = np.convolve(short, np.concatenate([[0.0], emits]))[:tokens]
    return chances


def batch_throughput(ctars: Sequence[Sequence[float]], costs: BlockCosts, gamma: int, tokens: int) -> float:
    """Tokens per second of a batch in which every row emits `tokens`; it runs as long as its slowest row.

    Args:
      ctars: of each row.
      costs: of a block of the whole batch.
    """
    rounds = expected_rounds([_upto(ctar, gamma) for ctar in ctars], tokens)
    return len(ctars) * tokens / (rounds * costs.block(gamma))


def best_gamma(ctar: Sequence[float], costs: BlockCosts, longest: int | None = None) -> int:
    """The gamma of the highest throughput, 0 .. longest; 0 says that speculation does not pay."""
    longest = len(ctar) if longest is None else longest
    return max(range(longest + 1), key=lambda gamma: throughput(ctar, costs, gamma))


def break_even_emitted(costs: BlockCosts, gamma: int) -> float:
    """Tokens a block has to emit to be as fast as plain decoding; beyond gamma + 1 it never is."""
    return costs.block(gamma) / costs.block(0)


def break_even_acceptance(costs: BlockCosts, gamma: int) -> float | None:
    """The i.i.d. acceptance at which speculation is as fast as plain decoding; None where no acceptance is enough."""
    needed = break_even_emitted(costs, gamma)
    if needed > gamma + 1:
        return None
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if emitted(iid(middle, gamma), gamma) >= needed else (middle, high)
    return high


def parity_draft_step(block_efficiency: float, gamma: int, throughput: float, target_seconds: float) -> float | None:
    """Seconds of a draft step at which a draft of this block efficiency has `throughput`, that of another draft.

    `(TAR_A / throughput_B - t_target) / gamma`; None where not even a draft that takes no time would do.

    Args:
      target_seconds: of a verification, rule included.
    """
    seconds = (block_efficiency / throughput - target_seconds) / gamma
    return seconds if seconds > 0 else None


def sensitivity(ctar: Sequence[float], costs: BlockCosts, gamma: int, change: float = 0.1) -> dict[str, float]:
    """What a better draft would bring at this gamma: throughput over today's.

    Returns:
      "acceptance": with the acceptance of every position `change` higher (a share of it; 1 at most);
      "latency": with a draft that takes `change` less time.
    """
    better = by_position([min(1.0, (1 + change) * rate) for rate in rates_of(ctar)])
    now = throughput(ctar, costs, gamma)
    return {
        "acceptance": throughput(better, costs, gamma) / now,
        "latency": throughput(ctar, costs.with_draft(1 - change), gamma) / now,
    }


@dataclasses.dataclass(frozen=True)
class Parts:
    """Seconds of the parts of a block, each measured apart from the run that they predict.

    Attributes:
      draft_step: one drafted token (the whole proposal divided by gamma).
      target_step: the target on one token a row.
      verify: the target on gamma + 1 tokens a row.
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
        """Seconds of one plain token a row."""
        return self.target_step + self.baseline_rule

    def cost_ratio(self) -> float:
        """c of DistillSpec: draft step over target step."""
        return self.draft_step / self.target_step


def predicted_speedup(
    parts: Parts,
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
