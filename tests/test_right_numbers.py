"""Lengths of rotary embeddings, logits that are not finite, float32 heads, seeds: what toy settings do not show."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from specjax.decoding import scheduler
from specjax.decoding.sampling import Sampling, row_keys
from specjax.models.adapters import Adapter, AdapterConfig
from specjax.models.decoder import Decoder
from specjax.models.rotary import Rotary
from specjax.runtime.errors import UserError

LONG = {"short_factors": (1.0, 1.5, 2.0, 2.5), "long_factors": (2.0, 3.0, 4.0, 5.0)}
ROTARY = {
    "dynamic": Rotary(1e4, 8, "dynamic", factor=4.0, original_positions=16),
    "longrope": Rotary(1e4, 8, "longrope", factor=4.0, original_positions=16, **LONG),
}
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5], [2, 7, 1, 8, 2, 8, 1, 8, 2, 8, 4, 5], [1] * 20]


def rotated(kind):
    target, params, draft_params = tiny.target_and_draft()
    return Decoder(dataclasses.replace(target.config, rotary=ROTARY[kind])), params, draft_params


def texts(plan, params, draft_params, prompts, new=14, greedy=True, **how):
    settings = dict(indices=range(len(prompts)), seed=0, eos_ids=(), max_new_tokens=new)
    sampling = Sampling.of(0.0 if greedy else 1.0)
    return scheduler.decode(plan, params, draft_params, prompts, **{"sampling": sampling, **settings, **how})


@pytest.mark.parametrize("kind", ["dynamic", pytest.param("longrope", marks=pytest.mark.slow)])
def test_a_text_that_outgrows_the_original_length_does_not_depend_on_gamma_capacity_or_neighbours(kind):
    target, params, draft_params = rotated(kind)
    make = lambda drafter, gamma, **how: tiny.plan(
        target, drafter, tiny.drafter_options(drafter, target), gamma=gamma, slots=20, max_new=20, greedy=True, **how
    )
    plain = texts(make("ngram", 0), params, None, PROMPTS).tokens
    for drafter, gamma, spare in (("ngram", 4, 0), ("early_exit", 2, 40)):
        plan = make(drafter, gamma, spare=spare)
        assert [row[:14] for row in texts(plan, params, draft_params, PROMPTS, 16).tokens] == plain
    assert texts(make("ngram", 0, spare=30), params, None, PROMPTS[:1]).tokens == plain[:1]


@pytest.mark.parametrize("kind", ROTARY)
def test_a_cached_text_is_rotated_by_the_longer_of_its_prompt_and_each_position(kind):
    target, params, _ = rotated(kind)
    prompt_lengths, tokens = jnp.asarray([9, 12, 20]), jnp.asarray([(p * 3)[:24] for p in PROMPTS], jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(24, dtype=jnp.int32)[None], (3, 24))

    @jax.jit  # one program instead of hundreds of small ones
    def cached(params, tokens, positions):
        cache = target.start(params, tokens, prompt_lengths, 50)
        return target.head(params, target.extend(params, cache, tokens, positions)[0])

    logits = cached(params, tokens, positions)
    for row, length in enumerate(prompt_lengths.tolist()):
        # The prompt alone is one call without a cache, whose number of tokens is the length.
        alone = tiny.full_logits(target, params, tokens[row : row + 1, :length])
        np.testing.assert_allclose(logits[row : row + 1, :length], alone, atol=2e-5)
    # The factors matter here: the first prompt under the length of the others has other logits.
    longer = tiny.full_logits(target, params, tokens[:1])
    assert float(jnp.abs(longer[:, :9] - logits[:1, :9]).max()) > 1e-3


# --- logits that are not finite ------------------------------------------------------------------------------------


def damaged(params, value=jnp.nan):
    """Parameters whose final norm gives logits that are not finite."""
    return {**params, "norm": {"scale": params["norm"]["scale"].at[0].set(value)}}


@pytest.mark.parametrize(
    "greedy, rule, value",
    [(True, "lossless", np.inf), pytest.param(False, "coupled", np.nan, marks=pytest.mark.slow)],
)
def test_a_draft_whose_logits_are_not_finite_leaves_the_text_of_plain_decoding(greedy, rule, value, caplog):
    target, params, draft_params = tiny.target_and_draft()
    make = lambda gamma: tiny.plan(
        target, "model", {"model": target}, gamma=gamma, slots=20, max_new=20, greedy=greedy, rule=rule
    )
    plain = texts(make(0), params, None, PROMPTS, greedy=greedy)
    result = texts(make(3), params, damaged(draft_params, value), PROMPTS, greedy=greedy)
    assert result.tokens == plain.tokens
    assert result.statistics.drafted.sum() == 0
    assert (result.statistics.failed_drafts == result.statistics.target_calls).all()


@pytest.mark.parametrize(
    "drafter, gamma, greedy",
    [("ngram", 0, False), ("ngram", 2, True), pytest.param("model", 2, False, marks=pytest.mark.slow)],
)
def test_a_target_whose_logits_are_not_finite_is_refused_with_its_dtype(drafter, gamma, greedy):
    target, params, draft_params = tiny.target_and_draft()
    options = tiny.drafter_options(drafter, target)
    plan = tiny.plan(target, drafter, options, gamma=gamma, slots=20, max_new=20, greedy=greedy)
    with pytest.raises(UserError, match="logits for prompt 0 are not finite .* in float32"):
        texts(plan, damaged(params), draft_params, PROMPTS, greedy=greedy)


# --- float32 logits ------------------------------------------------------------------------------------------------


def _logits_of(kind):
    shape = dict(vocab_size=512, tied_head=False, compute_dtype="bfloat16", param_dtype="bfloat16")
    hidden = jax.random.normal(jax.random.key(0), (1, 1, 16)).astype(jnp.bfloat16)
    if kind == "encoder-decoder":
        model, params = tiny.encoder_decoder(**shape)
        return model.head(params, hidden)
    target = Decoder(tiny.config(**shape))
    params = target.init(jax.random.key(1))
    if kind == "target":
        return target.head(params, hidden)
    own = tiny.heads(target, 1) if kind == "medusa" else Adapter(AdapterConfig(target.config, 1, own_head=True))
    return own.head(own.init(jax.random.key(2)), target, params, hidden)


@pytest.mark.parametrize("kind", ["target", "encoder-decoder", "medusa", "adapter"])
def test_logits_leave_every_untied_head_in_float32(kind):
    logits = np.asarray(_logits_of(kind))
    assert logits.dtype == np.float32
    assert len(np.unique(logits)) >= 510, "rounded to bfloat16, 512 logits have about 415 values"


# --- seeds ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [-1, 2**32, 2**40 + 3])
def test_a_seed_that_jax_would_take_for_another_is_refused(seed):
    with pytest.raises(UserError, match=rf"seed must lie in 0 .. 4294967295, not {seed}"):
        row_keys(seed, np.arange(1))


def test_the_largest_seed_has_numbers_of_its_own():
    data = [jax.random.key_data(row_keys(seed, np.arange(2))).tolist() for seed in (0, 1, 2**31, 2**32 - 1)]
    assert len({str(keys) for keys in data}) == 4
