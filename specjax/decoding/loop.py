"""The one decoding loop: propose, verify, apply the rule, commit, until every row is done.

Walk-through of one block with gamma = 2 (numbers are positions, `*` is the pending token, in no cache yet):

  committed   0 1 2*            the target's cache holds 0 1
  propose     d3 d4             two drafted tokens
  verify      [2 d3 d4]         one target call at positions 2 3 4 gives three rows of logits
  rule        d3 stands, d4 is refused, r4 is recovered from row 4's residual
  commit      0 1 2 3 4*        two tokens emitted; slot 4 of the caches is stale and is rewritten next block

gamma = 0 is plain decoding through the same code. Every target call emits 1 .. gamma + 1 tokens.
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from specjax.decoding.drafters.base import Context, Drafter, Outcome, Prefill, Proposal
from specjax.decoding.rules import Lossless, LossyInputs, Rule
from specjax.decoding.sampling import Noise, Sampling, probabilities
from specjax.decoding.statistics import Statistics
from specjax.models import kv_cache
from specjax.models.language_model import LanguageModel, consecutive
from specjax.runtime import mesh as meshes
from specjax.runtime.mesh import constrain

# Where an emitted token came from; what the report colours.
PROMPT, ACCEPTED, RECOVERED, BONUS, PLAIN = range(5)
ORIGINS = ("prompt", "accepted", "recovered", "bonus", "plain")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about a decode: together with array shapes this is the compile key.

    Attributes:
      target: the model whose law the text follows.
      drafter: what proposes tokens; None for plain decoding (gamma = 0).
      rule: a rule of `decoding.rules`.
      gamma: most tokens drafted a block.
      capacity: cache slots and token slots a row; see `capacity_for`.
      greedy: temperature 0.
      replicate_draft: every device of the tensor axis holds all of the draft, and so all heads of its caches.
    """

    target: LanguageModel
    drafter: Drafter | None
    rule: Rule | None
    gamma: int
    capacity: int
    greedy: bool
    replicate_draft: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Limits:
    """Where rows end. Traced.

    Attributes:
      max_new_tokens: most tokens a row may emit.
      eos_ids: ids that end a row; -1 is padding. The EOS itself is emitted and counted, nothing after it is.
      iterations: `run` returns after so many blocks in all, ended or not; calling it again goes on.
    """

    max_new_tokens: Int[Array, "B"]
    eos_ids: Int[Array, "E"]
    iterations: Int[Array, ""] | int = 2**31 - 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """What the loop carries.

    Attributes:
      tokens: prompt and emitted tokens, row b's up to `lengths[b]`; what lies beyond is scratch.
      origins: for each token slot where it came from (`ORIGINS`).
      lengths: committed tokens, the pending one included.
      prompt_lengths: tokens with which the text began: its prompt, or a start token.
      done: rows that have ended.
      row_keys: one random key a row.
      target_cache: the target's keys and values, valid below `lengths - 1`, and the meter of its layers.
      drafter_state: whatever the drafter keeps.
      statistics: counts.
      iterations: blocks run for the batch.
    """

    tokens: Int[Array, "B S"]
    origins: Int[Array, "B S"]
    lengths: Int[Array, "B"]
    prompt_lengths: Int[Array, "B"]
    done: Bool[Array, "B"]
    row_keys: Key[Array, "B"]
    target_cache: Any
    drafter_state: Any
    statistics: Statistics
    iterations: Int[Array, ""]

    @property
    def num_emitted(self) -> Int[Array, "B"]:
        return self.lengths - self.prompt_lengths


def capacity_for(text_slots: int, max_new_tokens: int, gamma: int) -> int:
    """Slots that can never run over: a row one short of its limit still writes gamma + 1 of them."""
    return text_slots + max_new_tokens + gamma + 1


def _through_target(plan: Plan, params, cache, inputs, positions, first_layer: int, taps):
    """Runs the target from `first_layer` on, collecting hidden states after each tapped layer."""
    states = []
    for layer in sorted(tap for tap in taps if tap > first_layer):
        inputs, cache = plan.target.extend(params, cache, inputs, positions, layers=(first_layer, layer))
        states.append(inputs)
        first_layer = layer
    span = (first_layer, plan.target.layers)
    hidden, cache = plan.target.extend(params, cache, inputs, positions, layers=span)
    return hidden, cache, tuple(states)


def begin(
    plan: Plan,
    params: Any,
    draft_params: Any,
    prompts: Int[Array, "B P"],
    lengths: Int[Array, "B"],
    row_keys: Key[Array, "B"],
) -> DecodeState:
    """Prefill: fills the caches with `prompt[:-1]`, leaves the last token pending, emits nothing.

    Prompts are right-padded and have at least one token. All columns of the texts are run; what the last token and
    the padding write is stale by contract and rewritten before it is visible.
    """
    # Neither the rule nor the temperature matters yet: plans that differ in nothing else share the executable.
    plan = dataclasses.replace(plan, rule=None, greedy=True)
    return prefill(plan, params, draft_params, prompts, lengths, row_keys)


@functools.partial(jax.jit, static_argnums=0)
def prefill(plan: Plan, params, draft_params, prompts, lengths, row_keys) -> DecodeState:
    """The compiled part of `begin`."""
    prompts, lengths = constrain(prompts, ("batch", None)), constrain(lengths, ("batch",))
    cache = plan.target.start(params, prompts, lengths, plan.capacity)
    cache = jax.tree.map(lambda x: constrain(x, kv_cache.AXES[: x.ndim]), cache)
    texts, text_lengths = plan.target.start_texts(prompts, lengths)
    taps = plan.drafter.taps if plan.gamma else ()
    with jax.named_scope("prefill"):
        _, cache, tap_states = _through_target(plan, params, cache, texts, consecutive(texts), 0, taps)
    drafter_state = ()
    if plan.gamma:
        prefill = Prefill(prompts, lengths, texts, text_lengths, tap_states, plan.capacity)
        with jax.named_scope("drafter_init"):
            drafter_state = plan.drafter.init(draft_params, params, prefill, row_keys)
    tokens = jnp.pad(texts, ((0, 0), (0, plan.capacity - texts.shape[1])))
    cache, drafter_state = kv_cache.unmetered((cache, drafter_state))
    state = DecodeState(
        tokens=tokens,
        origins=jnp.where(jnp.arange(plan.capacity)[None] < text_lengths[:, None], PROMPT, PLAIN).astype(jnp.int32),
        lengths=text_lengths,
        prompt_lengths=text_lengths,
        done=jnp.zeros(lengths.shape, bool),
        row_keys=row_keys,
        target_cache=cache,
        drafter_state=drafter_state,
        statistics=Statistics.zeros(lengths.shape[0], plan.gamma),
        iterations=jnp.zeros((), jnp.int32),
    )
    # Said of all that it gives: left alone, the compiler keeps a cache that is only written yet whole on every device
    # of the tensor axis, and its rows whole along `fsdp`, as weights are.
    ways = meshes.num_shards("kv_heads")
    lay = lambda of_draft: lambda x: constrain(x, axes_of(plan, x, ways, of_draft=of_draft))
    laid_out = jax.tree.map(lay(False), dataclasses.replace(state, drafter_state=()))
    return dataclasses.replace(laid_out, drafter_state=jax.tree.map(lay(True), drafter_state))


def axes_of(plan: Plan, x: Any, ways: int, *, of_draft: bool) -> tuple[str | None, ...]:
    """Logical axes of an array, or shape, of what the loop carries.

    Rows are split, and of caches the heads too; of hidden states the width alone.

    Args:
      ways: devices along the tensor axis.
      of_draft: whether it is of the drafter's state.
    """
    if x.ndim == 3:  # hidden states: with their rows split, the compiler puts whole weights together for them
        return None, None, "embed"
    if x.ndim != len(kv_cache.AXES):
        return ("batch", *[None] * (x.ndim - 1)) if x.ndim else ()
    return kv_cache.draft_axes(x.shape[1], ways, replicate=plan.replicate_draft) if of_draft else kv_cache.AXES


def verify(plan: Plan, params, cache, pending: Int[Array, "B"], lengths: Int[Array, "B"], proposal: Proposal):
    """One target call on `[pending, d_1 .. d_gamma]`: gamma + 1 rows of logits, the cache, tapped hidden states.

    Behind a drafter that stops early only so many columns are run as the longest draft needs (rounded up to one of a
    few widths); logits and states of the others are 0, and their cache slots as before.
    """
    gamma = proposal.tokens.shape[1]
    positions = lengths[:, None] - 1 + jnp.arange(gamma + 1, dtype=jnp.int32)[None]
    taps = plan.drafter.taps if plan.gamma else ()
    if proposal.resume_hidden is None:
        inputs, first = jnp.concatenate([pending[:, None], proposal.tokens], axis=1), 0
    else:
        inputs, first = proposal.resume_hidden, proposal.resume_layer

    def call(width, cache):
        hidden, cache, tap_states = _through_target(
            plan, params, cache, inputs[:, :width], positions[:, :width], first, taps
        )
        return cache, (plan.target.head(params, hidden), tap_states)

    widths = _widths(plan)
    if len(widths) == 1:
        cache, (logits, tap_states) = call(gamma + 1, cache)
        return logits, cache, tap_states
    needed = jnp.max(proposal.num_drafted) + 1
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(lambda: call(gamma + 1, cache)[1]))
    carry = needed, cache, nothing
    for width in widths:
        # Loops of one turn at most, of which one takes it. They hand the cache on in place; a switch would copy it.
        def turn(carry, width=width):
            cache, results = call(width, carry[1])
            wide = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, gamma + 1 - width), (0, 0))), results)
            return jnp.full_like(needed, gamma + 2), cache, wide

        carry = jax.lax.while_loop(lambda carry, width=width: carry[0] <= width, turn, carry)
    _, cache, (logits, tap_states) = carry
    return logits, cache, tap_states


def _widths(plan: Plan) -> list[int]:
    """Columns that a verification may run: of all drafts, or of (0,) 1, 2, 4, ... where the drafter stops early."""
    if plan.drafter is None or not plan.drafter.stops:
        return [plan.gamma + 1]
    drafts = itertools.takewhile(lambda count: count < plan.gamma, (2**i for i in itertools.count()))
    none = [0] if plan.drafter.idles else []
    return [count + 1 for count in (*none, *drafts, plan.gamma)]


def _emission(proposal: Proposal, num_accepted, next_token, room, live, eos_ids):
    """Cuts a block at EOS and at the row's limit.

    Returns:
      tokens `[B, gamma + 1]`, how many of them are emitted, how many drafted tokens count, and whether EOS is among
      the emitted.
    """
    gamma = proposal.tokens.shape[1]
    index = jnp.arange(gamma + 1, dtype=jnp.int32)[None]
    padded = jnp.pad(proposal.tokens, ((0, 0), (0, 1)))
    tokens = jnp.where(index == num_accepted[:, None], next_token[:, None], padded)
    is_eos = jnp.any(tokens[..., None] == eos_ids[None, None], axis=-1) & (index <= num_accepted[:, None])
    until_eos = jnp.min(jnp.where(is_eos, index + 1, gamma + 2), axis=1)
    num_emitted = jnp.minimum(jnp.minimum(num_accepted + 1, until_eos), room)
    ended = num_emitted == until_eos
    countable = jnp.minimum(proposal.num_drafted, jnp.where(ended, num_emitted, room))
    zero_unless_live = lambda count: jnp.where(live, count, 0)
    return tokens, zero_unless_live(num_emitted), zero_unless_live(countable), ended & live


def _lossy_inputs(plan: Plan, logits: Float[Array, "B gamma_plus_1 V"], sampling: Sampling) -> LossyInputs:
    raw = jax.nn.softmax(logits.astype(jnp.float32), axis=-1) if plan.greedy else None
    return LossyInputs(sampling.lenience, raw)


def settle(
    plan: Plan,
    draft_params: Any,
    state: DecodeState,
    proposal: Proposal,
    logits: Float[Array, "B gamma_plus_1 V"],
    tap_states: tuple[Any, ...],
    noise: Noise,
    sampling: Sampling,
    limits: Limits,
) -> DecodeState:
    """What follows the target call: the rule decides, the row is cut at EOS and limit, everything is committed."""
    with jax.named_scope("rule"):
        target_probs = probabilities(logits, sampling, greedy=plan.greedy)
        inputs = _lossy_inputs(plan, logits, sampling) if plan.rule.lossy else None
        num_accepted, next_token = plan.rule(noise, proposal, target_probs, inputs)
    with jax.named_scope("commit"):
        room = limits.max_new_tokens - state.num_emitted
        tokens, num_emitted, num_drafted, ended = _emission(
            proposal, num_accepted, next_token, room, ~state.done, limits.eos_ids
        )
        drafter_state = state.drafter_state
        if plan.gamma:
            outcome = Outcome(tokens, num_emitted, jnp.minimum(num_accepted, num_emitted), state.lengths, tap_states)
            drafter_state = plan.drafter.commit(draft_params, drafter_state, outcome)
        origins = state.origins
        if plan.gamma:  # otherwise they are what `begin` wrote
            new_origins = _origins(proposal, num_accepted)
            origins = kv_cache.write_rows(origins, new_origins, state.lengths, axis=1)
        return dataclasses.replace(
            state,
            tokens=kv_cache.write_rows(state.tokens, tokens, state.lengths, axis=1),
            origins=origins,
            lengths=state.lengths + num_emitted,
            done=state.done | ended | (num_emitted >= room),
            drafter_state=drafter_state,
            statistics=state.statistics.after(num_accepted, num_emitted, num_drafted),
            iterations=state.iterations + 1,
        )


def propose(plan: Plan, params, draft_params, state: DecodeState, noise: Noise, sampling: Sampling):
    """The drafter's proposal (the empty one of plain decoding when gamma is 0) and the state that it moved on."""
    batch = state.lengths.shape[0]
    if plan.gamma == 0:
        return Proposal(jnp.zeros((batch, 0), jnp.int32), None, jnp.zeros((batch,), jnp.int32)), state
    recent = jnp.maximum(state.lengths[:, None] + jnp.arange(-2, 0)[None], 0)
    last_two = jnp.take_along_axis(state.tokens, recent, axis=1)
    context = Context(last_two, state.lengths, ~state.done, noise, sampling, tokens=state.tokens)
    # The meters count the pending token of each live row, unless the drafter says more.
    given = kv_cache.counting((state.drafter_state, state.target_cache), (~state.done).astype(jnp.int32))
    with jax.named_scope("propose"):
        proposal, drafter_state, cache = plan.drafter.propose(draft_params, params, *given, context)
    return proposal, dataclasses.replace(state, drafter_state=drafter_state, target_cache=cache)


def block(
    plan: Plan, params: Any, draft_params: Any, state: DecodeState, sampling: Sampling, limits: Limits
) -> DecodeState:
    """One round: propose, one target call, the rule, commit. Finished rows run along and change nothing."""
    noise = Noise(state.row_keys, state.lengths, plan.greedy, plan.rule.shared_noise)
    proposal, state = propose(plan, params, draft_params, state, noise, sampling)
    pending = jnp.take_along_axis(state.tokens, state.lengths[:, None] - 1, axis=1)[:, 0]
    cache = kv_cache.counting(state.target_cache, jnp.where(state.done, 0, proposal.num_drafted + 1))
    with jax.named_scope("verify"):
        logits, cache, taps = verify(plan, params, cache, pending, state.lengths, proposal)
    state = dataclasses.replace(state, target_cache=cache)
    return settle(plan, draft_params, state, proposal, logits, taps, noise, sampling, limits)


def _origins(proposal: Proposal, num_accepted) -> Int[Array, "B gamma_plus_1"]:
    """The origin of each token that the block may emit."""
    index = jnp.arange(proposal.tokens.shape[1] + 1, dtype=jnp.int32)[None]
    last = jnp.where(num_accepted < proposal.num_drafted, RECOVERED, BONUS)[:, None]
    return jnp.where(index < num_accepted[:, None], ACCEPTED, last).astype(jnp.int32)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def run(
    plan: Plan, params: Any, draft_params: Any, state: DecodeState, sampling: Sampling, limits: Limits
) -> DecodeState:
    """Blocks until all rows have ended, or up to `limits.iterations`. One `while_loop`; the host is asked nothing."""
    state = dataclasses.replace(state, done=state.done | (limits.max_new_tokens <= 0))
    return jax.lax.while_loop(
        lambda state: ~jnp.all(state.done) & (state.iterations < limits.iterations),
        lambda state: block(plan, params, draft_params, state, sampling, limits),
        state,
    )


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
    """Plain sampling through the loop (gamma = 0): each row continues right after its own opening.

    Returns:
      tokens `[B, text_slots + max_new_tokens]`, zero beyond each row's end, and the rows' lengths.
    """
    batch, slots = prompts.shape[0], model.text_slots(prompts.shape[1])
    plan = Plan(model, None, Lossless(), 0, capacity_for(slots, max_new_tokens, 0), greedy)
    limits = Limits(jnp.full((batch,), max_new_tokens, jnp.int32), jnp.asarray(eos_ids or (-1,), jnp.int32))
    state = begin(plan, params, None, prompts, lengths, row_keys)
    state = run(plan, params, None, state, sampling, limits)
    width = slots + max_new_tokens
    index = jnp.arange(width, dtype=jnp.int32)[None]
    return jnp.where(index < state.lengths[:, None], state.tokens[:, :width], 0), state.lengths
