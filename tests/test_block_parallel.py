"""The block-parallel draft: what it computes in training and in decoding, how it starts, and what it refuses."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import lossless
import numpy as np
import pytest
import tiny
from lossless import blocks

from specjax.decoding.drafters.block_parallel import BlockParallelDraft
from specjax.decoding.drafters.table import build_drafter
from specjax.decoding.sampling import Sampling
from specjax.distillation import divergences, objective
from specjax.hub import adapter as hub_adapter
from specjax.models.attachment import AttachedDraft, runtime_params
from specjax.models.block_parallel import BlockParallel, BlockParallelConfig
from specjax.models.fusing import layer_numbers
from specjax.models.language_model import consecutive
from specjax.models.vocabulary import draft_vocabulary
from specjax.runtime.errors import UserError

VOCAB, SLOTS, MAX_NEW, BATCH = 24, 6, 20, 8
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def target():
    return tiny.decoder(1, sharpness=2.0, layers=3)


def trained_logits(target, params, network, own, tokens):
    """The logits `[B, T, drafted, V]` of training."""
    draft = AttachedDraft.of(network)
    attached = runtime_params(draft, own, params)
    logits = draft.column_logits(attached, draft.extend(attached, None, tokens, consecutive(tokens))[0])
    return logits.reshape(*tokens.shape, network.config.drafted, -1)


@pytest.mark.slow
def test_a_block_does_not_read_the_tokens_that_it_predicts(target):
    target, params = target
    network, own = tiny.block_parallel(target, params, block_size=4)
    texts = jax.random.randint(jax.random.key(0), (1, 10), 0, VOCAB)
    logits = jax.jit(lambda tokens: trained_logits(target, params, network, own, tokens))
    changed = texts.at[0, 6].set((texts[0, 6] + 1) % VOCAB)
    difference = np.abs(np.asarray(logits(texts) - logits(changed))).max(axis=(0, 2, 3))
    # Blocks that start before the changed token do not depend on it, its own block does, and so do later ones.
    assert np.all(difference[:6] == 0)
    assert np.all(difference[6:] > 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("gamma", [pytest.param(2, marks=SLOW), 3])
def test_every_block_is_drafted_as_in_training(target, gamma):
    """A block's distributions are those of training on its text: nothing depends on what earlier blocks drafted."""
    target, params = target
    network, own = tiny.block_parallel(target, params, block_size=4)
    plan = tiny.plan(target, "block_parallel", {"adapter": network}, gamma=gamma, slots=SLOTS, max_new=MAX_NEW)
    trained, accepted = jax.jit(lambda tokens: trained_logits(target, params, network, own, tokens)), set()
    prompts = tiny.prompts(3, BATCH, SLOTS, VOCAB)
    for before, state, _, proposal in blocks(plan, params, own, prompts, MAX_NEW, Sampling.of(1.0)):
        lengths = np.asarray(before.lengths)
        expected = np.asarray(jax.nn.softmax(trained(before.tokens)))
        for row in np.flatnonzero(~np.asarray(before.done)):
            np.testing.assert_allclose(proposal.probs[row], expected[row, lengths[row] - 1, :gamma], atol=2e-4)
            accepted.add(int(state.lengths[row]) - lengths[row] - 1)
    assert {0, 1} <= accepted


@pytest.mark.slow
def test_each_token_of_a_block_is_compared_with_the_target_at_its_own_place(target):
    target, params = target
    vocabulary = draft_vocabulary(range(0, 24, 2))
    network, own = tiny.block_parallel(target, params, block_size=3, vocabulary=vocabulary)
    draft = AttachedDraft.of(network)
    tokens = jax.random.randint(jax.random.key(0), (2, 9), 0, VOCAB)
    batch = {"tokens": tokens, "lengths": jnp.asarray([9, 7]), "loss_start": jnp.asarray([3, 4])}
    loss = objective.Loss(draft, target, divergences.divergence("forward_kl"), temperature=1.0, chunk=5)
    sums = jax.jit(loss)(own, params, batch)
    guessed = np.asarray(jax.nn.log_softmax(trained_logits(target, params, network, own, tokens), axis=-1))
    taught = np.asarray(jax.nn.softmax(tiny.full_logits(target, params, tokens), axis=-1))[..., ::2]
    expected = weights = 0.0
    for row in range(2):
        for place in range(int(batch["loss_start"][row]), int(batch["lengths"][row])):
            for k in range(2):
                anchor, law, weight = place - 1 - k, taught[row, place - 1], np.exp(-k / 2)
                expected += weight * float((law * (np.log(law / law.sum()) - guessed[row, anchor, k])).sum())
                weights += weight
    np.testing.assert_allclose([float(sums.loss), float(sums.tokens)], [expected, weights], rtol=1e-4)
    gradient = jax.jit(jax.grad(lambda own: loss(own, params, batch).loss))(own)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(gradient))


# --- the confidence head -------------------------------------------------------------------------------------------


def confident(target, params, **changes):
    """A draft with a confidence head that has random weights, and its parameters."""
    network, own = tiny.block_parallel(target, params, block_size=4, confidence=True, **changes)
    return network, own | {"confidence": {"kernel": jnp.linspace(-1.0, 1.0, 16)[None], "bias": jnp.full((1,), 0.3)}}


@pytest.mark.slow
@pytest.mark.parametrize("vocabulary", [None, pytest.param(tuple(range(0, 24, 2)), marks=SLOW)])
def test_a_confidence_head_learns_the_acceptance_and_changes_nothing_else(target, vocabulary):
    target, params = target
    network, own = confident(target, params, vocabulary=vocabulary)
    plain, others = dataclasses.replace(network.config, confidence=False), {**own}
    del others["confidence"]
    tokens = jax.random.randint(jax.random.key(0), (2, 9), 0, VOCAB)
    batch = {"tokens": tokens, "lengths": jnp.asarray([9, 7]), "loss_start": jnp.asarray([3, 4])}

    def gradient_and_sums(network):
        draft = AttachedDraft.of(network)
        loss = objective.Loss(draft, target, divergences.divergence("forward_kl"), 1.0, 5, anchors=4)
        total = lambda own: (lambda sums: (sums.loss, sums))(loss(own, params, batch))
        return jax.jit(jax.grad(total, has_aux=True))

    with_head = gradient_and_sums(network)
    gradient, sums = with_head(own)
    expected, without = gradient_and_sums(BlockParallel(plain))(others)
    head = gradient.pop("confidence")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradient, expected)
    assert min(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(head)) > 0
    assert float(sums.acceptance) == pytest.approx(float(without.acceptance))
    # With weights of 0 its confidence is sigmoid(bias) everywhere, and the loss is known from the mean acceptance.
    flat = own | {"confidence": {"kernel": jnp.zeros((1, 16)), "bias": jnp.full((1,), 0.3)}}
    added = float(with_head(flat)[1].loss - without.loss)
    assert added == pytest.approx(float(np.log1p(np.exp(0.3)) * sums.tokens - 0.3 * sums.acceptance), rel=1e-4)


@pytest.mark.slow
def test_a_draft_ends_after_the_first_token_whose_confidence_is_below_the_threshold(target):
    target, params = target
    network, own = confident(target, params)
    plan = tiny.plan(target, "block_parallel", {"adapter": network, "threshold": 0.5}, gamma=3, slots=SLOTS, max_new=4)
    texts, lengths = tiny.prompts(3, BATCH, SLOTS, VOCAB)
    decoded = blocks(plan, params, own, (texts, lengths), 4, Sampling.of(1.0, threshold=0.5))
    _, _, _, proposal = next(decoded)
    draft = AttachedDraft.of(network)
    attached = runtime_params(draft, own, params)
    at = lengths[:, None] - 1
    confidence = jax.jit(lambda x: draft.confidence(attached, draft.training_states(attached, None, x, at)))
    sure = np.asarray(jax.nn.sigmoid(confidence(texts)))
    assert sure.shape == (BATCH, 3)
    below = np.concatenate([sure[:, :2] < 0.5, np.ones((BATCH, 1), bool)], axis=1)
    np.testing.assert_array_equal(proposal.num_drafted, 1 + below.argmax(1))
    assert len(set(np.asarray(proposal.num_drafted).tolist())) > 1


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["lossless", "block"])
def test_a_stop_by_the_confidence_head_leaves_the_targets_distribution(rule):
    target, params = lossless.small_target()
    network, own = confident(target, params)
    plan = lossless.small_plan(target, "block_parallel", {"adapter": network, "threshold": 0.5}, rule)
    adjust = dataclasses.replace(Sampling.of(1.0), threshold=jnp.float32(0.5))
    assert lossless.p_value(plan, params, own, adjust) > 1e-4


def test_hard_labels_teach_no_confidence(target):
    network = AttachedDraft.of(confident(*target)[0])
    with pytest.raises(UserError, match='a confidence head learns .* another than "cross_entropy", or leave'):
        objective.Loss(network, None, None, temperature=1.0, chunk=5)


def test_it_starts_from_the_targets_last_state_and_gains(target):
    target, params = target
    params = params | {"norm": {"scale": jnp.linspace(0.2, 3.0, 16)}}
    network = BlockParallel(BlockParallelConfig(target.config, block_size=2))
    own = network.init_on(jax.random.key(0), target, params)
    states = jax.random.normal(jax.random.key(1), (1, 3, 16))
    np.testing.assert_allclose(network.head(own, target, params, states), target.head(params, states), atol=1e-4)
    zeros = tuple(jnp.zeros_like(states) for _ in network.taps[1:])
    normed = states / jnp.sqrt(jnp.mean(states**2, axis=-1, keepdims=True))
    np.testing.assert_allclose(network.bind(own).fuse((*zeros, states)), normed, atol=1e-2)


def test_what_is_saved_is_what_is_loaded(target, tmp_path):
    target, params = target
    network, own = confident(target, params, states_after=(1, 3), vocabulary=draft_vocabulary([1, 2, 5]))
    hub_adapter.save(tmp_path / "draft", hub_adapter.LoadedAttachment(network, own, "here"))
    loaded = hub_adapter.load(tmp_path / "draft", target)
    assert loaded.network == network
    jax.tree.map(np.testing.assert_array_equal, loaded.params, own)


def test_a_file_without_the_option_is_one_without_a_confidence_head(target, tmp_path):
    network, own = tiny.block_parallel(*target, states_after=(1, 3))
    hub_adapter.save(tmp_path / "draft", hub_adapter.LoadedAttachment(network, own, "here"))
    path = tmp_path / "draft" / "adapter_config.json"
    path.write_text(json.dumps({name: x for name, x in json.loads(path.read_text()).items() if name != "confidence"}))
    assert hub_adapter.load(tmp_path / "draft", target[0]).network == network


def test_states_are_spread_over_the_targets_layers():
    of = lambda layers: BlockParallel(BlockParallelConfig(tiny.config(layers=layers))).taps
    assert of(36) == (2, 10, 18, 26, 34)  # as in the published draft of Qwen3-8B
    assert of(3) == (1, 2)
    assert of(1) == (1,)


def test_layers_of_a_config_count_from_the_end_or_are_fractions():
    assert layer_numbers((2, 0.5, -1), 30) == (2, 15, 30)
    assert layer_numbers((1, 0.1, -2), 3) == (1, 1, 2)
    assert layer_numbers((0, 1.5, 40, -40), 30) == (0, 1.5, 40, -9)  # refused where they are used


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"states_after": (3, 2)}, "block_parallel.states_after is .* ascending order, from 1 to the target's 3"),
        ({"states_after": (4,)}, "from 1 to the target's 3"),
        ({"layers": 0}, "the draft needs 1 layer or more"),
        ({"block_size": 1}, "it counts the last committed token, so give 2 or more"),
        ({"mask_id": 24}, "give an id below 24, or -1"),
    ],
)
def test_sizes_that_cannot_be_are_refused(target, options, message):
    with pytest.raises(UserError, match=message):
        BlockParallelConfig(target[0].config, **options)


def test_a_gamma_beyond_the_block_is_refused(target):
    network = BlockParallel(BlockParallelConfig(target[0].config, block_size=4))
    assert build_drafter(BlockParallelDraft(), target[0], 3, network).gamma == 3
    with pytest.raises(UserError, match="gamma 4 is more than the 3 tokens that a block of 4 drafts; take gamma 3 or"):
        build_drafter(BlockParallelDraft(), target[0], 4, network)
