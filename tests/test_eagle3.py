"""EAGLE-3: what it computes, in training and in decoding, which states it reads, how it learns, and what it refuses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from lossless import blocks

from configs import common
from specjax.decoding.sampling import Sampling
from specjax.distillation import divergences, objective, settings
from specjax.distillation.trainer import TrainingInputs
from specjax.hub import adapter as hub_adapter
from specjax.models.attachment import AttachedDraft, runtime_params
from specjax.models.eagle3 import Eagle3Config, Eagle3Layer
from specjax.models.language_model import consecutive
from specjax.models.vocabulary import draft_vocabulary
from specjax.runtime.errors import UserError

VOCAB, SLOTS, MAX_NEW, BATCH, STEPS = 24, 6, 20, 8, 3
OPTIONS = [
    {"norm_before_residual": True, "fc_norm": True, "norm_output": True},
    pytest.param({}, marks=pytest.mark.slow),
    pytest.param(
        {
            "layer": dataclasses.replace(tiny.config(layers=1, heads=4, qk_norm=True), attention_bias=True),
            "own_embedding": True,
            "norm_before_fc": True,
        },
        marks=pytest.mark.slow,
        id="of other tools",
    ),
]


@pytest.fixture(scope="module")
def target():
    return tiny.decoder(1, sharpness=2.0, layers=3)


def chain(target, params, network, own, tokens, start, steps):
    """Logits of drafting `steps` tokens after `tokens[:start]`, with the text's tokens as the drafted ones.

    Written with the decoding step: the target's states of all committed tokens but the last one are known.
    """
    positions = jnp.arange(start)[None]
    states, hidden, first = [], tokens[:, :start], 0
    for tap in network.taps:
        hidden, _ = target.extend(params, None, hidden, positions, layers=(first, tap))
        states.append(hidden)
        first = tap
    fused = network.fuse(own, tuple(states))
    before = jnp.concatenate([jnp.zeros_like(fused[:, :1]), fused[:, :-1]], axis=1)
    cache = network.start(1, 32)
    outputs, cache = network.draft_step(own, params, cache, tokens[:, :start], before, positions)
    outputs, logits = outputs[:, -1:], []
    for step in range(steps):
        logits.append(network.head(own, target, params, outputs)[0, 0])
        place = jnp.asarray([[start + step]])
        fed = network.fed_back(own, outputs)
        outputs, cache = network.draft_step(own, params, cache, tokens[:, start + step][:, None], fed, place)
    return jnp.stack(logits)


def unrolled(target, params, network, own, tokens):
    """The logits `[B, T, steps, V]` of training."""
    draft = AttachedDraft.of(network)
    attached = runtime_params(draft, own, params)
    logits = draft.column_logits(attached, draft.extend(attached, None, tokens, consecutive(tokens))[0])
    return logits.reshape(*tokens.shape, network.config.steps, -1)


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS)
def test_training_unrolls_what_decoding_does(target, options):
    target, params = target
    network, own = tiny.eagle3(target, params, steps=STEPS, states_after=(1, 2, 3), **options)
    tokens = jax.random.randint(jax.random.key(0), (1, 10), 0, VOCAB)
    logits = np.asarray(jax.jit(lambda tokens: unrolled(target, params, network, own, tokens))(tokens))[0]
    start = 5
    drafted = jax.jit(functools.partial(chain, target, network=network, start=start, steps=STEPS))
    drafted = np.asarray(drafted(params, own=own, tokens=tokens))
    for step in range(STEPS):
        np.testing.assert_allclose(logits[start - 1 + step, step], drafted[step], atol=2e-4)


@pytest.mark.parametrize("gamma", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_block_is_drafted_from_the_targets_states(target, gamma):
    """A block's distributions are those of training on its text: nothing depends on what earlier blocks drafted."""
    target, params = target
    network, own = tiny.eagle3(target, params, states_after=(1, 3), steps=gamma)
    plan = tiny.plan(target, "eagle3", {"adapter": network}, gamma=gamma, slots=SLOTS, max_new=MAX_NEW)
    trained, accepted = jax.jit(lambda tokens: unrolled(target, params, network, own, tokens)), set()
    prompts = tiny.prompts(3, BATCH, SLOTS, VOCAB)
    for before, state, _, proposal in blocks(plan, params, own, prompts, MAX_NEW, Sampling.of(1.0)):
        texts, lengths = np.array(before.tokens), np.asarray(before.lengths)
        for row in range(BATCH):
            texts[row, lengths[row] : lengths[row] + gamma] = proposal.tokens[row]
        expected = np.asarray(jax.nn.softmax(trained(jnp.asarray(texts))))
        for row in np.flatnonzero(~np.asarray(before.done)):
            for step in range(gamma):
                place = lengths[row] - 1 + step
                np.testing.assert_allclose(proposal.probs[row, step], expected[row, place, step], atol=2e-4)
            accepted.add(int(state.lengths[row]) - lengths[row] - 1)
    assert {0, 1, 2} <= accepted


@pytest.mark.slow
def test_each_step_is_compared_with_the_target_at_its_own_token(target):
    target, params = target
    network, own = tiny.eagle3(target, params, steps=2, states_after=(2,), vocabulary=draft_vocabulary(range(0, 24, 2)))
    draft = AttachedDraft.of(network)
    tokens = jax.random.randint(jax.random.key(0), (2, 9), 0, VOCAB)
    batch = {"tokens": tokens, "lengths": jnp.asarray([9, 7]), "loss_start": jnp.asarray([3, 4])}
    loss = objective.Loss(draft, target, divergences.divergence("forward_kl"), temperature=1.0, chunk=5)
    sums = jax.jit(loss)(own, params, batch)
    guessed = np.asarray(
        jax.nn.log_softmax(jax.jit(lambda x: unrolled(target, params, network, own, x))(tokens), axis=-1)
    )
    taught = np.asarray(jax.nn.softmax(tiny.full_logits(target, params, tokens), axis=-1))[..., ::2]
    expected = weights = 0.0
    for row in range(2):
        for place in range(int(batch["loss_start"][row]), int(batch["lengths"][row])):
            for step in range(2):
                law = taught[row, place - 1]
                expected += 0.8**step * float((law * (np.log(law / law.sum()) - guessed[row, place - 1, step])).sum())
                weights += 0.8**step
    np.testing.assert_allclose([float(sums.loss), float(sums.tokens)], [expected, weights], rtol=1e-4)
    gradient = jax.jit(jax.grad(lambda own: loss(own, params, batch).loss))(own)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("norm", ["rms", "rms_plus_one"])
def test_head_and_gains_start_as_the_targets(norm):
    """On the target's last state they give the target's distribution, whatever its gains are."""
    target, params = tiny.decoder(1, norm=norm)
    params = params | {"norm": {"scale": jnp.linspace(0.2, 3.0, 16)}}
    network = Eagle3Layer(Eagle3Config(target.config))
    own = network.init_on(jax.random.key(0), target, params)
    states = jax.random.normal(jax.random.key(1), (1, 3, 16))
    np.testing.assert_allclose(network.head(own, target, params, states), target.head(params, states), atol=1e-4)
    last = network.fuse(own, tuple(jnp.zeros_like(states) for _ in network.taps[1:]) + (states,))
    np.testing.assert_allclose(last, states, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 3])
def test_a_draft_that_reads_tokens_too_writes_no_text_for_training(target, steps):
    network, own = tiny.eagle3(target[0], steps=steps)
    inputs = TrainingInputs(AttachedDraft.of(network), own, *target, iter(()), [], (), 4)
    config = common.distillation("", "eagle3")
    with pytest.raises(UserError, match="writes no text; set data.draft to 0"):
        settings.check(config, inputs)


def test_what_is_saved_is_what_is_loaded(target, tmp_path):
    target, params = target
    options = {"states_after": (1, 3), "norm_output": True, "vocabulary": draft_vocabulary([1, 2, 5])}
    network, own = tiny.eagle3(target, params, **options)
    hub_adapter.save(tmp_path / "draft", hub_adapter.LoadedAttachment(network, own, "here"))
    loaded = hub_adapter.load(tmp_path / "draft", target)
    assert loaded.network == network
    jax.tree.map(np.testing.assert_array_equal, loaded.params, own)


def test_layers_are_counted_from_one_and_in_order():
    config = tiny.config(layers=12)
    assert Eagle3Layer(Eagle3Config(config)).taps == (2, 6, 9)
    assert Eagle3Layer(Eagle3Config(tiny.config(layers=1))).taps == (1,)
    for wrong in ((0, 2), (3, 2), (2, 2), (2, 13)):
        with pytest.raises(UserError, match="ascending order, from 1 to the target's 12"):
            Eagle3Config(config, states_after=wrong)
    with pytest.raises(UserError, match="1 token or more"):
        Eagle3Config(config, steps=0)
    assert dataclasses.replace(Eagle3Config(config), steps=1).steps == 1
