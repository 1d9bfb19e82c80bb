"""Decodes lists of token ids with the loop: checks and pads prompts, times batches, and returns lists of token ids."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from specjax.decoding import loop
from specjax.decoding.plan import Plan, capacity_for, padded_length
from specjax.decoding.prefill import extend
from specjax.decoding.sampling import Sampling, row_keys
from specjax.decoding.statistics import Statistics
from specjax.models import kv_cache
from specjax.runtime import mesh as meshes
from specjax.runtime import processes
from specjax.runtime.errors import UserError
from specjax.runtime.timing import timed


@dataclasses.dataclass(frozen=True)
class BatchResult:
    """The result of decoding one batch.

    Attributes:
      tokens: emitted ids of each row, without the prompt.
      origins: the origin of each emitted token, as an index into `loop.ORIGINS`.
      statistics: counts as numpy arrays.
      executions: layer meters (`kv_cache.Meter`) of "target" and "draft", as numpy arrays, without prefill.
      prefill_seconds: wall-clock seconds of the target's and the drafter's prefill.
      decode_seconds: wall-clock seconds of all blocks.
      iterations: number of blocks that the batch ran.
      compile_seconds: wall-clock seconds of compiling the two, which neither of them includes.
    """

    tokens: list[list[int]]
    origins: list[list[int]]
    statistics: Statistics
    executions: dict[str, list[kv_cache.Meter]]
    prefill_seconds: float
    decode_seconds: float
    iterations: int
    compile_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        return self.prefill_seconds + self.decode_seconds

    def counts(self, rows: int) -> dict[str, np.ndarray]:
        """Counts of the first `rows` rows (the others are padding), as the fields of `reporting.metrics.Counts`."""
        statistics = self.statistics
        return {
            "emitted": np.asarray([len(row) for row in self.tokens[:rows]], np.int32),
            "target_calls": statistics.target_calls[:rows],
            "drafted": statistics.drafted[:rows],
            "accepted": statistics.accepted_at[:rows].sum(1, dtype=np.int32),
            "drafted_at": statistics.drafted_at[:rows],
            "accepted_at": statistics.accepted_at[:rows],
            "emitted_more_than": statistics.emitted_more_than[:rows],
        }


def prompt_slots(prompts: Sequence[Sequence[int]]) -> int:
    """The padded length of a batch of these prompts."""
    return padded_length(max(map(len, prompts)))


def check_prompts(
    prompts: Sequence[Sequence[int]], *, vocab_size: int, max_new_tokens: int, max_positions: int
) -> None:
    """Raises UserError for an empty prompt, an id outside the vocabulary, or a text that may exceed `max_positions`."""
    if not prompts:
        raise UserError("There are no prompts to continue; give at least one.")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be at least 1, not {max_new_tokens}.")
    for number, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise UserError(f"Prompt {number} is empty; decoding starts from at least one token.")
        low, high = min(prompt), max(prompt)
        if low < 0 or high >= vocab_size:
            bad = low if low < 0 else high
            raise UserError(
                f"Prompt {number} has token id {bad}, outside the vocabulary of {vocab_size}; "
                "encode it with this model's tokenizer."
            )
        if len(prompt) + max_new_tokens > max_positions:
            raise UserError(
                f"Prompt {number} has {len(prompt)} tokens, which with {max_new_tokens} new ones exceed the model's "
                f"{max_positions} positions; shorten the prompt or lower max_new_tokens."
            )


def pad(prompts: Sequence[Sequence[int]], slots: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids `[B, slots]`, right-padded with 0, and lengths `[B]`."""
    tokens = np.zeros((len(prompts), slots), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    return tokens, np.asarray([len(prompt) for prompt in prompts], np.int32)


@dataclasses.dataclass(frozen=True)
class Placer:
    """Shards host arrays `[rows, ...]`, which are the same in every process, by rows over the batch axes of a mesh.

    Attributes:
      mesh: the mesh; None is the default device.
    """

    mesh: jax.sharding.Mesh | None = None

    @property
    def _ways(self) -> int:
        return 1 if self.mesh is None else self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    def rows(self, count: int) -> int:
        """The smallest number of rows, at least `count`, that divides evenly over the devices."""
        return -(-count // self._ways) * self._ways

    def __call__(self, array: np.ndarray) -> jax.Array:
        if self.mesh is None:
            return jax.device_put(array)
        axes = ("batch" if array.shape[0] % self._ways == 0 else None, *[None] * (array.ndim - 1))
        return meshes.place(array, jax.NamedSharding(self.mesh, meshes.spec(axes)))


@dataclasses.dataclass
class Conversation:
    """The caches that `decode` leaves, so that a later call prefills only what its texts add to the earlier ones.

    Pass the same object to every call of one conversation, with the same models. The result is that of a call without
    it. Caches are computed anew where they cannot be extended: if the plan or the number of rows changed (when a text
    outgrows the capacity), for an encoder-decoder, and if rotary embeddings depend on the prompt's length.

    Attributes:
      plan: the plan of the last call.
      state: its last state; None before the first call.
      texts: the tokens of each row of the state: prompt and emitted tokens.
      reused: number of first tokens of each prompt that the last call found in the caches.
    """

    plan: Plan | None = None
    state: loop.DecodeState | None = None
    texts: Sequence[Sequence[int]] = ()
    reused: Sequence[int] = ()

    def take(self, plan: Plan, prompts: Sequence[Sequence[int]]) -> tuple[Any, np.ndarray]:
        """The state to extend (or None), and how many first tokens of each prompt it holds. The caller donates it."""
        state, self.state = self.state, None
        starts = np.zeros((len(prompts),), np.int32)
        usable = state is not None and self.plan == plan and len(state.lengths) == len(prompts)
        if not usable or plan.target.is_encoder_decoder or kv_cache.depends_on_prompt(state):
            return None, starts
        for row, (old, new) in enumerate(zip(self.texts, prompts, strict=True)):
            differs = (i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b)
            starts[row] = next(differs, min(len(old), len(new)))
        return state, starts


# Places arrays on the default device.
HERE = Placer()


def make_limits(max_new_tokens: Sequence[int], eos_ids: Sequence[int], put: Placer) -> loop.Limits:
    """The limits of rows that emit up to so many tokens each.

    Limits of equally many rows and `eos_ids` share an executable, also those that end `run` after some blocks.
    """
    room, eos = np.asarray(max_new_tokens, np.int32), tuple(eos_ids) or (-1,)
    return loop.Limits(put(room), jnp.asarray(eos, jnp.int32), jnp.int32(2**31 - 1))


# Number of blocks after which rows are asked for their ends.
_END_BLOCKS = 16


def decode(
    plan: Plan,
    params: Any,
    draft_params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    indices: Sequence[int],
    seed: int,
    sampling: Sampling,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    put: Placer = HERE,
    size: int | None = None,
    blocks: int | None = None,
    on_blocks: Callable[[BatchResult], bool | None] | None = None,
    end_of: Callable[[Sequence[int], Sequence[int]], int | None] | None = None,
    conversation: Conversation | None = None,
) -> BatchResult:
    """Continues one batch of prompts. Every process of a run must make the same call, and gets the complete result.

    Args:
      indices: index of each prompt in the whole run; with `seed` it determines the row's random numbers.
      put: places arrays on devices.
      size: minimum number of rows of the compiled batch. Padding rows, also those added to divide evenly over devices,
        emit nothing and are not in the result's tokens.
      blocks: number of blocks between calls of `on_blocks` with the result so far; None runs all blocks at once.
      on_blocks: if it returns True, all rows end there.
      end_of: (prompt, emitted tokens) -> number of these tokens at which the text ends, or None, as for stop strings.
        It is asked after every `blocks` blocks (by default `_END_BLOCKS`). Tokens and counts are those until the end;
        seconds, iterations and layer meters include all blocks that ran.
      conversation: keeps the caches for the next call, and has those of the last one.

    Raises:
      UserError: if the target's logits are not finite. A draft's are logged, and its token comes from the target.
    """
    count, rows = len(prompts), put.rows(max(size or 0, len(prompts)))
    room = [max_new_tokens] * count + [0] * (rows - count)
    places = np.asarray([*indices, *[0] * (rows - count)], np.int32)
    limits, conversation = make_limits(room, eos_ids, put), conversation or Conversation()
    padded = [*prompts, *[prompts[-1]] * (rows - count)]
    _check_room(plan, padded, max_new_tokens)
    models, keys = (plan, params, draft_params), row_keys(seed, put(places))
    state, prefill_seconds, compile_seconds = _prefilled(models, padded, keys, put, conversation)
    decode_seconds, iterations, lengths_kept = 0.0, 0, {}
    blocks = _END_BLOCKS if blocks is None and end_of is not None else blocks
    while True:
        if blocks is not None:
            iterations += blocks
            limits = dataclasses.replace(limits, iterations=jnp.int32(iterations))
        run = lambda state=state, limits=limits: loop.run(plan, params, draft_params, state, sampling, limits)
        state, seconds, compiled = timed(run)
        decode_seconds, compile_seconds = decode_seconds + seconds, compile_seconds + compiled
        seconds = {"decode_seconds": decode_seconds, "compile_seconds": compile_seconds}
        result, done = _result(state, count, prefill_seconds=prefill_seconds, **seconds)
        emitted = result.tokens + [[]] * (rows - count)  # before a cut at a stop string
        _check_finite(plan, result.statistics, indices)
        if end_of is not None:
            for row, tokens in enumerate(result.tokens):
                end = lengths_kept.get(row) or end_of(prompts[row], tokens)
                lengths_kept |= {} if end is None else {row: end}
            done[list(lengths_kept)] = True
            state = dataclasses.replace(state, done=put(done))
            result = _cut(plan.gamma, result, lengths_kept)
        result = _origins_only(result)
        stopped = on_blocks is not None and on_blocks(result)
        if blocks is None or stopped or done.all():
            _warn_of_failed_drafts(result.statistics)
            texts = [[*prompt, *tokens] for prompt, tokens in zip(padded, emitted, strict=True)]
            conversation.plan, conversation.state, conversation.texts = plan, state, texts
            return result


def _prefilled(
    models: tuple[Plan, Any, Any], prompts: Sequence[Sequence[int]], keys, put: Placer, conversation: Conversation
) -> tuple[loop.DecodeState, float, float]:
    """The state before the first block, from the conversation's caches if it has any, timed as by `timed`."""
    plan = models[0]
    tokens, lengths = pad(prompts, plan.prompt_slots or prompt_slots(prompts))
    state, starts = conversation.take(plan, prompts)
    conversation.reused = starts.tolist()
    tokens, lengths, starts = jax.block_until_ready((put(tokens), put(lengths), put(starts)))
    jax.block_until_ready(keys)
    if state is None:
        return timed(lambda: loop.prefill(*models, tokens, lengths, keys))
    state = dataclasses.replace(state, row_keys=keys)
    return timed(lambda: extend(*models, state, tokens, lengths, starts))


def _check_room(plan: Plan, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Raises ValueError if blocks or chunks would write past the caches, which `write_rows` would not notice."""
    text_slots = plan.target.text_slots(max(map(len, prompts)))
    needed = capacity_for(text_slots, max_new_tokens, plan.gamma, plan.chunk)
    if needed > plan.capacity:
        raise ValueError(f"texts that need {needed} slots do not fit a cache of {plan.capacity} slots")


def _warn_of_failed_drafts(statistics: Statistics) -> None:
    if failures := int(statistics.failed_drafts.sum()):
        message = "the draft's logits were not finite in %d of %d blocks, whose next token came from the target"
        logging.warning(message, failures, int(statistics.target_calls.sum()))


def _check_finite(plan: Plan, statistics: Statistics, indices: Sequence[int]) -> None:
    """Raises UserError if the target's logits were not finite in any row."""
    failed = [index for index, row in zip(indices, statistics.failed, strict=False) if row]
    if failed:
        dtype = plan.target.config.compute_dtype
        raise UserError(
            f"the target's logits for prompt {failed[0]} are not finite (NaN or infinity) in {dtype}; "
            "set compute_dtype to bfloat16 or float32, and if it is one of these, check the checkpoint's weights"
        )


def _result(state: loop.DecodeState, count: int, **seconds: float) -> tuple[BatchResult, np.ndarray]:
    """The result so far, with tokens and `DecodeState.origins` of the first `count` rows, and which rows have ended."""
    meters = {"target": kv_cache.meters(state.target_cache), "draft": kv_cache.meters(state.drafter_state)}
    spans = (state.prompt_lengths, state.lengths)
    wanted = (state.tokens, state.origins, *spans, state.statistics, meters, state.iterations, state.done)
    all_tokens, all_origins, starts, ends, statistics, meters, iterations, done = processes.fetch(wanted)
    spans = [slice(int(start), int(end)) for start, end in zip(starts[:count], ends, strict=False)]
    result = BatchResult(
        tokens=[row[span].tolist() for row, span in zip(all_tokens, spans, strict=False)],
        origins=[row[span].tolist() for row, span in zip(all_origins, spans, strict=False)],
        statistics=statistics,
        executions=meters,
        iterations=int(iterations),
        **seconds,
    )
    return result, np.array(done)


def _origins_only(result: BatchResult) -> BatchResult:
    """The result with the origins alone, without the numbers that `DecodeState.origins` adds."""
    return dataclasses.replace(result, origins=[[code % len(loop.ORIGINS) for code in row] for row in result.origins])


def _cut(gamma: int, result: BatchResult, ends: dict[int, int]) -> BatchResult:
    """Cuts rows to their first `ends[row]` tokens, with the counts as if the last of these were an EOS."""
    tokens, origins = list(result.tokens), list(result.origins)
    counts = {field.name: np.array(getattr(result.statistics, field.name)) for field in dataclasses.fields(Statistics)}
    for row, end in ends.items():
        codes = np.asarray(origins[row])
        kinds, drafted = codes % len(loop.ORIGINS), codes // len(loop.ORIGINS)
        lasts = np.flatnonzero(kinds != loop.ACCEPTED)  # every block ends with such a token, but the text's last one
        lasts = lasts if len(lasts) and lasts[-1] == len(codes) - 1 else np.append(lasts, len(codes) - 1)
        emitted = np.diff(lasts, prepend=-1)
        accepted = emitted - (kinds[lasts] != loop.ACCEPTED)
        # A block that ends with a bonus token has accepted all that it drafted; of the last block the total is known.
        drafted = np.where(kinds[lasts] == loop.RECOVERED, drafted[lasts], accepted)
        drafted[-1] = counts["drafted"][row] - drafted[:-1].sum()
        inside = np.clip(end - (lasts + 1 - emitted), 0, emitted)  # how many tokens of each block are left
        accepted, inside, drafted = (each[inside > 0] for each in (accepted, inside, drafted))
        drafted[-1] = min(drafted[-1], inside[-1])
        numbers = (jnp.asarray(each, jnp.int32) for each in (accepted, inside, drafted))
        blocks = Statistics.zeros(len(drafted), gamma).after(*numbers)
        for name in counts.keys() - {"failed_drafts", "failed"}:
            counts[name][row] = np.asarray(getattr(blocks, name)).sum(0)
        tokens[row], origins[row] = tokens[row][:end], origins[row][:end]
    return dataclasses.replace(result, tokens=tokens, origins=origins, statistics=Statistics(**counts))


def join_counts(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Concatenates the counts of several batches; prompts keep their order."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def layers_per_token(results: Sequence[tuple[int, BatchResult]], layers: int) -> dict[str, float]:
    """Layer executions per emitted token, without prefill, as counted by the meters of the caches.

    One execution is one layer running on one token of one row.

    Args:
      results: (number of rows that are not padding, result) of each batch.
      layers: number of layers of the target.

    Returns:
      `target_layers_per_token`: executions of target layers, drafting included, on pending and drafted tokens;
      `target_layers_per_token_padded`: the same on all columns of all rows, padding included: the work of the device;
      `draft_layers_per_token`, `draft_layers_per_token_padded`: the same for the layers of the draft model or adapter;
      `target_layers_per_token_once`: target executions if each layer ran once on every pending and drafted token:
      layers * (target calls + drafted) / emitted (arXiv 2404.18911: a self-draft's first layers are not run again).
    """
    emitted = sum(len(row) for rows, result in results for row in result.tokens[:rows])
    per_token = lambda total: float(total) / emitted
    rates = {}
    for name in ("target", "draft"):
        meters = [(rows, meter) for rows, result in results for meter in result.executions[name]]
        rates[f"{name}_layers_per_token"] = per_token(sum(meter.own[:rows].sum() for rows, meter in meters))
        padded = sum(int(meter.columns) * len(meter.own) for _, meter in meters)
        rates[f"{name}_layers_per_token_padded"] = per_token(padded)
    counts = [result.counts(rows) for rows, result in results]
    tokens = sum(count["target_calls"].sum() + count["drafted"].sum() for count in counts)
    return {**rates, "target_layers_per_token_once": per_token(layers * tokens)}
