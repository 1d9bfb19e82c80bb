"""Times verifications by a random sparse target, and compares them with what the number of experts predicts."""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax.evaluation import expert_use, throughput
from specjax.models.config import DecoderConfig
from specjax.models.decoder import Decoder


def experts(config: Any) -> list[dict]:
    """A row for each number of tokens: seconds of a verification, and those predicted from some of the others."""
    model = Decoder(DecoderConfig.llama(**config.models.sparse.to_dict()))
    params = model.init(jax.random.key(config.seed))
    section = config.experts
    use = expert_use.measured(model, params, _texts(config, model.vocab_size))
    seconds = _seconds(config, model, params)
    touched = lambda drafted: use.touched(drafted + 1)
    known = {tokens - 1: seconds[tokens] for tokens in section.timed}
    predicted = throughput.interpolated(known, max(section.tokens) - 1, touched)
    by_tokens = throughput.interpolated(known, max(section.tokens) - 1)
    return [
        {
            "tokens": tokens,
            "experts": touched(tokens - 1),
            "milliseconds": 1e3 * seconds[tokens],
            "predicted_milliseconds": 1e3 * predicted[tokens - 1],
            "ratio": seconds[tokens] / predicted[tokens - 1],
            "ratio_if_linear_in_tokens": seconds[tokens] / by_tokens[tokens - 1],
        }
        for tokens in section.tokens
    ]


def _texts(config: Any, vocab_size: int) -> list[list[int]]:
    return np.random.default_rng(config.seed).integers(0, vocab_size, (8, config.experts.context)).tolist()


@functools.partial(jax.jit, static_argnums=0)
def _verify(model, params, cache, tokens, start):
    positions = start + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    hidden, _ = model.extend(params, cache, tokens, positions)
    return jnp.argmax(model.head(params, hidden), axis=-1)


def _seconds(config: Any, model: Decoder, params: Any) -> dict[int, float]:
    """The median seconds of a verification of each number of tokens, timed in turns."""
    prompt = jnp.asarray(_texts(config, model.vocab_size)[:1], jnp.int32)
    lengths = jnp.asarray([config.experts.context], jnp.int32)
    cache = model.start(params, prompt, lengths, config.experts.context + 2 * max(config.experts.tokens))
    positions = jnp.arange(config.experts.context, dtype=jnp.int32)[None]
    _, cache = jax.jit(model.extend)(params, cache, prompt, positions)
    random, timed = np.random.default_rng(config.seed + 1), {tokens: [] for tokens in config.experts.tokens}
    for turn in range(config.experts.rounds + 1):
        block = jnp.asarray(random.integers(0, model.vocab_size, (1, max(config.experts.tokens))), jnp.int32)
        for tokens in config.experts.tokens:
            fed = jax.block_until_ready(block[:, :tokens])
            started = time.perf_counter()
            jax.block_until_ready(_verify(model, params, cache, fed, jnp.int32(config.experts.context)))
            if turn:  # the first compiles
                timed[tokens].append(time.perf_counter() - started)
    return {tokens: float(np.median(each)) for tokens, each in timed.items()}
