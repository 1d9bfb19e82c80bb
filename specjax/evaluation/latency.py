"""Times the parts of a block on this device, next to a run that times whole blocks.

Only drafting, and the rule with commit, are timed separately. The target's call is the rest of a block, so no program
but the run's own calls the target: compiling another one would take longer than the timing.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from specjax.decoding import loop
from specjax.decoding.drafters.base import Outcome, Proposal
from specjax.decoding.plan import Plan
from specjax.evaluation.engine import Method
from specjax.evaluation.throughput import PartSeconds
from specjax.models import kv_cache
from specjax.reporting import metrics
from specjax.runtime import processes
from specjax.runtime.dtypes import dtype_named
from specjax.runtime.timing import timed

# Timings of each part per round, number of rules in one timing, and largest number of rounds.
_REPEATS, _RULES, _ROUNDS = 4, 4, 6
# Rounds end when they have taken this share of the run's seconds, or when the intervals of drafting and rule are at
# most this share of a plain step wide, on either side.
_SHARE, _NARROW = 0.1, 0.01
# Proposals in one timing on an accelerator, where one alone would wait for its own launch, unlike in a block.
_PROPOSALS = 8
# Blocks in one timing of whole blocks, if the cache has room for them.
_BLOCKS = 8


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of a run's mean context length, for which blocks and their parts are timed.

    Attributes:
      tokens: right-padded prompts.
      lengths: number of tokens of each prompt.
      row_keys: random keys.
      limits: limits that no row reaches, with as many `eos_ids` as the run's, so that the run's programs serve.
      decoded: number of tokens in the caches after the prompt; their values do not matter.
      length: number of tokens of each text.
    """

    tokens: Int[Array, "B P"]
    lengths: Int[Array, "B"]
    row_keys: Key[Array, "B"]
    limits: loop.Limits
    decoded: int
    length: int

    def state(self, method: Method) -> loop.DecodeState:
        """The state after the prefill and `decoded` tokens."""
        arrays = self.tokens, self.lengths, self.row_keys
        return self.again(loop.prefill(method.plan, method.params, method.draft_params, *arrays))

    def again(self, state: loop.DecodeState) -> loop.DecodeState:
        """A state whose blocks are dropped, so that it has its first lengths."""
        return dataclasses.replace(state, lengths=state.prompt_lengths + self.decoded)

    def run(self, method: Method, state: loop.DecodeState, blocks: int) -> loop.DecodeState:
        """The state after some blocks, by the run's own program."""
        limits = dataclasses.replace(self.limits, iterations=state.iterations + blocks)
        return loop.run(method.plan, method.params, method.draft_params, state, method.sampling, limits)


def block_timer(method: Method, rows: Rows) -> Callable[[], tuple[float, int]]:
    """Runs some blocks, which compiles if the run did not, and returns a timer: (seconds, number of blocks)."""
    blocks = max(1, min(_BLOCKS, (method.plan.capacity - rows.length) // (method.plan.gamma + 1)))
    state = rows.run(method, rows.state(method), blocks)

    def timer() -> tuple[float, int]:
        nonlocal state
        state, seconds, _ = timed(lambda: rows.run(method, rows.again(state), blocks))
        return seconds, blocks

    return timer


def forced_block_seconds(method: Method, rows: Rows) -> list[float]:
    """Seconds of a block in which every row drafts k tokens, k = 0 .. gamma, for an adaptive drafter.

    A number is forced by infinite costs of all others, which are traced, so the run's own program serves.
    """

    def forced(drafted: int) -> Callable[[], tuple[float, int]]:
        costs = jnp.full((method.plan.gamma + 1,), jnp.inf).at[drafted].set(1.0)
        sampling = dataclasses.replace(method.sampling, block_costs=costs)
        return block_timer(dataclasses.replace(method, sampling=sampling), rows)

    timers = [forced(drafted) for drafted in range(method.plan.gamma + 1)]
    rounds = [[seconds / blocks for seconds, blocks in (timer() for timer in timers)] for _ in range(3)]
    return np.min(rounds, axis=0).tolist()  # what else the machine does only adds to them


@functools.partial(jax.jit, static_argnums=(0, 9), donate_argnums=3)
def _repeat(plan, params, draft_params, state, example, sampling, limits, proposals, rules, prefix):
    """Runs `proposals` times the drafter, then `rules` times rule and commit on `example`, always at the same lengths.

    Each repetition depends on the previous one; otherwise the compiler would hoist it.
    """
    proposal, logits, taps = example

    def propose(_, state):
        drafted, state = loop.propose(plan, params, draft_params, state, sampling)
        if plan.drafter.taps:  # drafts from the target's states, which the target's call would have changed
            drift = 1e-9 * jnp.sum(drafted.tokens).astype(jnp.float32)
            moved = jax.tree.map(lambda tap: (tap + drift).astype(tap.dtype), taps)
            one = jnp.ones_like(state.lengths)
            outcome = Outcome(jnp.pad(drafted.tokens, ((0, 0), (0, 1))), one, 0 * one, state.lengths, moved)
            drafter_state = plan.drafter.commit(draft_params, state.drafter_state, outcome)
            state = dataclasses.replace(state, drafter_state=drafter_state)
        tokens = kv_cache.write_rows(state.tokens, drafted.tokens[:, -1:], state.lengths - 1, axis=1)
        return dataclasses.replace(state, tokens=tokens)

    def rule(_, state):
        moved = logits + 1e-6 * state.iterations.astype(jnp.float32)
        after = loop.accept_and_commit(plan, draft_params, state, proposal, moved, taps, sampling, limits)
        return dataclasses.replace(after, done=state.done, lengths=state.lengths)

    after = kv_cache.shortened(state, prefix)
    if plan.gamma:
        after = jax.lax.fori_loop(0, proposals, propose, after)
    return kv_cache.restored(state, jax.lax.fori_loop(0, rules, rule, after))


@dataclasses.dataclass(frozen=True)
class _Timings:
    """Seconds of drafting and of rule with commit in a block, each measured several times."""

    drafting: list[float] = dataclasses.field(default_factory=list)
    rule: list[float] = dataclasses.field(default_factory=list)

    def width(self) -> float:
        """Half the width of the 95% interval of the two together; infinite before two rounds."""
        both = np.add(self.drafting, self.rule)
        return 1.96 * float(both.std(ddof=1)) / len(both) ** 0.5 if len(both) > _REPEATS else float("inf")


class PartsMeter:
    """Times drafting and rules of plain decoding and of several methods, in rounds that can be spread over a run.

    In a block the target's call drives the draft's weights out of the processor's cache. So on CPU a plain step
    precedes every timed draft. On an accelerator several drafts are timed in one dispatch, as it launches them ahead of
    time in a block. The seconds of a dispatch without work are subtracted.
    """

    def __init__(self, plain: Method, speculative: Sequence[Method], rows: Rows) -> None:
        self._plain, self._rows = plain, rows
        self._methods = {method.plan: method for method in (plain, *speculative)}
        self._timings = {plan: _Timings() for plan in self._methods}
        self._steps: list[float] = []
        self._spent, self.rounds = 0.0, 0

    def keep_up(self, seconds: float) -> None:
        """Runs rounds until enough are done for a run that has taken `seconds` so far; at least one."""
        while processes.from_first(np.asarray(self._wanted(seconds))):
            started = time.perf_counter()
            self._round()
            self._spent += time.perf_counter() - started
            self.rounds += 1

    def _wanted(self, seconds: float) -> bool:
        if not self.rounds:
            return True
        widest = max(timings.width() for timings in self._timings.values())
        narrow = widest <= _NARROW * float(np.median(self._steps))
        return self.rounds < _ROUNDS and not narrow and self._spent < _SHARE * seconds

    def _round(self) -> None:
        step = self._rows.state(self._plain)
        for method in self._methods.values():
            step = self._time(method, step)

    def _time(self, method: Method, step: loop.DecodeState) -> loop.DecodeState:
        """Adds a round of this method to its timings; `step` is a state of plain decoding, before and after."""
        rows, state = self._rows, self._rows.state(method)
        example = _example(method, state)
        call = lambda state, proposals, rules: _repeat(
            method.plan,
            method.params,
            method.draft_params,
            state,
            example,
            method.sampling,
            rows.limits,
            jnp.int32(proposals),
            jnp.int32(rules),
            loop.prefix_for(method.plan, state),
        )
        state = jax.block_until_ready(call(state, 1, 1))  # compiles
        step = jax.block_until_ready(rows.run(self._plain, step, 1))
        timings = self._timings[method.plan]
        proposals = 1 if jax.default_backend() == "cpu" else _PROPOSALS
        for _ in range(_REPEATS):
            step, seconds, _ = timed(lambda step=step: rows.run(self._plain, rows.again(step), 1))
            self._steps.append(seconds)
            state, drafting, _ = timed(lambda state=state: call(state, proposals, 0))
            state, idle, _ = timed(lambda state=state: call(state, 0, 0))
            state, rule, _ = timed(lambda state=state: call(state, 0, _RULES))
            timings.drafting.append((drafting - idle) / proposals if method.plan.gamma else 0.0)
            timings.rule.append((rule - idle) / _RULES)
        return step

    def time_blocks(self) -> list[list[tuple[float, int]]]:
        """(seconds, number of blocks) of several rounds for each method, plain decoding first, if no run times them."""
        timers = [block_timer(method, self._rows) for method in self._methods.values()]
        return [list(pairs) for pairs in zip(*([timer() for timer in timers] for _ in range(_ROUNDS)), strict=True)]

    def parts(
        self, plan: Plan, blocks: Sequence[tuple[float, int]], plain: Sequence[tuple[float, int]], seed: int
    ) -> PartSeconds:
        """The seconds of the parts of a block, with bootstrap intervals over batches and over timings.

        Args:
          plan: the plan of one of the methods.
          blocks: (seconds, number of blocks) of each batch that was decoded with it.
          plain: the same of plain decoding.
        """
        per_block = lambda pairs: pairs[..., 0].sum(-1) / pairs[..., 1].sum(-1)
        median = functools.partial(np.median, axis=-1)
        timings, others = self._timings[plan], self._timings[self._plain.plan]
        drafting, rule, baseline_rule = (
            np.maximum(_resampled(values, median, seed), 0) for values in (timings.drafting, timings.rule, others.rule)
        )
        samples = {
            "draft_step": drafting / plan.gamma,
            "target_step": np.maximum(_resampled(plain, per_block, seed) - baseline_rule, 0),
            "verify": np.maximum(_resampled(blocks, per_block, seed) - drafting - rule, 0),
            "rule": rule,
            "baseline_rule": baseline_rule,
        }
        values = {name: float(sample[0]) for name, sample in samples.items()}
        return PartSeconds(**values, intervals={name: metrics.interval(x[1:]) for name, x in samples.items()})


def _resampled(values: Sequence[Any], statistic: Callable, seed: int) -> Float[np.ndarray, " resamples_plus_1"]:
    """A statistic of the values, then of each bootstrap resample (NaN if there are fewer than two values)."""
    values = np.asarray(values, float)
    draws = np.random.default_rng(seed).integers(0, len(values), (metrics.RESAMPLES, len(values)))
    again = values[draws] if len(values) > 1 else np.full((metrics.RESAMPLES, *values.shape), np.nan)
    return np.concatenate([statistic(values[None]), statistic(again)])


def _example(method: Method, state: loop.DecodeState) -> tuple[Proposal, jax.Array, tuple[jax.Array, ...]]:
    """A proposal of gamma tokens, logits and tapped states with random values, on which a rule takes as long."""
    plan, structures = method.plan, []

    def leaves():
        drafted = loop.propose(plan, method.params, method.draft_params, state, method.sampling)[0]
        # `eval_shape` cannot build a Proposal of shapes, so only its leaves pass through it.
        structures.append(jax.tree.structure(drafted))
        return jax.tree.leaves(drafted)

    draws = np.random.default_rng(0)

    def drawn(shape, dtype):
        floating = jnp.issubdtype(dtype, jnp.floating)
        return jnp.asarray(draws.standard_normal(shape, np.float32) if floating else np.zeros(shape), dtype)

    arrays = [drawn(leaf.shape, leaf.dtype) for leaf in jax.eval_shape(leaves)]
    proposal = jax.tree.unflatten(structures[0], arrays)
    probs = None if proposal.probs is None else jax.nn.softmax(proposal.probs)
    full = jnp.full_like(proposal.num_drafted, plan.gamma)
    config, block = plan.target.config, (*proposal.num_drafted.shape, plan.gamma + 1)
    above = [tap for tap in (plan.drafter.taps if plan.drafter else ()) if tap > proposal.resume_layer]
    taps = tuple(drawn((*block, config.width), dtype_named(config.compute_dtype)) for _ in above)
    return (
        dataclasses.replace(proposal, probs=probs, num_drafted=full),
        drawn((*block, plan.target.vocab_size), jnp.float32),
        taps,
    )
