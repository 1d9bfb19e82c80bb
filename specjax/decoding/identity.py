"""Compares speculative output with plain decoding token by token, and measures how close each differing choice was.

Two correct programs may choose differently if the two best candidates are nearly equal. A difference is a tie if the
gap between the reference's two best scores is below `TIE` (in float32); any other difference is a bug.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax.decoding.plan import Plan
from specjax.decoding.sampling import Noise, Sampling, Stream, probabilities, row_keys
from specjax.models.language_model import consecutive

TIE = 1e-5


@functools.partial(jax.jit, static_argnums=0)
def _gap(plan: Plan, params: Any, prompt, length, text, keys, position, sampling: Sampling):
    """The gap between the two best scores (logits, or log-probabilities plus noise) for the token at `position`."""
    start = plan.target.start(params, prompt, length, 0)
    hidden, _ = plan.target.extend(params, start, text, consecutive(text))
    logits = plan.target.head(params, jax.lax.dynamic_slice_in_dim(hidden, position - 1, 1, axis=1))
    if plan.greedy:
        scores = logits[:, 0]
    else:
        noise = Noise(keys, position[None], plan.greedy, plan.rule.shared_noise)
        probs = probabilities(logits, sampling, greedy=False)[:, 0]
        scores = noise.scores(probs, jnp.zeros((1,), jnp.int32), Stream.RECOVER)
    best, second = jax.lax.top_k(scores[0], 2)[0]
    return best - second


def compare(
    plan: Plan,
    params: Any,
    prompts: Sequence[Sequence[int]],
    reference: Sequence[Sequence[int]],
    output: Sequence[Sequence[int]],
    *,
    slots: int,
    seed: int,
    sampling: Sampling,
) -> dict:
    """Compares emitted tokens with those of plain decoding (`reference`), prompt by prompt.

    Returns:
      {"equal": number of prompts with equal tokens, "of": number of prompts, "differences": [{"prompt", "position",
      "top2_gap"}]}, with the first difference of each other prompt; `position` is an index into the emitted tokens.
    """
    differences = []
    for index, (prompt, plain, speculative) in enumerate(zip(prompts, reference, output, strict=True)):
        if list(plain) == list(speculative):
            continue
        pairs = zip(plain, speculative, strict=False)
        shared = min(len(plain), len(speculative))
        first = next((i for i, (a, b) in enumerate(pairs) if a != b), shared)
        opening = plan.target.start_text(prompt)
        row, read = (_padded(tokens, slots) for tokens in ([*opening, *plain], prompt))
        keys = row_keys(seed, np.asarray([index], np.int32))
        position = jnp.int32(len(opening) + first)
        gap = _gap(plan, params, read, jnp.asarray([len(prompt)]), row, keys, position, sampling)
        differences.append({"prompt": index, "position": first, "top2_gap": float(gap)})
    return {"equal": len(prompts) - len(differences), "of": len(prompts), "differences": differences}


def _padded(tokens: Sequence[int], slots: int) -> jax.Array:
    row = np.zeros((1, max(slots, len(tokens))), np.int32)
    row[0, : len(tokens)] = tokens
    return jnp.asarray(row)


def only_ties(identical: dict) -> bool:
    """Whether every difference is a tie."""
    return all(difference["top2_gap"] < TIE for difference in identical["differences"])
