"""How confident a self-draft was in its tokens, by whether they were accepted."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from specjax.decoding import batch, loop
from specjax.evaluation.engine import Method, Output
from specjax.runtime import processes

BINS = 20


@functools.partial(jax.jit, static_argnums=0)
def _confidence(drafter: Any, params: Any, draft_params: Any, texts: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """The draft's largest probability at temperature 1 of the token after each position."""
    logits = drafter.score(draft_params, params, texts).astype(jnp.float32)
    return jnp.exp(jnp.max(logits, axis=-1) - jax.nn.logsumexp(logits, axis=-1))


def histogram(method: Method, prompts: Sequence[Sequence[int]], output: Output) -> dict[str, list[int]] | None:
    """Accepted tokens, and first rejected tokens of a block, by the draft's confidence (arXiv 2404.18911, figure 4).

    This needs no data from the decoding loop. An emitted token's origin says whether a drafted token was accepted there
    or rejected and replaced (recovered); one forward pass of the draft over the emitted text gives its confidence at
    these positions. Drafted tokens after a rejected one are not counted.

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
        confidence = processes.fetch(_confidence(plan.drafter, method.params, method.draft_params, text))[0]
        # The value at a token's position is about the next token.
        confidence = confidence[len(prompt) - 1 : len(prompt) - 1 + len(emitted)]
        for origin, bins in counts.items():
            places = np.minimum((confidence[np.asarray(origins, int) == origin] * BINS).astype(int), BINS - 1)
            np.add.at(bins, places, 1)
    return {"accepted": counts[loop.ACCEPTED].tolist(), "rejected": counts[loop.RECOVERED].tolist()}
