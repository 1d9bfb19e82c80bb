"""The throughput model on numbers that are typed in: no model, no device, the arithmetic alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from specjax.evaluation import throughput
from specjax.runtime.errors import UserError


def run(config: Any, workdir: Path) -> list[dict]:
    """Of each draft throughput by gamma, its best gamma, and the draft step with which it would be level with the best.

    Raises:
      UserError: for numbers that say nothing: no drafts, an acceptance outside 0 .. 1, seconds that are not above 0.
    """
    del workdir
    _refuse(config)
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


def _draft(said: str) -> tuple[str, float, float]:
    """Name, acceptance and milliseconds of "name:acceptance:milliseconds"."""
    name, *numbers = said.rsplit(":", 2)
    try:
        acceptance, step = map(float, numbers)
    except ValueError:
        acceptance, step = -1.0, 0.0
    if not 0 <= acceptance <= 1 or step <= 0:
        raise UserError(
            f'a draft is name:acceptance:milliseconds, such as a:0.72:6.69, the acceptance in 0 .. 1; not "{said}"'
        )
    return name, acceptance, step


def _refuse(config: Any) -> None:
    if not config.drafts:
        raise UserError("drafts is empty; give --config.drafts=name:acceptance:milliseconds, one or more")
    if not config.target_milliseconds or min(config.target_milliseconds) <= 0:
        raise UserError("target_milliseconds are of 1, 2, .. tokens a row, each above 0; give one or more")
    if config.longest < 1:
        raise UserError(f"longest is the largest gamma to look at, 1 or more, not {config.longest}")


def _costs(config: Any, step: float) -> throughput.BlockCosts:
    """Seconds; beyond the numbers of tokens that are given the line of the last two goes on."""
    given = dict(enumerate(each / 1e3 for each in config.target_milliseconds))
    given = given if len(given) > 1 else {0: given[0], 1: given[0]}
    target = throughput.interpolated(given, config.longest)
    rule, shared = config.rule_milliseconds / 1e3, config.shared_milliseconds / 1e3
    if not shared:
        return throughput.Costs(step / 1e3, target, rule)
    return throughput.SharedCosts(shared, step / 1e3, tuple(seconds - shared for seconds in target), rule)


def _at(ctar: Sequence[float], costs: throughput.BlockCosts, gamma: int) -> dict:
    return {
        "gamma": gamma,
        "block_efficiency": throughput.emitted(ctar, gamma),
        "block_milliseconds": 1e3 * costs.block(gamma),
        "tokens_per_second": throughput.throughput(ctar, costs, gamma),
        "speedup": throughput.speedup(ctar, costs, gamma),
        "break_even_acceptance": throughput.break_even_acceptance(costs, gamma),
    }


def _best(name: str, ctar: Sequence[float], costs: throughput.BlockCosts, gamma: int, fastest: float) -> dict:
    """At its best gamma; 0 is plain decoding, where speculation does not pay."""
    row = {"table": "best", "draft": name, **_at(ctar, costs, gamma)}
    more = {"acceptance": None, "latency": None}
    level = None
    if gamma:
        more = throughput.sensitivity(ctar, costs, gamma)
        rest = costs.block(gamma) - gamma * _step(costs)
        level = throughput.parity_draft_step(row["block_efficiency"], gamma, fastest, rest)
    return {
        **row,
        "level_with_the_best_at_milliseconds": None if level is None else 1e3 * level,
        **{f"{what}_10_percent_better": gain for what, gain in more.items()},
    }


def _step(costs: throughput.BlockCosts) -> float:
    """What a drafted token takes that is the draft's own."""
    return costs.adapter if isinstance(costs, throughput.SharedCosts) else costs.draft_step
