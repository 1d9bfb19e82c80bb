"""Seconds of each part of a block and of single steps, on this device, at a given context: loops, not lone dispatches.

Every loop feeds each step what the last one chose, or the compiler would hoist it or drop it.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax.decoding import loop, rules
from specjax.decoding.drafters.base import Outcome, Proposal
from specjax.decoding.sampling import Noise, Sampling
from specjax.evaluation.throughput import Parts
from specjax.models import kv_cache
from specjax.models.language_model import LanguageModel
from specjax.runtime.timing import progress

_STEPS = 16
_ROUNDS = 15
_COST_ROUNDS = 3


def _noise(plan: loop.Plan, state: loop.DecodeState) -> Noise:
    return Noise(state.row_keys, state.lengths, plan.greedy, plan.rule.shared_noise)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _draft_and_verify_loop(plan, params, draft_params, state, sampling):
    """A proposal and a target call, one pair after another from the same committed text.

    The draft alone would keep its weights in the processor's cache; behind a target call, as in a real block, it
    has to fetch them again. Its seconds are those of the pair less those of the target call.
    """

    def step(_, state):
        proposal, state = loop.propose(plan, params, draft_params, state, _noise(plan, state), sampling)
        pending = jnp.take_along_axis(state.tokens, state.lengths[:, None] - 1, axis=1)[:, 0]
        logits, cache, taps = loop.verify(plan, params, state.target_cache, pending, state.lengths, proposal)
        if plan.drafter.taps:  # a draft that is made of them would otherwise be the same in every turn, and made once
            one = jnp.ones_like(state.lengths)
            outcome = Outcome(jnp.pad(proposal.tokens, ((0, 0), (0, 1))), one, 0 * one, state.lengths, taps)
            drafter_state = plan.drafter.commit(draft_params, state.drafter_state, outcome)
            state = dataclasses.replace(state, drafter_state=drafter_state)
        # The next pair starts from what this one chose, or the compiler would hoist or drop it.
        chosen = jnp.sum(jnp.argmax(logits, axis=-1).astype(jnp.int32), axis=1)
        following = (chosen % plan.target.vocab_size)[:, None]
        tokens = kv_cache.write_rows(state.tokens, following, state.lengths - 1, axis=1)
        return dataclasses.replace(state, tokens=tokens, target_cache=cache)

    return jax.lax.fori_loop(0, _STEPS, step, state)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _verify_loop(plan, params, state, proposal):
    """Target calls one after another; the next pending token is the last call's most probable one."""

    def step(_, carry):
        cache, pending, total = carry
        moved = proposal
        if proposal.resume_hidden is not None:  # hidden states that never change would be projected once for all
            drift = 1e-9 * total.astype(proposal.resume_hidden.dtype)
            moved = dataclasses.replace(proposal, resume_hidden=proposal.resume_hidden + drift)
        logits, cache, _ = loop.verify(plan, params, cache, pending, state.lengths, moved)
        # Every row of logits is used, or the compiler would compute only the first.
        chosen = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return cache, chosen[:, 0], jnp.sum(chosen)

    pending = jnp.zeros_like(state.lengths)
    return jax.lax.fori_loop(0, _STEPS, step, (state.target_cache, pending, jnp.int32(0)))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _rule_loop(plan, draft_params, state, proposal, logits, taps, sampling, limits):
    """The rule and the commit on the same logits, moved a little by what the last step emitted."""

    def step(_, state):
        moved = logits + 1e-6 * jnp.sum(state.lengths).astype(jnp.float32)
        noise = _noise(plan, state)
        state_after = loop.accept_and_commit(plan, draft_params, state, proposal, moved, taps, noise, sampling, limits)
        return dataclasses.replace(state_after, done=state.done)

    return jax.lax.fori_loop(0, _STEPS, step, state)


@dataclasses.dataclass(frozen=True)
class Step:
    """A model on `tokens` tokens a row, `steps` times in one dispatch.

    Attributes:
      model: whose weights may be random: nothing here depends on what it says.
      tokens: of each row in a call: 1 is a step of decoding, gamma + 1 a verification.
      batch: rows.
      context: tokens that a row has, the first of the call included.
      capacity: slots of the cache.
      steps: of one dispatch; 1 is a lone dispatch, to and from the host for every step.
    """

    model: LanguageModel
    tokens: int
    batch: int
    context: int
    capacity: int
    steps: int


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _steps(step: Step, params, cache, tokens, start):
    """The same positions again and again; the next tokens are the last argmaxes."""
    positions = start[:, None] + jnp.arange(step.tokens, dtype=jnp.int32)[None]

    def once(_, carry):
        cache, tokens = carry
        hidden, cache = step.model.extend(params, cache, tokens, positions)
        return cache, jnp.argmax(step.model.head(params, hidden), axis=-1).astype(jnp.int32)

    return jax.lax.fori_loop(0, step.steps, once, (cache, tokens))


def step_case(step: Step, params: Any) -> tuple[Callable, Callable]:
    """(make the inputs, run) for `timing.in_turns`; seconds are those of `step.steps` steps.

    What the cache holds is no matter; the context must fit its capacity.
    """
    tokens = jnp.zeros((step.batch, step.tokens), jnp.int32)
    start = jnp.full((step.batch,), step.context - 1, jnp.int32)
    fresh = lambda: step.model.start(params, tokens, start, step.capacity)
    return fresh, lambda cache: _steps(step, params, cache, tokens, start)


Timer = Callable[[], float]


def _timer(fresh: Callable[[], Any], run: Callable[[Any], Any]) -> Timer:
    """Times `run` on inputs of its own: seconds a step."""

    def seconds() -> float:
        inputs = jax.block_until_ready(fresh())
        started = time.perf_counter()
        jax.block_until_ready(run(inputs))
        return (time.perf_counter() - started) / _STEPS

    return seconds


def timers(
    plan: loop.Plan, params: Any, draft_params: Any, tokens, lengths, row_keys, sampling: Sampling, *, behind: int
) -> dict[str, Timer]:
    """What to time of one plan at the context `lengths`: seconds a block of each part.

    Args:
      tokens: `[B, P]` prompts; of a decoder-only model with half of what is to be emitted: the mean context.
      behind: tokens that stand in the caches besides (of an encoder-decoder, half of what is to be emitted).

    Returns:
      "verify", "rule", and where there is a draft "propose_and_verify".
    """
    limits = loop.Limits(jnp.full_like(lengths, 2**30), jnp.full((1,), -1, jnp.int32))

    def fresh():
        state = loop.prefill(plan, params, draft_params, tokens, lengths, row_keys)
        return dataclasses.replace(state, lengths=state.lengths + behind)

    proposal, logits, taps = _example(plan, params, draft_params, fresh(), sampling)
    rule = lambda state: _rule_loop(plan, draft_params, state, proposal, logits, taps, sampling, limits)
    # A target call is the same under every rule and temperature: one compiled loop serves them all.
    any_rule = dataclasses.replace(plan, rule=rules.rule_named("lossless"), greedy=True)
    made = {
        "verify": _timer(fresh, lambda state: _verify_loop(any_rule, params, state, proposal)),
        "rule": _timer(fresh, rule),
    }
    if plan.gamma:
        pair = lambda state: _draft_and_verify_loop(plan, params, draft_params, state, sampling)
        made["propose_and_verify"] = _timer(fresh, pair)
    return made


class PartsMeter:
    """Times the parts of several speculative plans beside plain decoding, round by round.

    Every round times all of them, one after another: a slow second of the machine then spoils one round of a few, and a
    slow minute one round of all. Rounds may be spread over a run that the parts are to predict.

    Attributes:
      rounds: seconds of each part of each plan, round by round.
    """

    def __init__(self, plain: dict[str, Timer], speculative: Sequence[dict[str, Timer]], gammas: Sequence[int]) -> None:
        """Compiles what is to be timed.

        Args:
          plain: `timers` of plain decoding; `speculative` of each other plan, `gammas` its draft length, 1 or more.
        """
        self._timed, self._gammas, self.rounds = (plain, *speculative), gammas, []
        for timers in progress(self._timed, description="parts: compile", unit="case"):
            _once(timers)

    def keep_up(self, share: float) -> None:
        """Makes rounds until this share of them has been made."""
        while len(self.rounds) < round(share * _ROUNDS):
            self.rounds.append([_once(timers) for timers in self._timed])

    def parts(self) -> list[Parts]:
        """Of each speculative plan: medians over the rounds, in seconds."""
        median = lambda index, of: statistics.median(of(times[index]) for times in self.rounds)
        draft = lambda times: times["propose_and_verify"] - times["verify"]
        return [
            Parts(
                draft_step=max(median(index, draft), 0.0) / gamma,
                target_step=median(0, lambda times: times["verify"]),
                verify=median(index, lambda times: times["verify"]),
                rule=median(index, lambda times: times["rule"]),
                baseline_rule=median(0, lambda times: times["rule"]),
            )
            for index, gamma in enumerate(self._gammas, 1)
        ]


def _once(timers: dict[str, Timer]) -> dict[str, float]:
    return {name: timer() for name, timer in timers.items()}


def block_seconds(
    plan: loop.Plan, params: Any, draft_params: Any, tokens, lengths, row_keys, sampling: Sampling, *, behind: int
) -> list[float]:
    """Seconds of blocks in which every row drafts 0 .. gamma tokens, of a plan whose draft length adapts.

    One executable runs them all: costs that are endless but for one length leave no other to be picked. Arguments as of
    `timers`.
    """

    def forced(drafted: int) -> dict[str, Timer]:
        costs = jnp.full((plan.gamma + 1,), jnp.inf).at[drafted].set(1.0)
        weighed = dataclasses.replace(sampling, costs=costs)
        return timers(plan, params, draft_params, tokens, lengths, row_keys, weighed, behind=behind)

    timed = [forced(drafted) for drafted in range(plan.gamma + 1)]
    seconds = [[every["propose_and_verify"]() + every["rule"]() for every in timed] for _ in range(_COST_ROUNDS + 1)]
    return [statistics.median(times) for times in zip(*seconds[1:], strict=True)]


def _example(plan, params, draft_params, state, sampling) -> tuple[Proposal, jax.Array, tuple[jax.Array, ...]]:
    """A full proposal, the target's logits for it and its tapped states, drawn at random.

    The time that a target call and a rule take does not depend on what these say, and compiling a draft only to have
    real ones took longer than timing it.
    """

    structures = []

    def leaves():
        proposal, after = loop.propose(plan, params, draft_params, state, _noise(plan, state), sampling)
        logits, _, taps = loop.verify(plan, params, after.target_cache, state.lengths, state.lengths, proposal)
        # A Proposal holds arrays, not their shapes: what it is made of goes through `eval_shape`.
        structures.append(jax.tree.structure((proposal, logits, taps)))
        return jax.tree.leaves((proposal, logits, taps))

    draws = np.random.default_rng(0)

    def drawn(leaf):
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        return jnp.asarray(draws.standard_normal(leaf.shape) if floating else np.zeros(leaf.shape), leaf.dtype)

    arrays = [drawn(leaf) for leaf in jax.eval_shape(leaves)]
    proposal, logits, taps = jax.tree.unflatten(structures[0], arrays)
    probs = None if proposal.probs is None else jax.nn.softmax(proposal.probs)
    full = jnp.full_like(proposal.num_drafted, plan.gamma)
    return dataclasses.replace(proposal, probs=probs, num_drafted=full), logits, taps
