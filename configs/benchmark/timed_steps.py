"""Times cases in alternation, and single steps of a model, for measurements on an idle machine.

A step runs many times in one compiled loop, because a single dispatch can take longer than a step. Each iteration
depends on the result of the previous one; otherwise the compiler would hoist or remove it.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from specjax.models.language_model import LanguageModel


def in_turns(cases: Sequence[tuple[Callable, Callable]], repeats: int) -> list[list[float]]:
    """Times several cases in alternation, so that a slow phase of the machine affects all of them.

    Args:
      cases: pairs (fresh, call); `call(fresh())` is one run, of which only `call` is timed.
      repeats: number of timed rounds, after one more round to warm up.

    Returns:
      For each case the seconds of its timed runs.
    """
    seconds: list[list[float]] = [[] for _ in cases]
    for repeat in range(repeats + 1):
        for turn in range(len(cases)):
            # The order of the cases rotates from round to round.
            index = (turn + repeat) % len(cases)
            fresh, call = cases[index]
            inputs = jax.block_until_ready(fresh())
            started = time.perf_counter()
            jax.block_until_ready(call(inputs))
            if repeat:
                seconds[index].append(time.perf_counter() - started)
    return seconds


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
    """Functions (make the inputs, run) for `in_turns`; one run is `step.steps` calls of the model.

    The cache is filled with zeros, because its content does not affect the time; `context` must fit its capacity.
    """
    tokens = jnp.zeros((step.batch, step.tokens), jnp.int32)
    start = jnp.full((step.batch,), step.context - 1, jnp.int32)
    fresh = lambda: step.model.start(params, tokens, start, step.capacity)
    return fresh, lambda cache: _steps(step, params, cache, tokens, start)
