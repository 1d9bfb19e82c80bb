"""How sure a draft was of its tokens, beside what became of them."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from specjax.decoding import batch, loop
from specjax.runtime import processes

BINS = 20


@functools.partial(jax.jit, static_argnums=0)
def _confidence(drafter: Any, params: Any, draft_params: Any, texts: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """The largest probability at temperature 1 of what follows each token."""
    logits = drafter.score(draft_params, params, texts).astype(jnp.float32)
    return jnp.exp(jnp.max(logits, axis=-1) - jax.nn.logsumexp(logits, axis=-1))


def histogram(
    plan: loop.Plan,
    params: Any,
    draft_params: Any,
    prompts: Sequence[Sequence[int]],
    output: Sequence[tuple[int, batch.BatchResult]],
) -> dict[str, list[int]] | None:
    """Drafted tokens that were accepted, and those that were the first of their block to be refused, by confidence.

    Decoding is not asked: the origins of the emitted tokens say where a drafted token stood (accepted) or was replaced
    (recovered), and one forward of the draft over the emitted text says how sure it was at each of these places (as
    in Kangaroo, arXiv 2404.18911, figure 4). What stood behind a refused token is in neither count.

    Args:
      output: (rows that count, result) of each batch of the prompts.

    Returns:
      {"accepted", "rejected"}: counts in `BINS` equal bins of [0, 1]; None for drafters that do not score texts, and
      for targets that read their prompt apart.
    """
    if plan.drafter is None or not plan.drafter.scores or plan.target.is_encoder_decoder:
        return None
    tokens = [row for rows, result in output for row in result.tokens[:rows]]
    origins = [row for rows, result in output for row in result.origins[:rows]]
    counts = {loop.ACCEPTED: np.zeros(BINS, int), loop.RECOVERED: np.zeros(BINS, int)}
    for prompt, emitted, origin in zip(prompts, tokens, origins, strict=True):
        text, _ = batch.pad([[*prompt, *emitted]], plan.capacity)
        sure = processes.fetch(_confidence(plan.drafter, params, draft_params, text))[0]
        # What is said behind a token is about the next one.
        sure = sure[len(prompt) - 1 : len(prompt) - 1 + len(emitted)]
        for kind, bins in counts.items():
            places = np.minimum((sure[np.asarray(origin, int) == kind] * BINS).astype(int), BINS - 1)
            np.add.at(bins, places, 1)
    return {"accepted": counts[loop.ACCEPTED].tolist(), "rejected": counts[loop.RECOVERED].tolist()}
