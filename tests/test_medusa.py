"""Medusa heads: what they compute, which state they read, how they learn, and what they refuse."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_trainer
import tiny
from lossless import one_block
from ml_collections import ConfigDict
from test_kangaroo import VICUNA

from specjax import distill
from specjax.decoding import loop
from specjax.decoding.sampling import Sampling, row_keys
from specjax.distillation import divergences, objective, settings, trainer
from specjax.hub import adapter as hub_adapter
from specjax.hub.tokenizer import Tokenizer
from specjax.models.attachment import AttachedDraft
from specjax.models.encoder_decoder import EncoderDecoderConfig
from specjax.models.medusa import MedusaConfig, MedusaHeads
from specjax.runtime import mesh as meshes
from specjax.runtime.errors import UserError

VOCAB, SLOTS, MAX_NEW, BATCH, HEADS = 24, 6, 20, 16, 3


@pytest.fixture(scope="module")
def models():
    target, params = tiny.decoder(1, sharpness=2.0)
    return target, params, tiny.heads(target, HEADS), tiny.heads_params(target, params, HEADS)


def test_four_heads_have_as_many_parameters_as_the_papers():
    assert round(MedusaHeads(MedusaConfig(VICUNA, 4)).num_params / 1e6) == 591


def guesses(target, params, heads_params, tokens):
    """Logits `[B, T, HEADS, V]` of every head at every position, written out from the paper's formula."""
    hidden, _ = target.extend(params, None, tokens, jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape))
    hidden = np.asarray(target.normed(params, hidden))
    silu = lambda x: x / (1 + np.exp(-x))
    weights = [jax.tree.map(np.asarray, heads_params["heads"][k]) for k in range(HEADS)]
    heads = [(hidden + silu(hidden @ head["block"]["kernel"].T)) @ head["unembedding"]["kernel"].T for head in weights]
    return np.stack(heads, axis=2)


@pytest.mark.slow
@pytest.mark.parametrize("own_head", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_heads_begin_with_the_targets_own_distribution_of_the_next_token(own_head):
    target, params = tiny.decoder(1, sharpness=2.0)
    heads = tiny.heads(target, 2, own_head=own_head)
    hidden = jax.random.normal(jax.random.key(0), (2, 3, 16))
    logits = heads.head(heads.init_on(jax.random.key(1), target, params), target, params, hidden)
    assert logits.shape == (2, 6, VOCAB)
    expected = np.repeat(np.asarray(target.head(params, hidden)), 2, axis=1)
    np.testing.assert_allclose(np.asarray(logits), expected, atol=1e-4)


@pytest.mark.slow
def test_every_block_is_drafted_from_the_state_before_its_pending_token(models):
    target, params, heads, heads_params = models
    gamma = 2  # one head more than are asked
    options = {"adapter": heads, "threshold": 0.3}
    plan = tiny.plan(target, "medusa", options, gamma=gamma, slots=SLOTS, max_new=MAX_NEW)
    limits, adjust = tiny.limits(BATCH, MAX_NEW), Sampling.of(1.0, threshold=0.3)
    texts, lengths = tiny.prompts(3, BATCH, SLOTS, VOCAB)
    state = loop.prefill(plan, params, heads_params, texts, lengths, row_keys(4, jnp.arange(BATCH)))
    accepted, counts, rows = set(), set(), np.arange(BATCH)
    while not np.all(np.asarray(state.done)):
        before = state
        state, _, proposal = one_block(plan, params, heads_params, before, limits, adjust)
        live, pending = ~np.asarray(before.done), np.asarray(before.lengths) - 1
        logits = guesses(target, params, heads_params, before.tokens)[rows, np.maximum(pending - 1, 0), :gamma]
        # A text of one token has no state before its pending token; its first block is drafted from zeros.
        logits = jnp.where((pending > 0)[:, None, None], logits, 0.0)
        probs = np.asarray(jax.nn.softmax(logits, axis=-1))
        np.testing.assert_allclose(np.asarray(proposal.probs)[live, 0], probs[live, 0], atol=1e-4)
        unsure = probs.max(-1) < 0.3
        expected = np.where(unsure.any(1), unsure.argmax(1) + 1, gamma)
        np.testing.assert_array_equal(np.asarray(proposal.num_drafted)[live], expected[live])
        counts |= set(expected[live].tolist())
        accepted |= set((np.asarray(state.lengths) - pending - 2)[live].tolist())
    assert counts == {1, 2} and accepted == {0, 1, 2}


@pytest.mark.slow
@pytest.mark.parametrize("divergence", ["forward_kl", "cross_entropy"])
def test_each_head_learns_its_own_token_with_a_weight_that_falls(models, divergence):
    target, params, heads, heads_params = models
    draft, texts = AttachedDraft.of(heads), jax.random.randint(jax.random.key(0), (3, 9), 0, VOCAB)
    lengths, starts = jnp.asarray([9, 7, 4], jnp.int32), jnp.asarray([1, 3, 4], jnp.int32)
    batch = {"tokens": texts, "lengths": lengths, "loss_start": starts}
    guessed = jax.nn.log_softmax(guesses(target, params, heads_params, texts), axis=-1)
    taught = jax.nn.log_softmax(tiny.full_logits(target, params, texts), axis=-1)
    loss, tokens = 0.0, 0.0
    for row in range(3):
        for head in range(1, HEADS + 1):
            for place in range(int(starts[row]), int(lengths[row])):  # of the token that is guessed
                if (at := place - 1 - head) < 0:
                    continue
                law, guess = taught[row, place - 1], guessed[row, at, head - 1]
                hard = -guess[texts[row, place]]
                tokens += 0.8**head
                loss += 0.8**head * float(
                    hard if divergence == "cross_entropy" else (jnp.exp(law) * (law - guess)).sum()
                )
    compare = divergences.divergence(divergence)
    of = objective.Loss(draft, None if compare is None else target, compare, temperature=1.0, chunk=7)
    sums = jax.jit(of)(heads_params, params, batch)
    np.testing.assert_allclose([float(sums.loss), float(sums.tokens)], [loss, tokens], rtol=1e-4)
    gradient = jax.jit(jax.grad(lambda own: of(own, params, batch).loss))(heads_params)
    assert jax.tree.structure(gradient) == jax.tree.structure(heads_params)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(gradient))


@pytest.mark.slow
@pytest.mark.standard_promotion
def test_heads_learn_from_hard_labels_on_text_of_two_sources(tmp_path):
    changes = {"loss.divergence": "cross_entropy", "train.steps": 40, "train.eval_every": 40}
    changes["train.checkpoint_every"] = 40
    config = test_trainer.make_config(**changes, **{"data.fixed": 0.5, "data.draft": 0.0, "data.target": 0.5})
    inputs = test_trainer.make_inputs(config)
    heads = tiny.heads(inputs.target, 2)
    params = heads.init_on(jax.random.key(0), inputs.target, inputs.target_params)
    before = jax.tree.map(np.array, inputs.target_params)
    inputs = dataclasses.replace(inputs, draft=AttachedDraft.of(heads), params=params)
    outcome = test_trainer.make_trainer(config, tmp_path, inputs=inputs).run()
    assert outcome.validation[-1]["validation_loss"] < outcome.validation[0]["validation_loss"] - 0.02
    assert jax.tree.structure(outcome.params) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, inputs.target_params))


# --- an export, trained further ------------------------------------------------------------------------------------


def further(init, target, params):
    sections = {
        "model": {"init": str(init), "replicate": False, "vocabulary": ""},
        "medusa": {"heads": 2, "own_head": True},
        "seed": 0,
    }
    mesh = meshes.make_mesh(ConfigDict(ONE_DEVICE))
    return distill._Models(ConfigDict(sections), Tokenizer.__new__(Tokenizer), mesh, target, params).draft()


ONE_DEVICE = {"data": 1, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize("kind", [pytest.param("adapter", marks=pytest.mark.slow), "medusa"])
def test_an_export_is_trained_further_from_its_own_parameters(models, tmp_path, kind):
    target, params, *_ = models
    attached = (
        tiny.adapter(target) if kind == "adapter" else (tiny.heads(target, 2), tiny.heads_params(target, params, 2))
    )
    saved = hub_adapter.LoadedAttachment(*attached, hub_adapter.fingerprint(target, params))
    hub_adapter.save(tmp_path / "export", saved)
    draft, begun = further(tmp_path / "export", target, params)
    assert draft == AttachedDraft.of(saved.network)
    assert jax.tree.all(jax.tree.map(np.array_equal, begun, saved.params))
    twin = tiny.decoder(7)[1]
    with pytest.raises(UserError, match="belongs to another target"):
        further(tmp_path / "export", target, twin)
    with pytest.raises(UserError, match="attaches to a target: set `target`"):
        further(tmp_path / "export", None, None)


def test_new_heads_begin_as_the_config_says(models):
    target, params, *_ = models
    draft, begun = further("medusa", target, params)
    assert draft.attachment.config.heads == 2
    np.testing.assert_allclose(begun["heads"][1]["unembedding"]["kernel"], params["embedding"], atol=1e-5)


# --- bad input -----------------------------------------------------------------------------------------------------


def test_what_heads_cannot_do_is_refused_in_one_sentence(models):
    target, _, heads, _ = models
    with pytest.raises(UserError, match="gamma 4 is more than the 3 Medusa heads draft; take gamma 3 or less"):
        tiny.make_drafter("medusa", target, 4, {"adapter": heads})
    with pytest.raises(UserError, match='made for drafter "medusa", not for Kangaroo'):
        tiny.make_drafter("kangaroo", target, 2, {"adapter": heads})
    with pytest.raises(UserError, match="there must be one head or more"):
        MedusaConfig(target.config, 0)
    with pytest.raises(UserError, match="attaches to a decoder-only model"):
        MedusaConfig(EncoderDecoderConfig.__new__(EncoderDecoderConfig), 1)
    inputs = trainer.TrainingInputs(AttachedDraft.of(heads), {}, target, {}, iter(()), [], (0,), 4)
    with pytest.raises(UserError, match="writes no text; set data.draft to 0"):
        settings.check(test_trainer.make_config(**{"data.fixed": 0.0, "data.draft": 1.0}), inputs)
