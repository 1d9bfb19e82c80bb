"""Times the parts of a block, and single steps of a model, on this device at a given context length.

The timed code runs many times in one compiled loop, because a single dispatch can take longer than a step. Each
iteration depends on the result of the previous one; otherwise the compiler would hoist or remove it.
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
from specjax.decoding.plan import Plan
from specjax.decoding.sampling import Noise
from specjax.evaluation.engine import Method
from specjax.evaluation.throughput import PartSeconds
from specjax.models import kv_cache
from specjax.models.language_model import LanguageModel
from specjax.runtime.timing import progress

_STEPS = 16
_ROUNDS = 15
_COST_ROUNDS = 3


def _noise(plan: Plan, state: loop.DecodeState) -> Noise:
    return Noise(state.row_keys, state.lengths, plan.greedy, plan.rule.shared_noise)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _draft_and_verify_loop(plan, params, draft_params, state, sampling):
    """Repeats a proposal followed by a target call, always from the same committed text.

    Timed alone, a draft would keep its weights in the processor's cache; in a real block the target call evicts them.
    The draft's seconds are those of the pair minus those of the target call.
    """

    def step(_, state):
        proposal, state = loop.propose(plan, params, draft_params, state, _noise(plan, state), sampling)
        pending = jnp.take_along_axis(state.tokens, state.lengths[:, None] - 1, axis=1)[:, 0]
        logits, cache, taps = loop.verify(plan, params, state.target_cache, pending, state.lengths, proposal)
        if plan.drafter.taps:  # commit new tapped states, otherwise the draft would be constant and hoisted
            one = jnp.ones_like(state.lengths)
            outcome = Outcome(jnp.pad(proposal.tokens, ((0, 0), (0, 1))), one, 0 * one, state.lengths, taps)
            drafter_state = plan.drafter.commit(draft_params, state.drafter_state, outcome)
            state = dataclasses.replace(state, drafter_state=drafter_state)
        # The next pair starts from the token that this one chose.
        chosen = jnp.sum(jnp.argmax(logits, axis=-1).astype(jnp.int32), axis=1)
        following = (chosen % plan.target.vocab_size)[:, None]
        tokens = kv_cache.write_rows(state.tokens, following, state.lengths - 1, axis=1)
        return dataclasses.replace(state, tokens=tokens, target_cache=cache)

    return jax.lax.fori_loop(0, _STEPS, step, state)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _verify_loop(plan, params, state, proposal):
    """Repeats the target call; the pending token is the most probable token of the previous call."""

    def step(_, carry):
        cache, pending, total = carry
        moved = proposal
        if proposal.resume_hidden is not None:  # constant hidden states would be projected only once
            drift = 1e-9 * total.astype(proposal.resume_hidden.dtype)
            moved = dataclasses.replace(proposal, resume_hidden=proposal.resume_hidden + drift)
        logits, cache, _ = loop.verify(plan, params, cache, pending, state.lengths, moved)
        # Use the logits of every position; otherwise the compiler would compute only the first.
        chosen = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return cache, chosen[:, 0], jnp.sum(chosen)

    pending = jnp.zeros_like(state.lengths)
    return jax.lax.fori_loop(0, _STEPS, step, (state.target_cache, pending, jnp.int32(0)))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _rule_loop(plan, draft_params, state, proposal, logits, taps, sampling, limits):
    """Repeats rule and commit on the same logits, shifted slightly by the number of tokens emitted so far."""

    def step(_, state):
        moved = logits + 1e-6 * jnp.sum(state.lengths).astype(jnp.float32)
        noise = _noise(plan, state)
        state_after = loop.accept_and_commit(plan, draft_params, state, proposal, moved, taps, noise, sampling, limits)
        return dataclasses.replace(state_after, done=state.done)

    return jax.lax.fori_loop(0, _STEPS, step, state)


@dataclasses.dataclass(frozen=True)
class TimedStep:
    """Settings for timing a model: `steps` calls on `tokens` tokens per row in one dispatch.

    Attributes:
      model: the model; its weights may be random, because the time does not depend on its predictions.
      tokens: number of tokens per row and call: 1 for plain decoding, gamma + 1 for verification.
      batch: number of rows.
      context: number of tokens in a row, up to and including the first one of the call.
      capacity: number of cache slots per row.
      steps: number of calls per dispatch; 1 returns to the host after every call.
    """

    model: LanguageModel
    tokens: int
    batch: int
    context: int
    capacity: int
    steps: int


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _steps(step: TimedStep, params, cache, tokens, start):
    """Runs the model `steps` times at the same positions, on the most probable tokens of the previous call."""
    positions = start[:, None] + jnp.arange(step.tokens, dtype=jnp.int32)[None]

    def once(_, carry):
        cache, tokens = carry
        hidden, cache = step.model.extend(params, cache, tokens, positions)
        return cache, jnp.argmax(step.model.head(params, hidden), axis=-1).astype(jnp.int32)

    return jax.lax.fori_loop(0, step.steps, once, (cache, tokens))


def step_case(step: TimedStep, params: Any) -> tuple[Callable, Callable]:
    """Functions (make the inputs, run) for `timing.in_turns`; one run is `step.steps` calls of the model.

    The cache is filled with zeros, because its content does not affect the time; `context` must fit its capacity.
    """
    tokens = jnp.zeros((step.batch, step.tokens), jnp.int32)
    start = jnp.full((step.batch,), step.context - 1, jnp.int32)
    fresh = lambda: step.model.start(params, tokens, start, step.capacity)
    return fresh, lambda cache: _steps(step, params, cache, tokens, start)


Timer = Callable[[], float]


def _timer(fresh: Callable[[], Any], run: Callable[[Any], Any]) -> Timer:
    """A function that times `run` on fresh inputs and returns seconds per iteration of its loop."""

    def seconds() -> float:
        inputs = jax.block_until_ready(fresh())
        started = time.perf_counter()
        jax.block_until_ready(run(inputs))
        return (time.perf_counter() - started) / _STEPS

    return seconds


def timers(method: Method, tokens, lengths, row_keys, *, decoded: int = 0) -> dict[str, Timer]:
    """Timers of the parts of a block, in seconds per block.

    Args:
      tokens: `[B, P]` rows as long as the mean context: prompt and, for decoder-only models, half the emitted tokens.
      lengths: `[B]` number of tokens of each row.
      row_keys: `[B]` random keys.
      decoded: number of further tokens in the cache; for an encoder-decoder half the emitted tokens.

    Returns:
      timers by name: "verify", "rule" and, with a draft, "propose_and_verify".
    """
    plan, params, draft_params, sampling = method.plan, method.params, method.draft_params, method.sampling
    limits = loop.Limits(jnp.full_like(lengths, 2**30), jnp.full((1,), -1, jnp.int32))

    def fresh():
        state = loop.prefill(plan, params, draft_params, tokens, lengths, row_keys)
        return dataclasses.replace(state, lengths=state.lengths + decoded)

    proposal, logits, taps = _example(plan, params, draft_params, fresh(), sampling)
    rule = lambda state: _rule_loop(plan, draft_params, state, proposal, logits, taps, sampling, limits)
    # A target call does not depend on rule or temperature, so one compiled loop is used for all of them.
    any_rule = dataclasses.replace(plan, rule=rules.rule_named("lossless"), greedy=True)
    parts = {
        "verify": _timer(fresh, lambda state: _verify_loop(any_rule, params, state, proposal)),
        "rule": _timer(fresh, rule),
    }
    if plan.gamma:
        pair = lambda state: _draft_and_verify_loop(plan, params, draft_params, state, sampling)
        parts["propose_and_verify"] = _timer(fresh, pair)
    return parts


class PartsMeter:
    """Times the parts of plain decoding and of several speculative plans in rounds.

    Every round times all parts of all plans once, so that a slow phase of the machine affects few rounds, of which
    `parts` takes the median. Rounds can be spread over the run whose speed is predicted from the parts.

    Attributes:
      rounds: for each round, for each plan, seconds by part.
    """

    def __init__(self, plain: dict[str, Timer], speculative: Sequence[dict[str, Timer]], gammas: Sequence[int]) -> None:
        """Compiles the parts by running each once.

        Args:
          plain: `timers` of plain decoding.
          speculative: `timers` of each speculative plan.
          gammas: gamma of each speculative plan, at least 1.
        """
        self._timed, self._gammas, self.rounds = (plain, *speculative), gammas, []
        for timers in progress(self._timed, description="parts: compile", unit="case"):
            _once(timers)

    def keep_up(self, share: float) -> None:
        """Runs rounds until this fraction of all rounds is done."""
        while len(self.rounds) < round(share * _ROUNDS):
            self.rounds.append([_once(timers) for timers in self._timed])

    def parts(self) -> list[PartSeconds]:
        """The seconds of the parts of each speculative plan, as medians over the rounds."""
        median = lambda index, of: statistics.median(of(times[index]) for times in self.rounds)
        draft = lambda times: times["propose_and_verify"] - times["verify"]
        return [
            PartSeconds(
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


def block_seconds(method: Method, tokens, lengths, row_keys, *, decoded: int = 0) -> list[float]:
    """Seconds of a block in which every row drafts k tokens, k = 0 .. gamma, for an adaptive drafter.

    A length is forced by infinite costs of all others, so one executable runs all of them. Arguments are as in
    `timers`.
    """
    gamma = method.plan.gamma

    def forced(drafted: int) -> dict[str, Timer]:
        costs = jnp.full((gamma + 1,), jnp.inf).at[drafted].set(1.0)
        sampling = dataclasses.replace(method.sampling, costs=costs)
        return timers(dataclasses.replace(method, sampling=sampling), tokens, lengths, row_keys, decoded=decoded)

    timed = [forced(drafted) for drafted in range(gamma + 1)]
    seconds = [[every["propose_and_verify"]() + every["rule"]() for every in timed] for _ in range(_COST_ROUNDS + 1)]
    return [statistics.median(times) for times in zip(*seconds[1:], strict=True)]


def _example(plan, params, draft_params, state, sampling) -> tuple[Proposal, jax.Array, tuple[jax.Array, ...]]:
    """A proposal of gamma tokens, logits and tapped states with random values.

    The seconds of a target call and a rule do not depend on the values, and compiling a draft to compute real ones took
    longer than the timing.
    """
    structures = []

    def leaves():
        proposal, after = loop.propose(plan, params, draft_params, state, _noise(plan, state), sampling)
        logits, _, taps = loop.verify(plan, params, after.target_cache, state.lengths, state.lengths, proposal)
        # `eval_shape` cannot build a Proposal of shapes, so only its leaves pass through it.
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
