"""The decoding loop: blocks of propose, verify, accept and commit, until every row is done.

Walk-through of one block with gamma = 2 (numbers are positions, `*` is the pending token, which is in no cache yet):

  committed   0 1 2*            the target's cache holds 0 1
  propose     d3 d4             two drafted tokens
  verify      [2 d3 d4]         one target call at positions 2 3 4 gives three rows of logits
  rule        d3 is accepted, d4 is rejected, r4 is recovered from the residual of row 4
  commit      0 1 2 3 4*        two tokens emitted; slot 4 of the caches is stale and is rewritten in the next block

gamma = 0 is plain decoding with the same code. Every target call emits 1 .. gamma + 1 tokens per row.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from specjax.decoding.drafters.base import Context, Outcome, Proposal
from specjax.decoding.plan import SMALLEST_CAPACITY, Plan
from specjax.decoding.prefill import ACCEPTED, BONUS, ORIGINS, RECOVERED, DecodeState, narrow, prefill, through_target
from specjax.decoding.rules import LossyInputs
from specjax.decoding.sampling import Noise, Sampling, finite_rows, probabilities
from specjax.models import kv_cache
from specjax.models.language_model import LanguageModel
from specjax.runtime import mesh as meshes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Limits:
    """When rows end, and when `run` returns. All values are traced.

    Attributes:
      max_new_tokens: maximum number of tokens that each row emits.
      eos_ids: ids that end a row; -1 is padding. The EOS itself is emitted and counted, tokens after it are not.
      iterations: `run` returns once this many blocks ran since the prefill; a larger value then continues.
      live: `run` returns once at most this many rows have not ended, so that other texts can take the place of those
        that have (`prefill.refill`).
    """

    max_new_tokens: Int[Array, "B"]
    eos_ids: Int[Array, "E"]
    iterations: Int[Array, ""] | int = 2**31 - 1
    live: Int[Array, ""] | int = 0

    def reached(self, state: DecodeState) -> Bool[Array, ""]:
        """Whether `run` returns before the next block."""
        return (jnp.sum(~state.done) <= self.live) | (state.iterations >= self.iterations)


def _noise(plan: Plan, state: DecodeState) -> Noise:
    return Noise(state.row_keys, state.lengths, plan.greedy, plan.rule.shared_noise, plan.rule.block_noise)


def propose(plan: Plan, params, draft_params, state: DecodeState, sampling: Sampling):
    """Runs the drafter. Returns its proposal (empty if gamma is 0) and the state with the new caches."""
    batch = state.lengths.shape[0]
    if plan.gamma == 0:
        return Proposal(jnp.zeros((batch, 0), jnp.int32), None, jnp.zeros((batch,), jnp.int32)), state
    recent = jnp.maximum(state.lengths[:, None] + jnp.arange(-2, 0)[None], 0)
    last_two = jnp.take_along_axis(state.tokens, recent, axis=1)
    noise = dataclasses.replace(_noise(plan, state), greedy=plan.greedy or plan.drafter.greedy)
    context = Context(
        last_two, state.lengths, ~state.done, noise, sampling, tokens=state.tokens, vocab_size=plan.target.vocab_size
    )
    # Layer meters count one token, the pending one, in each live row; drafters change this for calls with more tokens.
    states = kv_cache.counting((state.drafter_state, state.target_cache), (~state.done).astype(jnp.int32))
    with jax.named_scope("propose"):
        proposal, drafter_state, cache = plan.drafter.propose(draft_params, params, *states, context)
    return proposal, dataclasses.replace(state, drafter_state=drafter_state, target_cache=cache)


def verify(plan: Plan, params, cache, pending: Int[Array, "B"], lengths: Int[Array, "B"], proposal: Proposal):
    """Runs the target once on `[pending, d_1 .. d_gamma]`, or from the hidden states that the proposal has for them.

    If the drafter can stop early, the call has only as many columns as the longest draft of the batch needs, rounded up
    to one of `_widths`. For the other columns, logits and states are 0 and the cache is unchanged. On a GPU it has all
    columns: choosing would make the host wait, and more columns take hardly any time.

    Returns:
      logits `[B, gamma + 1, V]`, the cache, and the hidden states `[B, gamma + 1, D]` after each tapped layer above
      `proposal.resume_layer`; the drafter computed those up to it.
    """
    columns = proposal.tokens.shape[1] + 1
    positions = lengths[:, None] - 1 + jnp.arange(columns, dtype=jnp.int32)[None]
    if proposal.resume_hidden is None:
        inputs, first_layer = jnp.concatenate([pending[:, None], proposal.tokens], axis=1), 0
    else:
        inputs, first_layer = proposal.resume_hidden, proposal.resume_layer

    def call(width, cache):
        hidden, cache, tap_states = through_target(
            plan, params, cache, inputs[:, :width], positions[:, :width], first_layer
        )
        return cache, (plan.target.head(params, hidden), tap_states)

    if plan.drafter is not None and plan.drafter.stops and meshes.platform() != "gpu":
        needed = jnp.max(proposal.num_drafted) + 1
        cache, (logits, tap_states) = _call_narrowest(call, _widths(plan), needed, cache)
    else:
        cache, (logits, tap_states) = call(columns, cache)
    return logits, cache, tap_states


def _widths(plan: Plan) -> list[int]:
    """The widths that verification is compiled for: k + 1 with k = 1, 2, 4, .., gamma, and k = 0 if `drafter.idles`."""
    powers = itertools.takewhile(lambda count: count < plan.gamma, (2**i for i in itertools.count()))
    drafted = (*([0] if plan.drafter.idles else []), *powers, plan.gamma)
    return [count + 1 for count in drafted]


def _call_narrowest(call: Callable, widths: list[int], needed: Int[Array, ""], cache: Any) -> tuple[Any, Any]:
    """Calls `call(width, cache)` at the smallest width of at least `needed`; pads its results to the largest width.

    It is a `lax.switch` over the widths, written as one `while_loop` of zero or one iterations for each width, because
    a loop updates the cache in place and `lax.switch` copies it.
    """
    widest = widths[-1]
    if len(widths) == 1:
        return call(widest, cache)
    shapes = jax.eval_shape(lambda: call(widest, cache)[1])
    results = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    for width in widths:

        def turn(carry, width=width):
            needed, cache, _ = carry
            cache, results = call(width, cache)
            results = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, widest - width), (0, 0))), results)
            return jnp.full_like(needed, widest + 1), cache, results  # above every width, so no later loop runs

        fits = lambda carry, width=width: carry[0] <= width
        needed, cache, results = jax.lax.while_loop(fits, turn, (needed, cache, results))
    return cache, results


def accept_and_commit(
    plan: Plan,
    draft_params: Any,
    state: DecodeState,
    proposal: Proposal,
    logits: Float[Array, "B gamma_plus_1 V"],
    tap_states: tuple[Any, ...],
    sampling: Sampling,
    limits: Limits,
) -> DecodeState:
    """Accepts drafted tokens by the rule, cuts the block at EOS and the row's limit, and appends it to the text."""
    with jax.named_scope("rule"):
        target_probs = probabilities(logits, sampling, greedy=plan.greedy)
        lossy_inputs = None
        if plan.rule.lossy:
            raw_probs = jax.nn.softmax(logits.astype(jnp.float32), axis=-1) if plan.greedy else None
            lossy_inputs = LossyInputs(sampling.lenience, raw_probs)
        num_accepted, next_token = plan.rule(_noise(plan, state), proposal, target_probs, lossy_inputs)
        # Positions after `num_accepted` do not matter, and may follow a draft token that makes no sense.
        used = jnp.arange(logits.shape[1], dtype=jnp.int32)[None] <= num_accepted[:, None]
        failed = jnp.any(used & ~finite_rows(logits), axis=1) & ~state.done
    with jax.named_scope("commit"):
        room = limits.max_new_tokens - state.num_emitted
        tokens, num_emitted, num_drafted, at_eos = _emission(
            proposal, num_accepted, next_token, room, ~state.done, limits.eos_ids
        )
        drafter_state, origins = state.drafter_state, state.origins
        if plan.drafter is not None:
            outcome = Outcome(tokens, num_emitted, jnp.minimum(num_accepted, num_emitted), state.lengths, tap_states)
            drafter_state = plan.drafter.commit(draft_params, drafter_state, outcome)
        if plan.gamma:  # in plain decoding `prefill` has set the origins
            new_origins = _origins(proposal, num_accepted)
            origins = kv_cache.write_rows(origins, new_origins, state.lengths, axis=1)
        return dataclasses.replace(
            state,
            tokens=kv_cache.write_rows(state.tokens, tokens, state.lengths, axis=1),
            origins=origins,
            lengths=state.lengths + num_emitted,
            done=state.done | at_eos | (num_emitted >= room) | failed,
            drafter_state=drafter_state,
            statistics=state.statistics.after(num_accepted, num_emitted, num_drafted, proposal.failed, failed),
            iterations=state.iterations + 1,
        )


def _emission(proposal: Proposal, num_accepted, next_token, room, live, eos_ids):
    """Cuts a block at EOS and at the row's limit; `room` `[B]` is the number of tokens left until the limit.

    Returns:
      tokens `[B, gamma + 1]`, how many of them are emitted, how many drafted tokens the statistics count, and whether
      EOS is emitted; 0 and False in rows that have ended.
    """
    gamma = proposal.tokens.shape[1]
    index = jnp.arange(gamma + 1, dtype=jnp.int32)[None]
    padded = jnp.pad(proposal.tokens, ((0, 0), (0, 1)))
    tokens = jnp.where(index == num_accepted[:, None], next_token[:, None], padded)
    is_eos = jnp.any(tokens[..., None] == eos_ids[None, None], axis=-1) & (index <= num_accepted[:, None])
    until_eos = jnp.min(jnp.where(is_eos, index + 1, gamma + 2), axis=1)
    num_emitted = jnp.minimum(jnp.minimum(num_accepted + 1, until_eos), room)
    at_eos = num_emitted == until_eos
    countable = jnp.minimum(proposal.num_drafted, jnp.where(at_eos, num_emitted, room))
    zero_unless_live = lambda count: jnp.where(live, count, 0)
    return tokens, zero_unless_live(num_emitted), zero_unless_live(countable), at_eos & live


def _origins(proposal: Proposal, num_accepted) -> Int[Array, "B gamma_plus_1"]:
    """The origin of each token of the block, emitted or not, see `DecodeState.origins`."""
    index = jnp.arange(proposal.tokens.shape[1] + 1, dtype=jnp.int32)[None]
    recovered = RECOVERED + len(ORIGINS) * proposal.num_drafted
    last = jnp.where(num_accepted < proposal.num_drafted, recovered, BONUS)[:, None]
    return jnp.where(index < num_accepted[:, None], ACCEPTED, last).astype(jnp.int32)


def block(
    plan: Plan, params: Any, draft_params: Any, state: DecodeState, sampling: Sampling, limits: Limits
) -> DecodeState:
    """Runs one block: propose, verify, accept and commit. Rows that have ended are computed too but do not change."""
    proposal, state = propose(plan, params, draft_params, state, sampling)
    cache = kv_cache.counting(state.target_cache, jnp.where(state.done, 0, proposal.num_drafted + 1))
    with jax.named_scope("verify"):
        logits, cache, taps = verify(plan, params, cache, state.pending, state.lengths, proposal)
    state = dataclasses.replace(state, target_cache=cache)
    return accept_and_commit(plan, draft_params, state, proposal, logits, taps, sampling, limits)


def run(
    plan: Plan, params: Any, draft_params: Any, state: DecodeState, sampling: Sampling, limits: Limits
) -> DecodeState:
    """Runs blocks until all rows have ended or another limit is reached, see `Limits`. Donates `state`.

    On a GPU a compiled loop ends where the texts outgrow its prefix of the caches, and the next one takes over.
    """
    while True:
        prefix = prefix_for(plan, state)
        state = compiled_run(plan, params, draft_params, state, sampling, limits, prefix)
        if prefix == plan.capacity or limits.reached(state):
            return state


def prefix_for(plan: Plan, state: DecodeState) -> int:
    """The number of first slots of the caches that the next block needs, as `compiled_run` takes it.

    On a GPU it is the smallest of `kv_cache.prefixes`, at least the smallest capacity, with room for a block in every
    row; so attention reads no more than this without a switch. Elsewhere, and under `jit`, it is the capacity.
    """
    prefixes = [length for length in kv_cache.prefixes(plan.capacity) if length >= SMALLEST_CAPACITY]
    if len(prefixes) < 2 or meshes.platform() != "gpu" or isinstance(state.lengths, jax.core.Tracer):
        return plan.capacity
    longest = int(jnp.max(state.lengths))
    return next((prefix for prefix in prefixes if longest <= _longest_in(plan, prefix)), plan.capacity)


def _longest_in(plan: Plan, prefix: int) -> int:
    """The longest text that can be continued within `prefix` slots: it has room for two blocks.

    The second one writes slots without changing the text, as blocks after the end do (see `compiled_run`).
    """
    return prefix - 2 * (plan.gamma + 1)


# Blocks that a GPU runs before the host reads whether any row is left. On an H200, reading it paused the device for 0.3
# to 0.6 ms, where a block of a model of a billion parameters took 1.0 ms.
_BLOCKS_PER_READING = 4


@functools.partial(jax.jit, static_argnums=(0, 6), donate_argnums=3)
def compiled_run(
    plan: Plan, params: Any, draft_params: Any, state: DecodeState, sampling: Sampling, limits: Limits, prefix: int
) -> DecodeState:
    """`run` in one `while_loop` over copies of the first `prefix` slots of the caches; it also ends if these fill up.

    Rows that have ended write slots too, so the longest of all rows counts. On a GPU an iteration of the loop is
    several blocks; those after the end change nothing.
    """
    state = dataclasses.replace(state, done=state.done | (limits.max_new_tokens <= 0))

    def unfinished(state: DecodeState):
        unfinished = ~limits.reached(state)
        return unfinished if prefix == plan.capacity else unfinished & (jnp.max(state.lengths) <= longest)

    def if_unfinished(_, state: DecodeState) -> DecodeState:
        active = unfinished(state)
        after = once(dataclasses.replace(state, done=state.done | ~active))
        iterations = state.iterations + active.astype(jnp.int32)
        return dataclasses.replace(after, done=jnp.where(active, after.done, state.done), iterations=iterations)

    longest = _longest_in(plan, prefix)
    once = lambda state: block(plan, params, draft_params, state, sampling, limits)
    several = lambda state: jax.lax.fori_loop(0, _BLOCKS_PER_READING, if_unfinished, state)
    step = several if meshes.platform() == "gpu" else once
    return kv_cache.restored(state, jax.lax.while_loop(unfinished, step, kv_cache.shortened(state, prefix)))


# On CPU, where a block takes longer with more rows, the last half of so many texts of `complete` or more runs in half
# of the rows.
_FEWEST_HALVED = 16


def sample(
    model: LanguageModel,
    params: Any,
    prompts: Int[Array, "B P"],
    lengths: Int[Array, "B"],
    row_keys: Key[Array, "B"],
    *,
    sampling: Sampling,
    greedy: bool,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
) -> tuple[Int[Array, "B T"], Int[Array, "B"]]:
    """Samples from a model without a draft; new tokens follow each row's prompt (or start token) without a gap.

    Returns:
      tokens `[B, text_slots + max_new_tokens]`, 0 after each row's end, and the rows' lengths `[B]`, prompt included.
    """
    slots = prompts.shape[1]
    plan = Plan.for_prompts(model, slots, max_new_tokens=max_new_tokens, greedy=greedy, round_up=False)
    how = {"sampling": sampling, "max_new_tokens": max_new_tokens, "eos_ids": eos_ids}
    state = complete(plan, params, None, prompts, lengths, row_keys, **how)
    width = model.text_slots(slots) + max_new_tokens
    index = jnp.arange(width, dtype=jnp.int32)[None]
    return jnp.where(index < state.lengths[:, None], state.tokens[:, :width], 0), state.lengths


def complete(
    plan: Plan,
    params: Any,
    draft_params: Any,
    prompts: Int[Array, "B P"],
    lengths: Int[Array, "B"],
    row_keys: Key[Array, "B"],
    *,
    sampling: Sampling,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
) -> DecodeState:
    """Prefills prompts and decodes them to their ends, as part of a compiled function. Returns the last state."""
    batch, slots = prompts.shape
    limits = Limits(jnp.full((batch,), max_new_tokens, jnp.int32), jnp.asarray(eos_ids or (-1,), jnp.int32))
    state = prefill(plan, params, draft_params, prompts, lengths, row_keys)
    halves = meshes.platform() == "cpu" and meshes.num_shards("batch") == 1 and batch >= _FEWEST_HALVED
    half = batch // 2 if halves else 0
    state = run(plan, params, draft_params, state, sampling, dataclasses.replace(limits, live=half))
    if not half:
        return state
    rows = jnp.argsort(state.done, stable=True)[:half]  # those that have not ended
    limits = dataclasses.replace(limits, max_new_tokens=limits.max_new_tokens[:half])
    narrowed = narrow(plan, params, draft_params, state, slots, rows)
    last = run(plan, params, draft_params, narrowed, sampling, limits)
    return jax.tree.map(lambda x, new: new if x.shape == new.shape else x.at[rows].set(new), state, last)
