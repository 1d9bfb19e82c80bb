"""The notebook's door: load, generate, save.

from specjax import api
target = api.load("path/to/target")
draft = api.load("path/to/draft")
out = api.generate(target, ["def main("], drafter=draft, gamma=4, temperature=1.0, max_new_tokens=64, seed=0)
out.texts, out.stats.block_efficiency
"""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from specjax.decoding import batch, loop, rules
from specjax.decoding.drafters.adaptive import block_costs
from specjax.decoding.drafters.table import ATTACHED, make_drafter
from specjax.decoding.sampling import Sampling
from specjax.hub.adapter import LoadedAdapter
from specjax.hub.adapter import save as save_adapter
from specjax.hub.model import Model, check_pair, load, load_adapter, save
from specjax.reporting import metrics
from specjax.runtime import mesh as meshes
from specjax.runtime.errors import UserError

__all__ = ["Generation", "Model", "Stats", "generate", "load", "load_adapter", "save", "save_adapter"]


@dataclasses.dataclass(frozen=True)
class Stats:
    """Counts of a generation, summed over prompts, and its seconds."""

    counts: metrics.Counts
    seconds: float
    iterations: int

    @property
    def emitted_tokens(self) -> int:
        return int(self.counts.emitted.sum())

    @property
    def target_calls(self) -> int:
        return int(self.counts.target_calls.sum())

    @property
    def block_efficiency(self) -> float:
        """Emitted tokens a target call, 1 .. gamma + 1."""
        return self.emitted_tokens / self.target_calls

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted over drafted tokens; None where nothing was drafted."""
        drafted = int(self.counts.drafted.sum())
        return int(self.counts.accepted.sum()) / drafted if drafted else None

    @property
    def tokens_per_second(self) -> float:
        """Prefill included; the first call of a shape also compiles."""
        return self.emitted_tokens / self.seconds


@dataclasses.dataclass(frozen=True)
class Generation:
    """What `generate` returns: per prompt the text, the emitted ids (prompt not repeated) and their origins.

    `lossy` says that the rule was one: then the texts do not follow the target's law.
    """

    texts: list[str]
    tokens: list[list[int]]
    origins: list[list[str]]
    stats: Stats
    lossy: bool


def generate(
    target: Model,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    drafter: Model | LoadedAdapter | str | None = None,
    gamma: int = 4,
    threshold: float = 0.0,
    adaptive: tuple[float, float] | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    rule: str = "lossless",
    lenience: float = 1.0,
    max_new_tokens: int = 64,
    batch_size: int = 8,
    eos_ids: Sequence[int] | None = None,
    seed: int = 0,
    exit_layer: int = 1,
    skipped: Sequence[int] = (),
    shortest: int = 2,
    longest: int = 4,
    blocks_at_once: int | None = None,
    on_text: Callable[[Generation], None] | None = None,
) -> Generation:
    """Continues prompts, speculatively where there is a drafter; repeated calls of the same shapes do not recompile.

    Args:
      prompts: strings, or lists of token ids.
      drafter: a loaded draft model, an adapter or Medusa heads of the target (`load_adapter`), "ngram" (with
        `shortest`, `longest`), "early_exit" (with `exit_layer`), "skip_layers" (with `skipped`), or None for plain
        decoding.
      gamma: most tokens drafted a block.
      rule: "lossless", "coupled", or a lossy one: "lenient_linear", "lenient_square", "lenient_exp", "typical".
      lenience: of a lossy rule, in (0, 1]; smaller accepts more.
      threshold: a row's block ends behind the first drafted token from whose distribution the draft was less sure than
        this (its largest probability at temperature 1); 0 always drafts gamma. Not for "ngram".
      adaptive: each row drafts as many tokens, up to gamma, as have paid so far, by these costs of a drafted token and
        of verifying it, relative to a plain step; None always drafts gamma.
      eos_ids: ids that end a row; the tokenizer's when None, () for none.
      on_text: called with the text of the current batch so far, after every `blocks_at_once` blocks, and at its end.

    Raises:
      UserError: for settings out of range, empty or too long prompts, ids outside the vocabulary, different
        vocabularies or tokenizers.
    """
    ids = _ids(target, prompts, max_new_tokens, batch_size)
    costs = None if adaptive is None or drafter is None else block_costs(*adaptive, gamma)
    sampling = Sampling.of(temperature, top_k, top_p, lenience=lenience, threshold=threshold, costs=costs)
    stops = {"threshold": threshold, "adaptive": adaptive is not None}
    options = {"exit_layer": exit_layer, "skipped": skipped, "shortest": shortest, "longest": longest, **stops}
    (gamma, proposer), slots = _proposer(target, drafter, gamma, options), batch.prompt_slots(ids)
    capacity = batch.capacity_bucket(target.decoder.text_slots(slots), max_new_tokens, gamma)
    plan = loop.Plan(target.decoder, proposer, _rule(rule, lenience), gamma, capacity, temperature == 0)
    with meshes.use(target.mesh) if target.mesh is not None else contextlib.nullcontext():
        results = batch.decode_all(
            plan,
            target.params,
            drafter.params if isinstance(drafter, Model | LoadedAdapter) else None,
            ids,
            batch_size=min(batch_size, len(ids)),
            slots=slots,
            seed=seed,
            sampling=sampling,
            max_new_tokens=max_new_tokens,
            eos_ids=target.tokenizer.eos_ids if eos_ids is None else tuple(eos_ids),
            put=batch.Placer(target.mesh),
            **_listener(target, plan, blocks_at_once, on_text),
        )
    return _generation(target, plan, results)


def _rule(name: str, lenience: float):
    rule = rules.rule_named(name)
    if lenience != 1 and not rule.lossy:
        lossy = ", ".join(name for name, rule in rules.RULES.items() if rule.lossy)
        raise UserError(f"lenience is {lenience} and the rule {name} is exact; leave lenience at 1, or take {lossy}")
    return rule


def _ids(
    target: Model, prompts: Sequence[str] | Sequence[Sequence[int]], max_new_tokens: int, batch_size: int
) -> list[list[int]]:
    """Token ids of the prompts, checked as the batch's size is."""
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, not {batch_size}")
    ids = [target.tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else list(prompt) for prompt in prompts]
    config = target.decoder.config
    batch.check_prompts(
        ids, vocab_size=config.vocab_size, max_new_tokens=max_new_tokens, max_positions=config.max_positions
    )
    return ids


def _listener(target: Model, plan: loop.Plan, blocks_at_once: int | None, on_text) -> dict[str, Any]:
    """What `batch.decode` needs to tell of a text that grows."""
    if on_text is None:
        return {}
    if blocks_at_once is None or blocks_at_once < 1:
        raise UserError(f"blocks_at_once must be 1 or more for on_text to be called, not {blocks_at_once}")
    tell = lambda result: on_text(_generation(target, plan, [(len(result.tokens), result)]))
    return {"blocks": blocks_at_once, "on_blocks": tell}


def _generation(target: Model, plan: loop.Plan, results: Sequence[tuple[int, batch.BatchResult]]) -> Generation:
    """Joins batches of (rows that count, result)."""
    tokens = [row for count, result in results for row in result.tokens[:count]]
    origins = [row for count, result in results for row in result.origins[:count]]
    return Generation(
        texts=[target.tokenizer.decode(row) for row in tokens],
        tokens=tokens,
        origins=[[loop.ORIGINS[origin] for origin in row] for row in origins],
        stats=Stats(
            counts=metrics.Counts(**batch.join_counts([result.counts(count) for count, result in results])),
            seconds=sum(result.seconds for _, result in results),
            iterations=sum(result.iterations for _, result in results),
        ),
        lossy=plan.rule.lossy and plan.gamma > 0,
    )


def _proposer(
    target: Model, drafter: Model | LoadedAdapter | str | None, gamma: int, options: dict[str, Any]
) -> tuple[int, Any]:
    """The gamma that is meant (0 without a drafter) and the static drafter object."""
    if drafter is None:
        return 0, None
    if isinstance(drafter, Model):
        check_pair(target, drafter)
        return gamma, make_drafter("model", target.decoder, gamma, {**options, "model": drafter.decoder})
    if isinstance(drafter, LoadedAdapter):
        drafter.check(target.fingerprint)
        kind, given = drafter.adapter.drafter, {**options, "adapter": drafter.adapter}
        return gamma, make_drafter(kind, target.decoder, gamma, given)
    if drafter in ATTACHED:
        raise UserError(f'drafter "{drafter}" needs an adapter; give load_adapter(DIRECTORY, target) as the drafter')
    return gamma, make_drafter(drafter, target.decoder, gamma, options)
