"""Lengths of rotary embeddings, logits that are not finite, float32 heads, seeds: what toy settings do not show."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from configs import common
from specjax import distill
from specjax.data.layouts import Example
from specjax.data.tasks import Task
from specjax.decoding import scheduler
from specjax.decoding.sampling import Sampling, row_keys
from specjax.distillation.evaluator import make_evaluator
from specjax.hub.save import save
from specjax.hub.tokenizer import train_byte_bpe
from specjax.models.adapters import Adapter, AdapterConfig
from specjax.models.decoder import Decoder
from specjax.models.rotary import Rotary
from specjax.models.vocabulary import draft_vocabulary
from specjax.runtime import mesh as meshes
from specjax.runtime.errors import UserError

LONG = {"short_factors": (1.0, 1.5, 2.0, 2.5), "long_factors": (2.0, 3.0, 4.0, 5.0)}
ROTARY = {
    "yarn": Rotary(1e4, 8, "yarn", factor=4.0, original_positions=16),
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


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dynamic", pytest.param("longrope", marks=pytest.mark.slow)])
def test_a_text_that_outgrows_the_original_length_does_not_depend_on_gamma_capacity_or_neighbours(kind):
    target, params, draft_params = rotated(kind)
    make = lambda drafter, gamma, **how: tiny.plan(
        target, drafter, tiny.drafter_options(drafter, target), gamma=gamma, slots=20, max_new=20, greedy=True, **how
    )
    plain = texts(make("ngram", 0), params, None, PROMPTS).tokens
    plan = make("early_exit", 2, spare=40)
    assert [row[:14] for row in texts(plan, params, draft_params, PROMPTS, 16).tokens] == plain
    assert texts(make("ngram", 0, spare=30), params, None, PROMPTS[:1]).tokens == plain[:1]


# Drafters with parameters of their own.
TRAINED = ("model", "pard", "medusa", "eagle3", "block_parallel", "kangaroo")
slow = lambda *values: pytest.param(*values, marks=pytest.mark.slow)


def drafting(kind, target, params, draft_params):
    """Options and parameters of any drafter for this target; its networks have the target's rotary embeddings."""
    adapter, adapter_params = tiny.adapter(target) if kind == "kangaroo" else (None, None)
    own = tiny.draft_params_of(kind, target, params, draft_params if adapter is None else adapter_params)
    return tiny.drafter_options(kind, target, adapter=adapter), own


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, drafter",
    [
        ("longrope", "skip_layers"),
        *(slow("longrope", drafter) for drafter in TRAINED),
        *(slow("dynamic", drafter) for drafter in ("skip_layers", *TRAINED)),
        *(slow("yarn", drafter) for drafter in ("ngram", "early_exit", "skip_layers", *TRAINED)),
    ],
)
def test_no_drafter_changes_a_text_that_outgrows_the_original_length_also_in_rows_that_are_refilled(kind, drafter):
    target, params, draft_params = rotated(kind)
    plain_plan = tiny.plan(target, gamma=0, slots=20, max_new=20, greedy=True)
    plain = texts(plain_plan, params, None, PROMPTS).tokens
    options, own = drafting(drafter, target, params, draft_params)
    plan = tiny.plan(target, drafter, options, gamma=4, slots=20, max_new=20, greedy=True, spare=7)
    result = texts(plan, params, own, PROMPTS, slots=2)
    assert result.tokens == plain
    assert result.statistics.drafted.sum() > 0


def test_training_does_not_measure_texts_that_the_target_cannot_hold():
    text = "some words, and some words again\n" * 40
    tokenizer, task = train_byte_bpe([text], 270), Task("mine", (), (Example("", text),))
    target = Decoder(tiny.config(vocab_size=tokenizer.vocab_size))
    config = common.training(1, 1e-3)
    config.speculative_eval.update({"every": 1, "prompts": 1, "max_new_tokens": 600})
    inputs = types.SimpleNamespace(target=target, draft=target, replicate=False)
    with pytest.raises(UserError, match="speculative_eval: Prompt 0 has .* exceed the model's 512 positions"):
        make_evaluator(config, inputs, task, tokenizer, meshes.make_mesh(config.mesh))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
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


@pytest.mark.slow
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


EVERY_CUT = Sampling.of(0.8, top_k=12, top_p=0.9, min_p=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["coupled", slow("lossless"), slow("block")])
@pytest.mark.parametrize("drafter", ["kangaroo", *(slow(kind) for kind in TRAINED if kind != "kangaroo")])
def test_of_each_drafter_logits_that_are_not_finite_are_refused_under_every_cut(drafter, rule):
    target, params, draft_params = tiny.target_and_draft()
    options, own = drafting(drafter, target, params, draft_params)
    own = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), own)
    make = lambda gamma: tiny.plan(target, drafter, options, gamma=gamma, slots=20, max_new=20, rule=rule)
    result = texts(make(3), params, own, PROMPTS, sampling=EVERY_CUT)
    assert result.statistics.drafted.sum() == 0
    assert (result.statistics.failed_drafts == result.statistics.target_calls).all()
    if rule == "coupled":
        assert result.tokens == texts(make(0), params, None, PROMPTS, sampling=EVERY_CUT).tokens


def untied(seed=1):
    target, params = tiny.decoder(seed, tied_head=False, sharpness=2.0)
    return target, params


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["coupled", slow("block")])
def test_a_row_whose_draft_fails_leaves_the_drafts_of_the_others(rule):
    target, params = untied()
    params["unembedding"]["kernel"] = params["unembedding"]["kernel"].at[9].set(0)  # too improbable for top-k
    draft_params = {**params, "embedding": params["embedding"].at[9].set(jnp.nan)}
    make = lambda gamma: tiny.plan(target, "model", {"model": target}, gamma=gamma, slots=20, max_new=20, rule=rule)
    prompts, how = [[5, 9, 2], [5, 1, 2], [9]], {"sampling": Sampling.of(0.8, top_k=3, min_p=0.02), "new": 8}
    result = texts(make(3), params, draft_params, prompts, **how)
    failed, accepted = result.statistics.failed_drafts, result.statistics.accepted_at.sum(1)
    assert (failed > 0).tolist() == [True, False, True] and (accepted > 0).tolist() == [False, True, False]
    if rule == "coupled":
        assert result.tokens == texts(make(0), params, None, prompts, **how).tokens


@pytest.mark.parametrize("greedy", [True, slow(False)])
def test_a_refused_token_whose_states_are_not_finite_leaves_no_trace(greedy):
    """Only drafts have this token. Its values are in slots that no emitted token may attend to."""
    target, params = untied()
    token = 7
    kernel = params["unembedding"]["kernel"].at[token].set(0)  # the largest of 23 other logits is above 0
    params |= {"unembedding": {"kernel": kernel}, "embedding": params["embedding"].at[token].set(jnp.nan)}
    wants = jnp.zeros_like(kernel).at[token, 0].set(-5.0).at[token, 1].set(5.0)
    draft_params = {**params, "embedding": untied()[1]["embedding"], "unembedding": {"kernel": wants}}
    rule, sampling = ("lossless", Sampling.of(0.0)) if greedy else ("coupled", Sampling.of(0.7, top_k=4))
    how = {"slots": 20, "max_new": 20, "rule": rule, "greedy": greedy}
    make = lambda gamma: tiny.plan(target, "model", {"model": target}, gamma=gamma, **how)
    prompts = [[1, 2, 3], [5, 6], [2, 4, 8, 10, 12]]
    plain = texts(make(0), params, None, prompts, sampling=sampling).tokens
    assert not any(token in row for row in plain)
    assert texts(make(3), params, draft_params, prompts, sampling=sampling).tokens == plain


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


def test_values_of_the_prompt_that_overflow_are_not_masked_away():
    target, params, _ = tiny.target_and_draft()
    value = params["blocks"][0]["attention"]["value"]
    value["kernel"] = jnp.full_like(value["kernel"], jnp.inf)
    plan = tiny.plan(target, gamma=0, slots=20, max_new=20, greedy=True)
    with pytest.raises(UserError, match="logits for prompt 0 are not finite"):
        texts(plan, params, None, PROMPTS)


# --- dtypes of training --------------------------------------------------------------------------------------------


def test_the_targets_dtype_is_not_the_drafts(tmp_path):
    text = "some words, and some words again\n" * 40
    tokenizer, task = train_byte_bpe([text], 270), Task("mine", (Example("", text),), (Example("", text),))
    target, params = tiny.decoder(1, vocab_size=tokenizer.vocab_size)
    save(tmp_path, target, params, tokenizer)
    config = common.distillation(str(tmp_path), "random", steps=1)
    config.model.update(common.TINY_MODEL)
    config.data.update({"batch_size": 1, "sequence_length": 32, "prompt_length_max": 16})
    config.target_param_dtype = "bfloat16"
    inputs = distill._inputs(config, task, tokenizer, meshes.make_mesh(config.mesh))
    dtypes_of = lambda tree: {str(leaf.dtype) for leaf in jax.tree.leaves(tree)}
    assert (dtypes_of(inputs.target_params), dtypes_of(inputs.params)) == ({"bfloat16"}, {"float32"})


# --- float32 logits ------------------------------------------------------------------------------------------------


def _logits_of(kind):
    shape = dict(vocab_size=512, tied_head=False, compute_dtype="bfloat16", param_dtype="bfloat16")
    hidden = jax.random.normal(jax.random.key(0), (1, 1, 16)).astype(jnp.bfloat16)
    if kind == "encoder-decoder":
        model, params = tiny.encoder_decoder(**shape)
        return model.head(params, hidden)
    target = Decoder(tiny.config(**shape))
    params = target.init(jax.random.key(1))
    if kind == "tied":
        tied = Decoder(dataclasses.replace(target.config, tied_head=True))
        return tied.head({name: values for name, values in params.items() if name != "unembedding"}, hidden)
    if kind == "target":
        return target.head(params, hidden)
    if kind == "softcap":
        return Decoder(dataclasses.replace(target.config, final_softcap=50.0)).head(params, hidden)
    if kind == "reduced":
        ids = draft_vocabulary(range(1, 512))
        kernel = target.head_kernel(params, ids)
        return target.reduced(ids).column_logits(target.reduced_params(params, kernel), hidden)
    if kind == "block_parallel":
        own = tiny.block_parallel(target)[0]
        return own.head(own.init(jax.random.key(2)), target, params, hidden)
    makers = {"medusa": lambda: tiny.heads(target, 1), "eagle3": lambda: tiny.eagle3(target)[0]}
    makers["adapter"] = lambda: Adapter(AdapterConfig(target.config, 1, own_head=True))
    own = makers[kind]()
    return own.head(own.init(jax.random.key(2)), target, params, hidden)


@pytest.mark.parametrize(
    "kind", ["target", "encoder-decoder", "medusa", "adapter", "eagle3", "block_parallel", "reduced", "softcap", "tied"]
)
def test_logits_leave_every_head_in_float32(kind):
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
