"""The state of decoding, and prefill: the caches of texts are filled in chunks of one size.

One compiled program serves prompts of every length, because it takes texts padded to the capacity and loops over as
many chunks as the longest row needs. `extend` continues from caches that already hold the beginning of the texts, such
as the earlier turns of a conversation.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key

from specjax.decoding.drafters.base import Chunk, Prompts
from specjax.decoding.plan import Plan
from specjax.decoding.statistics import Statistics
from specjax.models import kv_cache
from specjax.models.language_model import extend_through
from specjax.runtime import mesh as meshes
from specjax.runtime.mesh import axes, constrain

# How a token came into the text; reports colour tokens by it.
PROMPT, ACCEPTED, RECOVERED, BONUS, PLAIN = range(5)
ORIGINS = ("prompt", "accepted", "recovered", "bonus", "plain")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """The state of decoding between blocks.

    Attributes:
      tokens: prompt and emitted tokens, `tokens[b, :lengths[b]]`; later slots are undefined.
      origins: index into `ORIGINS` for each slot of `tokens`; for a recovered token, `len(ORIGINS)` times the number of
        drafted tokens of its block is added.
      lengths: number of committed tokens, including the pending one.
      prompt_lengths: number of tokens before the first emitted one: the prompt's, or 1 for a start token.
      done: whether the row has ended.
      row_keys: one random key per row.
      target_cache: the target's keys and values, valid below position `lengths - 1`, and its layer meter.
      statistics: counts for each row.
      iterations: number of blocks that the batch has run.
      drafter_state: the drafter's own state.
    """

    tokens: Int[Array, "B S"] = axes("batch", None)
    origins: Int[Array, "B S"] = axes("batch", None)
    lengths: Int[Array, "B"] = axes("batch")
    prompt_lengths: Int[Array, "B"] = axes("batch")
    done: Bool[Array, "B"] = axes("batch")
    row_keys: Key[Array, "B"] = axes("batch")
    target_cache: Any
    statistics: Statistics
    iterations: Int[Array, ""] = axes()
    drafter_state: Any

    @property
    def num_emitted(self) -> Int[Array, "B"]:
        return self.lengths - self.prompt_lengths

    @property
    def pending(self) -> Int[Array, "B"]:
        """The last committed token of each row."""
        return jnp.take_along_axis(self.tokens, self.lengths[:, None] - 1, axis=1)[:, 0]


def prefill(
    plan: Plan,
    params: Any,
    draft_params: Any,
    prompts: Int[Array, "B P"],
    lengths: Int[Array, "B"],
    row_keys: Key[Array, "B"],
) -> DecodeState:
    """Fills the caches with all tokens of each text but the last, which stays pending; emits nothing.

    Prompts are right-padded and have at least one token; `Plan.prompt_slots` columns share one executable. The models
    run on chunks of `plan.chunk` tokens of every row. Slots that a chunk writes past the end of a text are rewritten
    before a query reads them.

    Raises:
      ValueError: if the prompts have more columns than the caches have slots.
    """
    return compiled_prefill(plan.for_prefill, params, draft_params, prompts, lengths, row_keys)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def extend(
    plan: Plan,
    params: Any,
    draft_params: Any,
    state: DecodeState,
    texts: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    starts: Int[Array, "B"],
) -> DecodeState:
    """Replaces the texts of a state and prefills only their new tokens. Donates `state`.

    Rows are no longer done and have emitted nothing, counts are 0, and the random keys stay. Chunks start from position
    `starts` or earlier, because the caches of a decoded text lack its last tokens. Not for encoder-decoders, nor for
    rotary embeddings that depend on the prompt's length: their caches hold only the prompt that was prefilled.

    Args:
      plan: the `Plan.for_prefill` of decoding, so that few programs are compiled.
      texts: all tokens of each text, right-padded; `Plan.prompt_slots` columns share one executable.
      lengths: number of these tokens, at least 1.
      starts: number of first tokens of each text that are also the first ones in `state.tokens`.
    """
    # The target's cache lacks the pending token, the draft's its `lag`. The chunks must hold the new text's second-last
    # token, whose hidden state some drafters need.
    lag = plan.drafter.lag if plan.drafter is not None else 2
    starts = jnp.maximum(jnp.minimum(starts, jnp.minimum(state.lengths - lag, lengths - 2)), 0)
    state = dataclasses.replace(state, **_undecoded(plan, texts, lengths))
    state = _filled(plan, params, draft_params, state, starts)
    return _constrained(state, state_axes(plan, state))


def prefill_shapes(plan: Plan, params, draft_params, prompts, lengths, row_keys) -> list[Any]:
    """The shapes and dtypes of the arrays of the state that `prefill` returns, in the order of `jax.tree.leaves`."""
    arrays = prompts, lengths, row_keys
    return compiled_prefill.trace(plan.for_prefill, params, draft_params, *arrays).jaxpr.out_avals


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def refill(
    plan: Plan,
    params: Any,
    draft_params: Any,
    state: DecodeState,
    prompts: Int[Array, "R P"],
    lengths: Int[Array, "R"],
    row_keys: Key[Array, "R"],
    rows: Int[Array, "R"],
) -> DecodeState:
    """Prefills R prompts and replaces these rows of a state of B > R rows with them. Donates `state`.
    Other rows, the number of blocks and the columns of the meters stay. Rows from B on are dropped, so that one
    executable serves fewer prompts. `plan` is as in `extend`.
    """
    new = compiled_prefill(plan, params, draft_params, prompts, lengths, row_keys)

    def replaced(old: jax.Array, new: jax.Array) -> jax.Array:
        if old.shape == new.shape:  # it has no axis of rows
            return old
        if len(lengths) == 1:  # in place also on CPU, where a scatter is slow
            return jax.lax.dynamic_update_slice_in_dim(old, new, rows[0], 0)
        return old.at[rows].set(new, mode="drop")

    state = jax.tree.map(replaced, state, new)
    return _constrained(state, state_axes(plan, state))


def narrow(
    plan: Plan, params: Any, draft_params: Any, state: DecodeState, prompt_slots: int, rows: Int[Array, "R"]
) -> DecodeState:
    """The state of these rows alone, of a state of B > 1 rows whose prompts were padded to `prompt_slots`."""
    prompt = jax.ShapeDtypeStruct((1, prompt_slots), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    one = prefill_shapes(plan, params, draft_params, *prompt, state.row_keys[:1])
    of_rows = tuple(x.shape != one.shape for x, one in zip(jax.tree.leaves(state), one, strict=True))
    return _narrowed(state, rows, of_rows)


@functools.partial(jax.jit, static_argnums=0)
def compiled_prefill(plan: Plan, params, draft_params, prompts, lengths, row_keys) -> DecodeState:
    """The compiled part of `prefill`."""
    prompts, lengths = constrain(prompts, ("batch", None)), constrain(lengths, ("batch",))
    if plan.target.text_slots(prompts.shape[1]) > plan.capacity:
        raise ValueError(f"prompts of {prompts.shape[1]} tokens do not fit a cache of {plan.capacity} slots")
    cache = _constrained(plan.target.start(params, prompts, lengths, plan.capacity))
    texts, text_lengths = plan.target.start_texts(prompts, lengths)
    drafter_state = ()
    if plan.drafter is not None:
        with jax.named_scope("drafter_start"):
            drafter_state = plan.drafter.start(draft_params, params, Prompts(prompts, lengths, plan.capacity))
    rows = _undecoded(plan, texts, text_lengths)
    state = DecodeState(**rows, row_keys=row_keys, target_cache=cache, drafter_state=drafter_state)
    # The text of an encoder-decoder is one pending token.
    if not plan.target.is_encoder_decoder:
        state = _filled(plan, params, draft_params, state, jnp.zeros_like(lengths))
    # Constrain the sharding of every array. Otherwise the compiler replicates a cache that is only written so far over
    # the tensor axis, and its rows over `fsdp`.
    return _constrained(state, state_axes(plan, state))


@functools.partial(jax.jit, static_argnums=2)
def _narrowed(state: DecodeState, rows: Int[Array, "R"], of_rows: tuple[bool, ...]) -> DecodeState:
    arrays, structure = jax.tree.flatten(state)
    return structure.unflatten(x[rows] if one else x for x, one in zip(arrays, of_rows, strict=True))


def _undecoded(plan: Plan, texts: Int[Array, "B T"], lengths: Int[Array, "B"]) -> dict[str, Any]:
    """The fields of the state of texts that have emitted nothing, without keys, caches and the drafter's state."""
    batch, slots = lengths.shape[0], jnp.arange(plan.capacity)[None]
    return {
        "tokens": jnp.pad(texts, ((0, 0), (0, plan.capacity - texts.shape[1]))),
        "origins": jnp.where(slots < lengths[:, None], PROMPT, PLAIN).astype(jnp.int32),
        "lengths": lengths,
        "prompt_lengths": lengths,
        "done": jnp.zeros((batch,), bool),
        "statistics": jax.tree.map(jnp.asarray, Statistics.zeros(batch, plan.gamma)),
        "iterations": jnp.zeros((), jnp.int32),
    }


def _filled(plan: Plan, params, draft_params, state: DecodeState, starts: Int[Array, "B"]) -> DecodeState:
    """Runs the models on the texts from `starts` on, chunk by chunk, with meters set to 0 at the end."""
    ends = state.lengths - 1
    offsets = jnp.arange(plan.chunk, dtype=jnp.int32)[None]

    def run_chunk(carry):
        starts, cache, drafter_state = carry
        # A row that is complete writes the slots after its text, for which `capacity_for` leaves room.
        positions = jnp.minimum(starts, ends)[:, None] + offsets
        tokens = jnp.take_along_axis(state.tokens, jnp.minimum(positions, plan.capacity - 1), axis=1)
        with jax.named_scope("prefill"):
            _, cache, tap_states = through_target(plan, params, cache, tokens, positions, 0)
        if plan.drafter is not None:
            chunk = Chunk(tokens, positions, state.lengths, tap_states)
            with jax.named_scope("drafter_prefill"):
                drafter_state = plan.drafter.prefill(draft_params, params, drafter_state, chunk)
        return starts + plan.chunk, cache, drafter_state

    carry = starts, state.target_cache, state.drafter_state
    _, *filled = jax.lax.while_loop(lambda carry: jnp.any(carry[0] < ends), run_chunk, carry)
    cache, drafter_state = kv_cache.unmetered(tuple(filled))
    return dataclasses.replace(state, target_cache=cache, drafter_state=drafter_state)


def through_target(plan: Plan, params, cache, inputs, positions, first_layer: int):
    """Runs the target's layers from `first_layer` on. Returns last hidden states, cache, and the states at each tap."""
    # A drafter that resumes verification at its tapped layer has that layer's states itself.
    taps = [tap for tap in sorted(plan.drafter.taps if plan.drafter else ()) if tap > first_layer]
    layers = [*taps, plan.target.layers]
    states, cache = extend_through(plan.target, params, cache, inputs, positions, layers, first=first_layer)
    *tap_states, hidden = states
    return hidden, cache, tuple(tap_states)


def _constrained(tree: Any, tree_axes: list[tuple[str | None, ...]] | None = None) -> Any:
    """Constrains the arrays of a tree to these logical axes, or to those that its dataclasses declare."""
    arrays, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, map(constrain, arrays, tree_axes or meshes.declared_axes(tree)))


def state_axes(plan: Plan, state: DecodeState) -> list[tuple[str | None, ...]]:
    """The logical axes of every array of the state, in the order of `jax.tree.leaves`."""
    declared, arrays = meshes.declared_axes(state), jax.tree.leaves(state.drafter_state)
    first = len(declared) - len(arrays)  # the drafter's arrays come last
    replicated = lambda name: name == "kv_heads" and plan.replicate_draft
    of_draft = [tuple(None if replicated(name) else name for name in names) for names in declared[first:]]
    return [*declared[:first], *of_draft]
