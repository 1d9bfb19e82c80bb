"""Attention of long texts holds no scores `[T, S]`, and layers that are computed again give the same gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from specjax.distillation import divergences, objective
from specjax.models import attention
from specjax.models.attachment import AttachedDraft
from specjax.models.language_model import consecutive
from specjax.models.rotary import Rotary

LENGTH, VOCABULARY = 23, 24
SLOW, SELDOM = pytest.mark.slow, ("encoder_decoder", "kangaroo", "eagle3", "block_parallel")


def batch():
    tokens, lengths = tiny.prompts(0, 3, LENGTH, VOCABULARY)
    starts = jnp.ones_like(lengths)
    return {"tokens": tokens, "lengths": lengths, "loss_start": starts, "prompt_lengths": lengths}


@functools.cache
def draft_and_target(kind):
    """(draft, its parameters, target, its parameters, batch)."""
    if kind == "encoder_decoder":
        draft, params = tiny.encoder_decoder(0)
        rows = batch()
        return draft, params, *tiny.encoder_decoder(1), {**rows, "sources": rows["tokens"]}
    target, target_params = tiny.decoder(1)
    if kind == "eagle3":
        layer, params = tiny.eagle3(target, steps=2)
        return AttachedDraft.of(layer), params, target, target_params, batch()
    if kind in ("kangaroo", "block_parallel"):
        attachment, params = tiny.adapter(target) if kind == "kangaroo" else tiny.block_parallel(target)
        return AttachedDraft.of(attachment), params, target, target_params, batch()
    # Windows, a softcap and two rotary embeddings, as in Gemma, and sinks, as in gpt-oss.
    options = dict(heads=4, kv_heads=2, windows=(0, 5), attention_softcap=2.0, local_rotary=Rotary(1e3, 8))
    options |= {"attention_sinks": True}
    return *tiny.decoder(0, **options), target, target_params, batch()


def loss_and_gradient(kind, remat=False):
    draft, params, target, target_params, rows = draft_and_target(kind)
    loss = objective.Loss(draft.with_remat(remat), target, divergences.divergence("forward_kl"), 1.0, 64)
    return jax.jit(jax.value_and_grad(lambda params: loss(params, target_params, rows).loss))(params)


def assert_close(first, second):
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5 * np.abs(other).max())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["decoder", *(pytest.param(kind, marks=SLOW) for kind in SELDOM)])
@pytest.mark.usefixtures("layers_by_themselves")
def test_blocks_of_queries_and_layers_computed_again_give_the_same_gradient(kind, monkeypatch):
    """23 tokens in blocks of 4, the last one of 3."""
    expected = loss_and_gradient(kind)
    monkeypatch.setattr(attention, "_SCORES", 1)
    monkeypatch.setattr(attention, "_FEWEST_QUERIES", 4)
    assert_close(loss_and_gradient(kind, remat=True), expected)


@pytest.mark.usefixtures("layers_by_themselves")
def test_chunks_of_a_long_prompt_attend_in_blocks_too(monkeypatch):
    model, params = tiny.decoder(0, windows=(0, 5))
    tokens = tiny.prompts(0, 2, LENGTH, VOCABULARY)[0]
    run = lambda: jax.jit(
        lambda: model.extend(params, model.start(params, tokens, jnp.full(2, LENGTH), 32), tokens, consecutive(tokens))
    )()
    expected, _ = run()
    monkeypatch.setattr(attention, "_SCORES", 1)
    monkeypatch.setattr(attention, "_FEWEST_QUERIES", 4)
    np.testing.assert_allclose(run()[0], expected, rtol=1e-5, atol=1e-5)


def test_training_on_a_long_text_needs_less_memory_than_the_scores_of_one_layer():
    length = 2048
    model = tiny.decoder(0, max_positions=length)[0]
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    trunk = lambda params, tokens: jnp.sum(model.extend(params, None, tokens, consecutive(tokens))[0])
    compiled = jax.jit(jax.grad(trunk)).lower(model.abstract_params(), tokens).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * model.config.heads * length**2


def test_layers_that_are_computed_again_hold_only_their_inputs():
    """Bytes that the forward pass leaves for the backward pass, besides the parameters."""
    held = []
    for remat in (False, True):
        model = tiny.decoder(0, layers=6)[0].with_remat(remat)
        shapes, tokens = model.abstract_params(), jax.ShapeDtypeStruct((2, 64), jnp.int32)
        trunk = lambda params, tokens, model=model: model.extend(params, None, tokens, consecutive(tokens))[0]
        residuals = jax.eval_shape(lambda *inputs, trunk=trunk: jax.vjp(trunk, *inputs)[1], shapes, tokens)
        size = lambda tree: sum(x.size * 4 for x in jax.tree.leaves(tree))
        held.append(size(residuals) - size(shapes))
    one_state = 4 * 2 * 64 * model.config.width
    assert held[1] < 2 * 6 * one_state < held[0] / 4


@SLOW  # that fewer bytes are held for the backward pass is claimed above, without compiling
def test_layers_that_are_computed_again_need_less_memory_on_cpu():
    model, tokens = tiny.decoder(0, layers=6)[0], jax.ShapeDtypeStruct((4, 128), jnp.int32)
    needed = []
    for remat in (False, True):
        again = model.with_remat(remat)
        trunk = lambda params, tokens, again=again: jnp.sum(
            again.extend(params, None, tokens, consecutive(tokens))[0] ** 2
        )
        compiled = jax.jit(jax.grad(trunk)).lower(model.abstract_params(), tokens).compile()
        needed.append(compiled.memory_analysis().temp_size_in_bytes)
    assert needed[1] < 0.5 * needed[0]


def test_an_attachment_keeps_its_target_if_layers_are_computed_again():
    draft = AttachedDraft.of(tiny.adapter(tiny.decoder(0)[0])[0])
    again = draft.with_remat(True)
    assert again.config.remat and again.attachment.config.target == again.config == again.target.config
    assert dataclasses.replace(again.config, remat=False) == draft.config
