"""Decodes prompts in a compiled batch whose rows take the next prompt when a text ends."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from specjax.decoding import loop
from specjax.decoding.batch import HERE, Conversation, Placer, make_limits, pad, prompt_slots
from specjax.decoding.plan import Plan, capacity_for
from specjax.decoding.prefill import extend, narrow, prefill_shapes, refill
from specjax.decoding.results import BatchResult, Row
from specjax.decoding.sampling import Sampling, row_keys
from specjax.decoding.statistics import Statistics
from specjax.models import kv_cache
from specjax.runtime import mesh as meshes
from specjax.runtime import process_memory, processes
from specjax.runtime.errors import UserError, first_line
from specjax.runtime.timing import timed

# Number of blocks after which rows are asked for their ends.
_END_BLOCKS = 16
# Rows that ended are refilled once they are this share of the batch, or one. A GPU copies prefixes of the caches each
# time, and prefills all of them as fast as one.
_SHARE_OF_A_REFILL = {"gpu": 1 / 8}
_SMALLEST_SHARE = 1 / 16
# On CPU, where a block takes longer with more rows, the last of many texts run in fewer rows: a half, and then a
# quarter, once so few are left. Fewer texts in all, or per row, are not worth compiling these programs.
_FEWEST_TEXTS, _FEWEST_TEXTS_PER_ROW, _NARROWEST = 64, 4, 4


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
    slots: int | None = None,
    blocks: int | None = None,
    on_blocks: Callable[[BatchResult], bool | None] | None = None,
    on_end: Callable[[int, Row, float, Any], None] | None = None,
    end_of: Callable[[Sequence[int], Sequence[int]], int | None] | None = None,
    conversation: Conversation | None = None,
) -> BatchResult:
    """Continues prompts. Every process of a run must make the same call, and gets the complete result.

    A row of the compiled batch whose text has ended takes the next prompt (`prefill.refill`). No text depends on the
    row that it is decoded in. If the batch has only as many rows as it is sharded over devices, or if all rows end
    together, the next prompts are prefilled together.

    Args:
      indices: index of each prompt in the whole run; with `seed` it determines the row's random numbers.
      put: places arrays on devices.
      slots: number of rows of the compiled batch; None for as many as prompts. Rows without a prompt, also those added
        to divide evenly over devices, emit nothing.
      blocks: number of blocks between calls of `on_blocks` with the result so far; None calls it only at the end.
      on_blocks: if it returns True, all rows end there and no further prompt starts.
      on_end: called when a text has ended, with its number in `prompts`, its result, the seconds of prefill and blocks
        so far, and what the drafter recorded for it (`Drafter.recorded`). It may raise an exception to stop.
      end_of: (prompt, emitted tokens) -> number of these tokens at which the text ends, or None, as for stop strings.
        It is asked after every `blocks` blocks (by default `_END_BLOCKS`). Tokens and counts are those until the end;
        seconds, iterations and layer executions include all blocks that ran.
      conversation: keeps the caches for the next call, and has those of the last one; for at most `slots` prompts.

    Raises:
      UserError: if the target's logits are not finite, or if the rows do not fit in memory. A draft's logits that are
        not finite are logged, and its token comes from the target.
    """
    _check_room(plan, prompts, max_new_tokens)
    rows = _Rows((plan, params, draft_params), prompts, put, put.rows(slots or len(prompts)), conversation)
    keys = lambda numbers: row_keys(seed, put(np.asarray([indices[number] for number in numbers], np.int32)))
    blocks = _END_BLOCKS if blocks is None and end_of is not None else blocks
    while True:
        rows.fill(keys)
        room = make_limits([0 if number is None else max_new_tokens for number in rows.numbers], eos_ids, put)
        ended = rows.run(sampling, room, blocks, end_of)
        _check_finite(plan, {indices[number]: rows.results[number] for number in ended})
        for number, row in ended.items() if on_end is not None else ():
            on_end(number, rows.results[number], rows.clock, rows.recorded(row))
        finished = rows.finished()
        if on_blocks is not None and (finished or blocks is not None) and on_blocks(rows.result()):
            finished = True
        if finished:
            result = rows.result()
            _warn_of_failed_drafts(result.statistics)
            if conversation is not None and len(prompts) <= len(rows.numbers):
                conversation.keep(plan, rows.state)
            return result
        rows.narrow()


class _Rows:
    """The rows of a compiled batch, each of which decodes a prompt and then the next one.

    Attributes:
      state: the state on the device.
      numbers: for each row the number of its prompt; None once it has ended.
      results: of each prompt, the result so far.
    """

    def __init__(self, models: tuple[Plan, Any, Any], prompts, put: Placer, rows: int, conversation):
        plan = models[0]
        self._models, self._prompts, self._put = models, prompts, put
        self._prefill_models = plan.for_prefill, *models[1:]
        self._conversation = conversation or Conversation()
        self._width = plan.prompt_slots or prompt_slots(prompts)
        self._next = 0  # the next prompt to start
        self._smallest = rows  # number of rows down to which the batch may be narrowed
        many = len(prompts) >= max(_FEWEST_TEXTS, _FEWEST_TEXTS_PER_ROW * rows)
        if many and put.rows(1) == 1 and meshes.platform() == "cpu":
            self._smallest = -(-rows // _NARROWEST)
        self.state, self.numbers = None, [None] * rows
        self.results = [Row.empty(plan.gamma)] * len(prompts)
        self._started = [0.0] * len(prompts)  # on the clock of all seconds of prefill and blocks
        self._seconds = {"prefill": 0.0, "decode": 0.0, "compile": 0.0}
        self._iterations = self._row_blocks = self._seen = 0  # `_seen` of the state's blocks are in the sums
        self._columns, self._padded = {"target": 0, "draft": 0}, {"target": 0, "draft": 0}

    @property
    def clock(self) -> float:
        """Seconds of prefill and blocks so far, without compiling."""
        return self._seconds["prefill"] + self._seconds["decode"]

    def _timed(self, part: str, call: Callable[[], Any]) -> tuple[Any, float]:
        """The result and the seconds of a call, which are added to those of this part."""
        try:
            result, seconds, compiled = timed(call)
        except RuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise UserError(
                f"{len(self.numbers)} rows with {self._models[0].capacity} slots do not fit in memory "
                f"({first_line(error)}); lower batch_size or max_new_tokens"
            ) from error
        self._seconds[part] += seconds
        self._seconds["compile"] += compiled
        return result, seconds

    def _live(self) -> int:
        return sum(number is not None for number in self.numbers)

    def _waiting(self) -> int:
        return len(self._prompts) - self._next

    def finished(self) -> bool:
        """Whether every text has ended."""
        return not self._live() and not self._waiting()

    def fill(self, keys: Callable[[Sequence[int]], jax.Array]) -> None:
        """Prefills waiting prompts in rows that have ended; `keys` makes the random keys of prompts."""
        free = [row for row, number in enumerate(self.numbers) if number is None]
        at_once = len(free) if len(free) == len(self.numbers) else self._refilled_at_once()
        if at_once == len(self.numbers) > len(free):
            return  # refilling would replace all rows
        while free and self._waiting():
            rows, free = free[:at_once], free[at_once:]
            numbers = list(range(self._next, min(self._next + len(rows), len(self._prompts))))
            self._next += len(numbers)
            for row, number in zip(rows, numbers, strict=False):
                self.numbers[row], self._started[number] = number, self.clock
            repeated = [*numbers, *[numbers[-1]] * (at_once - len(numbers))]
            padded = [self._prompts[number] for number in repeated]
            if at_once == len(self.numbers):
                self._prefill(padded, keys(repeated))
            else:
                places = [*rows[: len(numbers)], *[len(self.numbers)] * (at_once - len(numbers))]
                self._refill(padded, keys(repeated), np.asarray(places, np.int32))

    def _prefill(self, prompts: Sequence[Sequence[int]], keys: jax.Array) -> None:
        """Makes the state of these prompts, from the conversation's caches if it has any."""
        plan, conversation = self._models[0], self._conversation
        tokens, lengths = pad(prompts, self._width)
        self.state = None  # frees its memory
        state, starts = conversation.take(plan, prompts)
        conversation.reused = starts.tolist()
        arrays = jax.block_until_ready((self._put(tokens), self._put(lengths), self._put(starts), keys))
        tokens, lengths, starts, keys = arrays

        def call():
            if state is None:
                _check_memory(prefill_shapes(*self._models, tokens, lengths, keys), len(self.numbers), self._put)
                return loop.prefill(*self._models, tokens, lengths, keys)
            return extend(*self._prefill_models, dataclasses.replace(state, row_keys=keys), tokens, lengths, starts)

        self.state, _ = self._timed("prefill", call)
        self._seen, self._columns = 0, {"target": 0, "draft": 0}

    def _refill(self, prompts: Sequence[Sequence[int]], keys: jax.Array, places: np.ndarray) -> None:
        """Puts these prompts into some rows of the state."""
        arrays = *map(self._put, pad(prompts, self._width)), keys, self._put(places)
        self.state, _ = self._timed("prefill", lambda: refill(*self._prefill_models, self.state, *arrays))

    def run(self, sampling: Sampling, limits: loop.Limits, blocks: int | None, end_of: Callable | None):
        """Runs blocks until rows can be refilled, all have ended, or `blocks` ran. Returns what `_ended` does."""
        if blocks is not None:
            limits = dataclasses.replace(limits, iterations=jnp.int32(self._seen + blocks))
        limits = dataclasses.replace(limits, live=jnp.int32(self._live_at_return()))
        started = self.clock

        def call():
            self.state = loop.run(*self._models, self.state, sampling, limits)
            caches = {"target": self.state.target_cache, "draft": self.state.drafter_state}
            names = ("tokens", "origins", "prompt_lengths", "lengths", "statistics", "iterations", "done")
            meters = {name: kv_cache.meters(tree) for name, tree in caches.items()}
            return processes.fetch({name: getattr(self.state, name) for name in names} | {"meters": meters})

        fetched, seconds = self._timed("decode", call)
        return self._ended(fetched, started, seconds, end_of)

    def _refilled_at_once(self) -> int:
        """Rows that one call of `refill` prefills: all that are awaited on a GPU, else as few as the devices allow."""
        share = _SHARE_OF_A_REFILL.get(meshes.platform(), 0.0)
        return self._put.rows(max(1, int(len(self.numbers) * share)))

    def _live_at_return(self) -> int:
        """The number of live rows at which `loop.run` returns."""
        rows, at_once = len(self.numbers), self._refilled_at_once()
        if self._waiting() and at_once < rows:
            return max(self._live() - max(at_once, int(rows * _SMALLEST_SHARE)), 0)
        return rows // 2 if rows // 2 >= self._smallest else 0

    def _ended(self, state: dict[str, Any], started: float, seconds: float, end_of: Callable | None) -> dict[int, int]:
        """Updates all results from the fetched state after some blocks. Returns the row of each prompt that ended."""
        gamma, rows = self._models[0].gamma, len(self.numbers)
        blocks, self._seen = int(state["iterations"]) - self._seen, int(state["iterations"])
        self._iterations += blocks
        self._row_blocks += blocks * rows
        for name, meters in state["meters"].items():
            columns = sum(int(meter.columns) for meter in meters)
            self._padded[name] += (columns - self._columns[name]) * rows
            self._columns[name] = columns
        ended, done = {}, np.array(state["done"])
        for row, number in enumerate(self.numbers):
            if number is None:
                continue
            span = slice(int(state["prompt_lengths"][row]), int(state["lengths"][row]))
            first = started + seconds / max(blocks, 1) - self._started[number]
            result = Row(
                state["tokens"][row, span].tolist(),
                state["origins"][row, span].tolist(),
                jax.tree.map(lambda x, row=row: x[row : row + 1], state["statistics"]),
                {name: sum(int(meter.own[row]) for meter in meters) for name, meters in state["meters"].items()},
                self.results[number].first_token_seconds or first,
                self.clock - self._started[number],
            )
            end = end_of(self._prompts[number], result.tokens) if end_of is not None else None
            self.results[number] = result if end is None else result.first(end, gamma)
            if done[row] or end is not None:
                self.numbers[row], done[row] = None, True
                ended[number] = row
        if (done != state["done"]).any():
            self.state = dataclasses.replace(self.state, done=self._put(done))
        return ended

    def recorded(self, row: int) -> Any:
        """What the drafter recorded for this row, as numpy arrays; () for nothing."""
        drafter = self._models[0].drafter
        arrays = () if drafter is None else drafter.recorded(self.state.drafter_state)
        of_row = lambda array: jax.lax.dynamic_index_in_dim(array, np.int32(row), keepdims=False)
        return processes.fetch(jax.tree.map(of_row, arrays))

    def narrow(self) -> None:
        """Moves the last texts to a batch of half the rows, if they fit in there and no prompt waits."""
        rows, live = len(self.numbers), [row for row, number in enumerate(self.numbers) if number is not None]
        if self._waiting() or rows // 2 < self._smallest or len(live) > rows // 2:
            return
        remaining = [*live, *[row for row in range(rows) if row not in live]][: rows // 2]
        places = jnp.asarray(remaining, jnp.int32)
        self.state, _ = self._timed("decode", lambda: narrow(*self._models, self.state, self._width, places))
        self.numbers = [self.numbers[row] for row in remaining]
        self.narrow()

    def result(self) -> BatchResult:
        """The results of all prompts, complete or so far."""
        seconds = {f"{part}_seconds": value for part, value in self._seconds.items()}
        totals = {"iterations": self._iterations, "row_blocks": self._row_blocks}
        return BatchResult(list(self.results), dict(self._padded), **seconds, **totals)


def _check_memory(shapes: Sequence[Any], rows: int, put: Placer) -> None:
    """Raises UserError if arrays of these shapes, the state of some rows, need more than the devices' free memory."""
    needed = sum(math.prod(x.shape) * x.dtype.itemsize for x in shapes)
    devices = jax.local_devices()[:1] if put.mesh is None else put.mesh.local_devices
    free = process_memory.free_bytes(devices) * jax.process_count()  # processes have equally many devices
    if needed > free:
        raise UserError(
            f"{rows} rows need {needed / 1e9:.3g} GB for their caches, and {free / 1e9:.3g} GB are free, which is "
            f"enough for {int(rows * free / needed)}; lower batch_size or max_new_tokens"
        )


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


def _check_finite(plan: Plan, ended: dict[int, Row]) -> None:
    """Raises UserError if the target's logits were not finite in any of these rows, which have ended."""
    failed = [index for index, row in ended.items() if row.statistics.failed]
    if failed:
        dtype = plan.target.config.compute_dtype
        raise UserError(
            f"the target's logits for prompt {failed[0]} are not finite (NaN or infinity) in {dtype}; "
            "set compute_dtype to bfloat16 or float32, and if it is one of these, check the checkpoint's weights"
        )
