"""What speculation should bring, from measured parts (Decoding Speculative Decoding, arXiv 2402.01528, section 3)."""

import dataclasses


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
