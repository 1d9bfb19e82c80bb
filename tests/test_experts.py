"""Mixtures of experts: every way to compute them, on one device and on meshes, decoding with them, their files."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from lossless import BATCH, COUPLED, GREEDY, MAX_NEW, SLOTS, VOCAB, Pair, compare_with_plain
from ml_collections import ConfigDict

from specjax.decoding.sampling import Sampling
from specjax.models import experts
from specjax.models.experts import Choice
from specjax.runtime import mesh as meshes

SPARSE = dict(experts=8, experts_per_token=3, expert_width=12)
KERNELS = ("gate", "up", "down")


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def case(batch, steps, bias=False):
    """The config, inputs, the choice of experts for each token, and kernels, all random."""
    config = tiny.config(**SPARSE, mlp_bias=bias)
    choice = experts.choose(normal(1, batch * steps, 8), config)
    choice = Choice(*(x.reshape(batch, steps, 3) for x in choice))
    kernels = {}
    for seed, name in enumerate(KERNELS):
        outputs, inputs = (16, 12) if name == "down" else (12, 16)
        kernels[name] = {"kernel": 0.3 * normal(seed + 2, 8, outputs, inputs)}
        kernels[name] |= {"bias": 0.3 * normal(seed + 5, 8, outputs)} if bias else {}
    return config, normal(0, batch, steps, 16), choice, kernels


def dense(inputs, choice, kernels):
    """Every expert computes every token, and those that were not chosen have weight 0."""
    apply = lambda name, x: (
        jnp.einsum("BTEI,EOI->BTEO", x, kernels[name]["kernel"])
        + kernels[name].get("bias", jnp.zeros((8, 1)))[None, None]
    )
    x = jnp.broadcast_to(inputs[:, :, None], (*inputs.shape[:2], 8, 16))
    outputs = apply("down", jax.nn.silu(apply("gate", x)) * apply("up", x))
    weights = jnp.sum(jax.nn.one_hot(choice.experts, 8) * choice.weights[..., None], axis=2)
    return jnp.einsum("BTEO,BTE->BTO", outputs, weights)


def value_and_gradients(run, inputs, choice, kernels):
    """The output, and gradients of a sum with respect to inputs, weights of experts, and kernels."""
    loss = lambda inputs, weights, kernels: jnp.sum(jnp.sin(run(inputs, Choice(choice.experts, weights), kernels)))
    gradients = jax.jit(jax.grad(loss, (0, 1, 2)))(inputs, choice.weights, kernels)
    return jax.device_get((jax.jit(run)(inputs, choice, kernels), gradients))


def assert_close(got, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, expected)


# --- the arithmetic ------------------------------------------------------------------------------------------------


def test_weights_are_the_probabilities_of_the_chosen_experts_normalised_if_the_config_says_so():
    logits = jnp.log(jnp.asarray([[0.1, 0.4, 0.2, 0.3]]))
    sparse = {**SPARSE, "experts": 4, "experts_per_token": 2}
    choice = experts.choose(logits, tiny.config(**sparse, normalised_experts=False))
    assert choice.experts.tolist() == [[1, 3]]
    np.testing.assert_allclose(choice.weights, [[0.4, 0.3]], rtol=1e-6)
    choice = experts.choose(logits, tiny.config(**sparse))
    np.testing.assert_allclose(choice.weights, [[4 / 7, 3 / 7]], rtol=1e-6)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("batch, steps, bias", [(1, 1, False), (2, 5, True), (4, 40, False)])
def test_every_platforms_way_computes_the_chosen_experts_and_their_gradients(platform, batch, steps, bias, monkeypatch):
    config, *arrays = case(batch, steps, bias)
    monkeypatch.setattr(meshes, "platform", lambda: platform)
    assert_close(value_and_gradients(functools.partial(experts.mix, config), *arrays), reference(batch, steps, bias))


@functools.cache
def reference(batch, steps, bias):
    return value_and_gradients(dense, *case(batch, steps, bias)[1:])


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2), (1, 4, 2), (1, 1, 8)])
@pytest.mark.parametrize("batch, steps, bias", [(2, 5, True), (4, 40, False)])
def test_meshes_compute_what_one_device_computes(sizes, batch, steps, bias):
    config, inputs, choice, kernels = case(batch, steps, bias)
    of = {name: {"kernel": ("expert", None, "embed"), "bias": ("expert", None)} for name in KERNELS}
    of["down"] = {"kernel": ("expert", "embed", None), "bias": ("expert", "embed")}
    axes = {name: {kind: of[name][kind] for kind in arrays} for name, arrays in kernels.items()}
    mesh = mesh_of(sizes)
    run = lambda *arrays: experts._on_mesh(functools.partial(experts.mix, config), *arrays)
    with meshes.use(mesh):
        got = value_and_gradients(run, inputs, choice, meshes.shard(kernels, axes, mesh))
    assert_close(got, reference(batch, steps, bias))


def mesh_of(sizes):
    return meshes.make_mesh(ConfigDict(dict(zip(meshes.AXES, sizes, strict=True))))


def test_the_balance_loss_is_k_for_even_use_and_grows_to_the_number_of_experts_for_one_expert():
    even = jnp.tile(jnp.asarray([[5.0, 5.0, 0.0, 0.0], [0.0, 0.0, 5.0, 5.0]]), (4, 1))
    choice = experts.choose(even, tiny.config(**{**SPARSE, "experts": 4, "experts_per_token": 2}))
    np.testing.assert_allclose(experts.balance_loss(even, choice.experts, jnp.ones(8)), 2.0, rtol=1e-5)
    one = jnp.tile(jnp.asarray([[50.0, 0.0, 0.0, 0.0]]), (8, 1))
    # Padding does not count.
    mask, everything = jnp.asarray([1.0] * 6 + [0.0] * 2), one.at[6:].set(even[:2] * 9)
    np.testing.assert_allclose(experts.balance_loss(everything, jnp.zeros((8, 1), int), mask), 4.0, rtol=1e-5)


# --- decoding ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair():
    return sparse_pair()


def sparse_pair():
    """A target with a dense and a sparse layer, whose kernels are three times the usual size, and its noisy copy."""
    target, params = tiny.decoder(1, sharpness=2.0, **SPARSE, dense_layers=(0,))
    params["blocks"] = jax.tree.map(lambda x: 3 * x if x.ndim == 3 else x, params["blocks"])
    noisy = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape) * x.std(), params)
    return Pair(target, params, noisy, *tiny.prompts(0, BATCH, SLOTS, VOCAB))


def check(pair, settings, rule):
    kinds = [("model", 3), ("ngram", 4), ("early_exit", 2)]
    entries = [(pair.plan(kind, gamma, rule, rule != "coupled"), pair.draft_params, {}) for kind, gamma in kinds]
    for _ in compare_with_plain(pair, settings, entries, rule):
        pass


def test_greedy_speculation_equals_greedy_plain_decoding(pair):
    check(pair, GREEDY, "lossless")


def test_coupled_speculation_equals_plain_decoding_with_the_same_noise(pair):
    check(pair, COUPLED[:1], "coupled")


def alone_and_together(pair):
    """Of 8 prompts the texts that each has alone and in a batch of all, speculative and at temperature 1."""
    plan = pair.plan("model", 3, "lossless", False)

    def texts(rows):
        texts, lengths = pair.texts[rows], pair.lengths[rows]
        state = tiny.decode(
            plan, pair.params, pair.draft_params, texts, lengths, MAX_NEW, indices=rows, adjust=Sampling.of(1.0)
        )
        return tiny.texts_of(state)

    rows = np.arange(8)
    return [texts(rows[i : i + 1])[0] for i in rows], texts(rows)


def test_a_rows_text_is_the_same_alone_and_in_a_batch_of_8(pair):
    alone, together = alone_and_together(pair)
    assert alone == together


def dropping(config, inputs, choice, kernels, **mesh):
    """The planted fault: an expert computes at most 2 tokens of a call, the others it drops."""
    chosen = jax.nn.one_hot(choice.experts.reshape(-1), config.experts, dtype=jnp.int32)
    rank = jnp.sum((jnp.cumsum(chosen, axis=0) - 1) * chosen, axis=1).reshape(choice.experts.shape)
    kept = Choice(choice.experts, jnp.where(rank < 2, choice.weights, 0))
    return MIX(config, inputs, kept, kernels, **mesh)


def twice_normalised(logits, config):
    """The planted fault: the weights depend on the largest of the batch."""
    choice = CHOOSE(logits, config)
    return Choice(choice.experts, choice.weights / jnp.max(choice.weights))


MIX, CHOOSE = experts.mix, experts.choose
FAULTS = {"mix": dropping, "choose": twice_normalised}


@pytest.mark.parametrize("function", FAULTS)
def test_weights_or_drops_that_depend_on_the_batch_change_a_rows_text(function, monkeypatch):
    jax.clear_caches()
    monkeypatch.setattr(experts, function, FAULTS[function])
    alone, together = alone_and_together(sparse_pair())
    jax.clear_caches()
    assert alone != together


def test_dropped_tokens_break_the_equality_with_plain_decoding(monkeypatch):
    jax.clear_caches()
    monkeypatch.setattr(experts, "mix", dropping)
    with pytest.raises(AssertionError, match="row .* position"):
        check(sparse_pair(), GREEDY, "lossless")
    jax.clear_caches()
