"""Histograms of a self-draft's confidence in accepted and in rejected tokens."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from specjax.decoding import batch, loop
from specjax.evaluation.engine import Method, Output
from specjax.runtime import processes

BINS = 20


@functools.partial(jax.jit, static_argnums=0)
def _confidence(drafter: Any, params: Any, draft_params: Any, texts: Int[Array, "B T"], prompt_lengths):
    """The draft's largest probability of the next token after each position, at temperature 1."""
    logits = drafter.score(draft_params, params, texts, prompt_lengths).astype(jnp.float32)
    return jnp.exp(jnp.max(logits, axis=-1) - jax.nn.logsumexp(logits, axis=-1))


def histogram(method: Method, prompts: Sequence[Sequence[int]], output: Output) -> dict[str, list[int]] | None:
    """Counts accepted tokens, and the first rejected token of each block, by confidence (arXiv 2404.18911, figure 4).

    An emitted token's origin tells whether a drafted token was accepted at its position, or rejected and replaced
    (recovered). One forward pass of the draft over the emitted text gives its confidence at these positions. Drafted
    tokens after a rejected one are not counted.

    Returns:
      {"accepted", "rejected"}: counts in `BINS` equal bins of [0, 1]; None for drafters that do not
      score texts, and for encoder-decoders.
    """
    plan = method.plan
    if plan.drafter is None or not plan.drafter.scores or plan.target.is_encoder_decoder:
        return None
    counts = {loop.ACCEPTED: np.zeros(BINS, int), loop.RECOVERED: np.zeros(BINS, int)}
    for prompt, emitted, origins in zip(prompts, output.tokens, output.origins, strict=True):
        text, _ = batch.pad([[*prompt, *emitted]], plan.capacity)
        lengths = np.asarray([len(prompt)], np.int32)
        confidence = processes.fetch(_confidence(plan.drafter, method.params, method.draft_params, text, lengths))[0]
        # The confidence at index t is that in the token at t + 1.
        confidence = confidence[len(prompt) - 1 : len(prompt) - 1 + len(emitted)]
        for origin, bins in counts.items():
            places = np.minimum((confidence[np.asarray(origins, int) == origin] * BINS).astype(int), BINS - 1)
            np.add.at(bins, places, 1)
    return {"accepted": counts[loop.ACCEPTED].tolist(), "rejected": counts[loop.RECOVERED].tolist()}
