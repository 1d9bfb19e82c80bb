"""Compares speculative output with plain decoding token by token, and tells ties from true differences.

Two correct programs may choose differently if two candidates are nearly equal, because they round differently. Between
a step with one token, a verification and a forward of the whole text, logits differed by up to 66 eps of float32, and
by up to 10 eps of bfloat16 and float16, in units of the logits' standard deviation over the vocabulary (random decoders
of 2 to 16 layers, width up to 512, on CPU). A difference is a tie if the scores of both chosen tokens are within about
twice that of the best score; any other difference is a bug.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from specjax.decoding.batch import pad
from specjax.decoding.plan import Plan
from specjax.decoding.sampling import Noise, Sampling, probabilities, row_keys
from specjax.models.language_model import consecutive
from specjax.runtime.dtypes import rounding


def tie_bound(dtype: str, spread: Float[Array, "..."]) -> Float[Array, "..."]:
    """The difference of two logits below which rounding can exchange them.

    It is 16 eps of the compute dtype, and at least 128 eps of float32 (sums of many terms), times the spread. On GPUs
    and TPUs float32 has the eps of what products round their inputs to, see `dtypes.rounding`.

    Args:
      dtype: name of the dtype of the activations.
      spread: standard deviation of the logits over the vocabulary.
    """
    return max(16 * rounding(dtype), 128 * float(jnp.finfo(jnp.float32).eps)) * spread


@functools.partial(jax.jit, static_argnums=0)
def _judge(plan: Plan, params: Any, prompt, length, text, keys, position, chosen: Int[Array, "2"], sampling: Sampling):
    """The gap between the two best scores for the token at `position`, the tie bound, and whether `chosen` is a tie.

    Scores are logits, or log-probabilities plus noise. A token whose place at the edge of top-k, top-p or min-p depends
    on rounding is also a tie.
    """
    # With a cache, rotary embeddings that depend on the prompt's length are those of decoding.
    start = plan.target.start(params, prompt, length, text.shape[1])
    hidden, _ = plan.target.extend(params, start, text, consecutive(text))
    logits = plan.target.head(params, jax.lax.dynamic_slice_in_dim(hidden, position - 1, 1, axis=1))
    finite = jnp.isfinite(logits)
    bound = tie_bound(plan.target.config.compute_dtype, jnp.std(logits, where=finite))
    scores, at_edge = logits[0, 0], jnp.zeros((2,), bool)
    if not plan.greedy:
        noise = Noise(keys, position[None], plan.greedy, plan.rule.shared_noise)
        probs = probabilities(logits, sampling, greedy=False)[:, 0]
        scores = noise.perturbed(probs, jnp.zeros((1,), jnp.int32))[0]

        def survives(token, change):  # the cuts, if its logit and the mass that they keep change by so much
            top_p = None if sampling.top_p is None else jnp.clip(sampling.top_p + change, 0, 1)
            moved = dataclasses.replace(sampling, top_p=top_p)
            return probabilities(logits.at[0, 0, token].add(change), moved, greedy=False)[0, 0, token] > 0

        at_edge = jnp.stack([survives(token, bound) != survives(token, -bound) for token in chosen])
        bound = bound / sampling.temperature
    best, second = jax.lax.top_k(scores, 2)[0]
    return best - second, bound, jnp.all(best - scores[chosen] <= bound) | jnp.any(at_edge)


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
      "top2_gap", "tie_bound", "tie"}]}, with the first difference of each other prompt; `position` is an index into the
      emitted tokens. A text that only ends earlier than the other is no tie.
    """
    differences = []
    for index, (prompt, plain, speculative) in enumerate(zip(prompts, reference, output, strict=True)):
        if list(plain) == list(speculative):
            continue
        pairs = list(zip(plain, speculative, strict=False))
        first = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        chosen = jnp.asarray(pairs[first] if first < len(pairs) else (0, 0), jnp.int32)
        opening = plan.target.start_text(prompt)
        text, read = [*opening, *plain], pad([prompt], max(slots, len(prompt)))
        row, _ = pad([text], max(slots, len(text)))
        keys = row_keys(seed, np.asarray([index], np.int32))
        position = jnp.int32(len(opening) + first)
        gap, bound, tie = _judge(plan, params, *read, row, keys, position, chosen, sampling)
        numbers = {"top2_gap": float(gap), "tie_bound": float(bound), "tie": bool(tie) and first < len(pairs)}
        differences.append({"prompt": index, "position": first, **numbers})
    return {"equal": len(prompts) - len(differences), "of": len(prompts), "differences": differences}
