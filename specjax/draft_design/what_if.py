"""Applies the throughput model to numbers in the config, without a model or a device."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from specjax.evaluation import throughput
from specjax.runtime.errors import UserError


def run(config: Any, workdir: Path) -> list[dict]:
    """Rows with each draft's throughput by gamma, its best gamma, and the draft step that would match the best draft.

    Raises:
      UserError: if there is no draft, an acceptance is outside 0 .. 1, or a duration is not positive.
    """
    del workdir
    _check(config)
    drafts = {
        name: (throughput.iid(acceptance, config.longest), _costs(config, step))
        for name, acceptance, step in map(_draft, config.drafts)
    }
    best = {name: throughput.best_gamma(ctar, costs) for name, (ctar, costs) in drafts.items()}
    speed = lambda name: throughput.throughput(*drafts[name], best[name])
    winner = max(drafts, key=speed)
    rows = [_best(name, *drafts[name], best[name], speed(winner)) for name in drafts]
    for name, (ctar, costs) in drafts.items():
        for gamma in range(1, config.longest + 1):
            rows.append({"table": "by_gamma", "draft": name, **_at(ctar, costs, gamma)})
    return rows


def _draft(text: str) -> tuple[str, float, float]:
    """Parses "name:acceptance:milliseconds"."""
    name, *numbers = text.rsplit(":", 2)
    try:
        acceptance, step = map(float, numbers)
    except ValueError:
        acceptance, step = -1.0, 0.0
    if not 0 <= acceptance <= 1 or step <= 0:
        raise UserError(
            f'drafts has "{text}"; write name:acceptance:milliseconds with an acceptance in 0 .. 1, such as a:0.72:6.69'
        )
    return name, acceptance, step


def _check(config: Any) -> None:
    if not config.drafts:
        raise UserError("drafts is empty; give --config.drafts=name:acceptance:milliseconds, one or more")
    if not config.target_milliseconds or min(config.target_milliseconds) <= 0:
        raise UserError(
            f"target_milliseconds are {config.target_milliseconds}; set positive milliseconds of 1, 2, .. tokens "
            "per row"
        )
    if config.longest < 1:
        raise UserError(f"longest is {config.longest}; set the largest gamma to consider, at least 1")


def _costs(config: Any, step: float) -> throughput.Costs:
    """Costs in seconds; for more tokens than the config has costs, they are extrapolated from its last two."""
    timed = dict(enumerate(each / 1e3 for each in config.target_milliseconds))
    timed = timed if len(timed) > 1 else {0: timed[0], 1: timed[0]}
    target = throughput.interpolated(timed, config.longest)
    rule, shared = config.rule_milliseconds / 1e3, config.shared_milliseconds / 1e3
    return throughput.Costs(step / 1e3, tuple(seconds - shared for seconds in target), rule, shared)


def _at(ctar: Sequence[float], costs: throughput.Costs, gamma: int) -> dict:
    return {
        "gamma": gamma,
        "block_efficiency": throughput.emitted(ctar, gamma),
        "block_milliseconds": 1e3 * costs.block(gamma),
        "tokens_per_second": throughput.throughput(ctar, costs, gamma),
        "speedup": throughput.speedup(ctar, costs, gamma),
        "break_even_acceptance": throughput.break_even_acceptance(costs, gamma),
    }


def _best(name: str, ctar: Sequence[float], costs: throughput.Costs, gamma: int, fastest: float) -> dict:
    """The row of a draft at its best gamma, which is 0 if plain decoding is faster."""
    row = {"table": "best", "draft": name, **_at(ctar, costs, gamma)}
    gains, parity = {"acceptance": None, "latency": None}, None
    if gamma:
        gains = throughput.sensitivity(ctar, costs, gamma)
        target_seconds = costs.block(gamma) - gamma * costs.draft_step
        parity = throughput.parity_draft_step(row["block_efficiency"], gamma, fastest, target_seconds)
    return {
        **row,
        "level_with_the_best_at_milliseconds": None if parity is None else 1e3 * parity,
        **{f"{part}_10_percent_better": gain for part, gain in gains.items()},
    }
