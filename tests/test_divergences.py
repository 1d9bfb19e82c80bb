"""Divergences against values worked by hand, finite differences and limits; masks and chunks of the loss."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny as tiny_models
from ml_collections import ConfigDict

from specjax.distillation import data_sources, divergences, objective
from specjax.models.decoder import Decoder
from specjax.models.language_model import LanguageModel
from specjax.runtime.errors import UserError

NAMES = tuple(divergences.DIVERGENCES)
TARGET = (0.5, 0.25, 0.25)
DRAFT = (0.25, 0.5, 0.25)


def logits_of(*probs):
    return jnp.log(jnp.asarray(probs, jnp.float32))[None, None] + 3.0  # a shift of logits changes nothing


def random_logits(seed, vocab=7, scale=2.0):
    return scale * jax.random.normal(jax.random.key(seed), (2, 3, vocab))


def named(name, beta):
    """The divergence; beta is for jsd alone."""
    return divergences.of_config({"divergence": name, "beta": beta})


LITERALS = {
    # Worked by hand: sum_v P log(P / Q) = 1/2 log 2 - 1/4 log 2, and the same the other way round.
    "forward_kl": 0.25 * math.log(2),
    "reverse_kl": 0.25 * math.log(2),
    # M = (3/8, 3/8, 1/4): 1/2 (1/2 log 4/3 + 1/4 log 2/3) twice.
    "jsd": 0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3),
    "total_variation": 0.25,
    # They share 1/4 + 1/4 + 1/4.
    "negative_log_acceptance": -math.log(0.75),
    "lk_hybrid": math.exp(-2.25) * 0.25 * math.log(2) + (1 - math.exp(-2.25)) * 0.25,
}


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_each_divergence_has_its_value_worked_by_hand(name, jitted):
    function = named(name, 0.5)
    function = jax.jit(function) if jitted else function
    value = function(logits_of(*TARGET), logits_of(*DRAFT))
    assert value.shape == (1, 1) and value.dtype == jnp.float32
    np.testing.assert_allclose(value[0, 0], LITERALS[name], rtol=1e-5)


def test_the_kls_point_where_their_names_say():
    target, draft = logits_of(0.75, 0.25), logits_of(0.5, 0.5)
    forward = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    reverse = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)
    np.testing.assert_allclose(divergences.forward_kl(target, draft)[0, 0], forward, rtol=1e-5)
    np.testing.assert_allclose(divergences.reverse_kl(target, draft)[0, 0], reverse, rtol=1e-5)


def test_jsd_weighs_the_target_by_beta():
    target, draft = logits_of(0.75, 0.25), logits_of(0.5, 0.5)
    p, q, m = (0.75, 0.25), (0.5, 0.5), (0.1 * 0.75 + 0.9 * 0.5, 0.1 * 0.25 + 0.9 * 0.5)
    kl = lambda a, b: sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))
    expected = 0.1 * kl(p, m) + 0.9 * kl(q, m)
    np.testing.assert_allclose(divergences.jsd(target, draft, beta=0.1)[0, 0], expected, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_divergence_is_zero_between_equals_and_positive_otherwise(name):
    function = named(name, 0.3)
    target, draft = random_logits(0), random_logits(1)
    np.testing.assert_allclose(function(target, target + 5.0), 0, atol=1e-6)
    assert (function(target, draft) > 0.01).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_is_that_of_finite_differences(name):
    target, draft = np.asarray(random_logits(0), np.float64), np.asarray(random_logits(1), np.float64)
    function = named(name, 0.3)
    gradient = jax.grad(lambda draft: jnp.sum(function(jnp.float32(target), draft)))(jnp.float32(draft))
    numeric = np.zeros_like(draft)
    for index in np.ndindex(*draft.shape):
        step = np.zeros_like(draft)
        step[index] = 1e-5
        above, below = (in_float64(name, target, draft + sign * step, weights_at=draft) for sign in (1, -1))
        numeric[index] = (above - below) / 2e-5
    np.testing.assert_allclose(gradient, numeric, atol=2e-6, rtol=1e-4)


def in_float64(name, target, draft, beta=0.3, *, weights_at):
    """The formulas once more, in probability space and double precision; the hybrid's weights are constants."""
    softmax = lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    p, q = softmax(target), softmax(draft)
    m = beta * p + (1 - beta) * q
    kl = lambda a, b: (a * np.log(a / b)).sum()
    w = np.exp(-3 * np.minimum(p, softmax(weights_at)).sum(-1, keepdims=True))
    return {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jsd": lambda: beta * kl(p, m) + (1 - beta) * kl(q, m),
        "total_variation": lambda: 0.5 * np.abs(p - q).sum(),
        "negative_log_acceptance": lambda: -np.log(np.minimum(p, q).sum(-1)).sum(),
        "lk_hybrid": lambda: (w * p * np.log(p / q) + (1 - w) * 0.5 * np.abs(p - q)).sum(),
    }[name]()


def test_the_acceptance_losses_pull_where_total_variation_does_not():
    """Far from the target the gradient of total variation vanishes; theirs does not."""
    target, draft = logits_of(0.9999998, 1e-7, 1e-7), logits_of(1e-6, 0.5, 0.499999)
    size = lambda name: float(jnp.abs(jax.grad(lambda x: named(name, 0.5)(target, x).sum())(draft)).max())
    assert size("total_variation") < 1e-2
    assert min(size("negative_log_acceptance"), size("lk_hybrid")) > 0.5


def test_the_negative_log_acceptance_against_a_sure_target_is_the_cross_entropy():
    draft = random_logits(1)
    sure = jnp.where(jnp.arange(7)[None, None] == 2, 0.0, -jnp.inf)
    value = divergences.negative_log_acceptance(jnp.broadcast_to(sure, draft.shape), draft)
    np.testing.assert_allclose(value, -jax.nn.log_softmax(draft)[..., 2], rtol=1e-5)


def test_scaled_jsd_goes_to_the_kls_at_its_ends():
    target, draft = random_logits(0, scale=1.0), random_logits(1, scale=1.0)
    low, high = (divergences.jsd(target, draft, beta=beta) for beta in (1e-3, 1 - 1e-3))
    np.testing.assert_allclose(low / 1e-3, divergences.forward_kl(target, draft), rtol=0.02)
    np.testing.assert_allclose(high / 1e-3, divergences.reverse_kl(target, draft), rtol=0.02)


def test_total_variation_is_one_minus_acceptance():
    target, draft = random_logits(0), random_logits(1)
    total = divergences.total_variation(target, draft) + divergences.acceptance(target, draft)
    np.testing.assert_allclose(total, 1, atol=1e-6)


@pytest.mark.parametrize("far", [200.0, 1e9, float("inf")])
@pytest.mark.parametrize("name", NAMES)
def test_underflowing_probabilities_give_finite_values_and_gradients(name, far):
    target = jnp.asarray([[[0.0, 1.0, -far]]])
    draft = jnp.asarray([[[0.5, 0.0, -far]]])
    function = named(name, 0.5)
    value, gradient = jax.value_and_grad(lambda draft: function(target, draft)[0, 0])(draft)
    two = function(target[..., :2], draft[..., :2])[0, 0]
    np.testing.assert_allclose(value, two, rtol=1e-6)
    assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize("name", divergences.FINITE)
def test_at_any_weight_the_gradient_is_finite_where_the_draft_lacks_an_id(name):
    """Positions of assisted rollouts weigh more than 1; an id that a reduced draft lacks has a logit of -inf."""
    target, draft = random_logits(0), random_logits(1).at[..., -1].set(-jnp.inf)
    gradient = jax.grad(lambda draft, weight: weight * named(name, 0.5)(target, draft).sum())
    np.testing.assert_allclose(gradient(draft, 1000.0), 1000 * gradient(draft, 1.0), rtol=1e-4, atol=1e-5)


def test_bfloat16_logits_are_compared_in_float32():
    target, draft = random_logits(0).astype(jnp.bfloat16), random_logits(1).astype(jnp.bfloat16)
    for name in NAMES:
        function = named(name, 0.5)
        assert function(target, draft).dtype == jnp.float32
        wide = function(target.astype(jnp.float32), draft.astype(jnp.float32))
        np.testing.assert_array_equal(function(target, draft), wide)


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_a_degenerate_beta_is_refused_and_points_to_the_kls(beta):
    with pytest.raises(UserError, match="forward_kl.*reverse_kl"):
        divergences.divergence("jsd", beta=beta)
    with pytest.raises(UserError, match="beta"):
        divergences.jsd(random_logits(0), random_logits(1), beta=beta)


def test_an_unknown_divergence_is_refused_with_the_nearest_name():
    with pytest.raises(UserError, match='"forward_lk".*did you mean "forward_kl"'):
        divergences.divergence("forward_lk")


# The objective.

VOCAB = 11


def tiny(width, layers=1):
    shape = dict(vocab_size=VOCAB, width=width, layers=layers, head_size=4, mlp_width=2 * width, tied_head=False)
    return Decoder(tiny_models.config(**shape))


@functools.cache
def pair():
    draft, target = tiny(8), tiny(12, layers=2)
    drawn = lambda model, seed: tiny_models.on_device(tiny_models.drawn(model, seed))
    return draft, drawn(draft, 0), target, drawn(target, 1)


def a_batch(seed=0, batch=3, positions=10):
    tokens = jax.random.randint(jax.random.key(seed), (batch, positions), 0, VOCAB, jnp.int32)
    return tokens, jnp.asarray([10, 7, 4][:batch], jnp.int32), jnp.asarray([1, 3, 2][:batch], jnp.int32)


def batch_of(tokens, lengths, loss_start):
    return {"tokens": tokens, "lengths": lengths, "loss_start": loss_start}


def loss_of(divergence, chunk=64, temperature=1.0):
    draft, _, target, target_params = pair()
    if divergence == "cross_entropy":
        target, target_params = None, None

    def loss(params, tokens, lengths, loss_start):
        of = objective.Loss(draft, target, named(divergence, 0.3), temperature, chunk)
        return of(params, target_params, batch_of(tokens, lengths, loss_start))

    return loss


@pytest.mark.slow
@pytest.mark.parametrize(
    "divergence", ["jsd", "cross_entropy", *(pytest.param(n, marks=pytest.mark.slow) for n in NAMES if n != "jsd")]
)
def test_the_loss_is_the_sum_over_counted_positions_of_whole_logits(divergence):
    draft, params, target, target_params = pair()
    tokens, lengths, loss_start = a_batch()
    sums = jax.jit(loss_of(divergence, chunk=12, temperature=0.5))(params, tokens, lengths, loss_start)
    logits, wide = (tiny_models.full_logits(*each, tokens) for each in ((draft, params), (target, target_params)))
    if divergence == "cross_entropy":
        losses = -jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1] / 0.5), tokens[:, 1:, None], 2)[..., 0]
        overlaps = jnp.zeros_like(losses)
    else:
        losses = named(divergence, 0.3)(wide / 0.5, logits / 0.5)
        overlaps = divergences.acceptance(wide, logits)
    # Position t is judged by the logits at t - 1.
    places = [(row, t - 1) for row in range(3) for t in range(int(loss_start[row]), int(lengths[row]))]
    loss, overlap = (sum(float(x[place]) for place in places) for x in (np.asarray(losses), np.asarray(overlaps)))
    count = len(places)
    np.testing.assert_allclose(sums.tokens, count)
    np.testing.assert_allclose(sums.loss, loss, rtol=1e-5)
    np.testing.assert_allclose(sums.acceptance, overlap, rtol=1e-5)


@functools.cache
def value_and_gradient(divergence, chunk):
    loss = loss_of(divergence, chunk)
    return jax.jit(jax.value_and_grad(lambda *args: loss(*args).loss))


@pytest.mark.parametrize("divergence, chunk", [("jsd", 9), ("cross_entropy", 1)])
def test_chunks_change_neither_the_loss_nor_its_gradient(divergence, chunk):
    _, params, _, _ = pair()
    whole, whole_gradient = value_and_gradient(divergence, 64)(params, *a_batch())
    value, gradient = value_and_gradient(divergence, chunk)(params, *a_batch())
    np.testing.assert_allclose(value, whole, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4), gradient, whole_gradient)


def test_the_gradient_is_that_of_the_loss():
    """The gradient of chunks is computed in the forward pass; it is compared with differences of the loss."""
    _, params, _, _ = pair()
    loss = jax.jit(lambda params: loss_of("jsd", 9)(params, *a_batch()).loss)
    gradient = jax.grad(lambda params: 3 * loss(params))(params)
    leaves, structure = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    along = jax.tree.unflatten(structure, [jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in leaves])
    moved = lambda step: jax.tree.map(lambda x, direction: x + step * direction, params, along)
    slope = 3 * (loss(moved(1e-3)) - loss(moved(-1e-3))) / 2e-3
    products = jax.tree.map(lambda x, y: jnp.sum(x * y), gradient, along)
    np.testing.assert_allclose(sum(jax.tree.leaves(products)), slope, rtol=1e-2)


@pytest.mark.slow
def test_the_gradient_of_a_draft_that_computes_in_bfloat16_is_near_that_in_float32():
    draft, params, target, target_params = pair()

    def gradient(dtype):
        computed = Decoder(dataclasses.replace(draft.config, compute_dtype=dtype))
        of = objective.Loss(computed, target, named("jsd", 0.3), 1.0, 9)
        loss = lambda params: of(params, target_params, batch_of(*a_batch())).loss
        return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(params))])

    exact, rounded = gradient("float32"), gradient("bfloat16")
    assert jnp.linalg.norm(rounded - exact) < 0.05 * jnp.linalg.norm(exact)


@pytest.mark.parametrize("divergence", ["jsd", "cross_entropy"])
def test_padding_changes_nothing(divergence):
    _, params, _, _ = pair()
    tokens, lengths, loss_start = a_batch()
    padding = jnp.arange(10)[None] >= lengths[:, None]
    other = jnp.where(padding, (tokens + 1) % VOCAB, tokens)
    gradient = value_and_gradient(divergence, 64)
    for left, right in zip(
        jax.tree.leaves(gradient(params, tokens, lengths, loss_start)),
        jax.tree.leaves(gradient(params, other, lengths, loss_start)),
        strict=True,
    ):
        np.testing.assert_array_equal(left, right)


class Bigram(LanguageModel):
    """A "model" without context: each token's logits are a row of its table."""

    def extend(self, params, cache, tokens, positions):
        return params["table"][tokens], cache

    def column_logits(self, params, hidden):
        return hidden


def test_what_a_prompt_says_is_no_prediction_target():
    params = {"table": jax.random.normal(jax.random.key(0), (VOCAB, VOCAB))}
    tokens, lengths, _ = a_batch()
    loss_start = jnp.asarray([4, 3, 3], jnp.int32)
    # Without context all of a prompt but its last token, which the first prediction reads, is of no account.
    prompt = jnp.arange(10)[None] < loss_start[:, None] - 1
    other = jnp.where(prompt, (tokens + 1) % VOCAB, tokens)
    of = objective.Loss(Bigram(None), None, None, temperature=1.0, chunk=4)
    run = jax.jit(lambda t: of(params, None, batch_of(t, lengths, loss_start)))
    np.testing.assert_array_equal(run(tokens).loss, run(other).loss)
    assert run(tokens).tokens == (10 - 4) + (7 - 3) + (4 - 3)
    first_target = tokens.at[0, 4].set((tokens[0, 4] + 1) % VOCAB)
    assert run(first_target).loss != run(tokens).loss


def test_no_gradient_reaches_the_target():
    draft, params, target, target_params = pair()
    of = objective.Loss(draft, target, named("jsd", 0.5), temperature=1.0, chunk=4)
    loss = lambda target_params: of(params, target_params, batch_of(*a_batch())).loss
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(target_params)))


def test_chunks_keep_whole_logits_out_of_memory():
    vocab, batch, positions = 32768, 2, 128
    table = {"table": jax.ShapeDtypeStruct((vocab, 16), jnp.float32)}
    rows = jax.ShapeDtypeStruct((batch,), jnp.int32)
    tokens = jax.ShapeDtypeStruct((batch, positions), jnp.int32)

    class Tied(Bigram):
        layers = 1

        def column_logits(self, params, hidden):
            return jnp.einsum("BTD,VD->BTV", hidden, params["table"])

    def temporary_bytes(chunk):
        of = objective.Loss(Tied(None), Tied(None), named("jsd", 0.5), temperature=1.0, chunk=chunk)
        loss = lambda params, other, *batch: of(params, other, batch_of(*batch)).loss
        compiled = jax.jit(jax.grad(loss)).lower(table, table, tokens, rows, rows).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    whole_logits = batch * positions * vocab * 4
    assert temporary_bytes(batch * positions) > 2 * whole_logits  # the draft's and the target's
    assert temporary_bytes(16) < whole_logits


def test_a_divergence_without_its_target_is_refused():
    with pytest.raises(UserError, match='"jsd" compares with a target'):
        objective.Loss(pair()[0], None, named("jsd", 0.5), temperature=1.0, chunk=4)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(divergence="cross_entrpy"), "cross_entropy"),
        (dict(divergence="jsd", beta=1.0), "beta"),
        (dict(refused="reverse_lk"), 'did you mean "reverse_kl"'),
        (dict(refused="jsd", beta=1.0), "beta"),
        (dict(selected=0.4), "loss.selected is 0.4 and loss.reference names no draft; set selected below 1 with"),
    ],
)
def test_senseless_settings_of_the_loss_are_refused(settings, message):
    good = dict(
        divergence="forward_kl",
        beta=0.5,
        temperature=1.0,
        chunk=4,
        refused="jsd",
        selected=1.0,
        reference="",
        anchors=0,
        balance=0.0,
    )
    with pytest.raises(UserError, match=message):
        objective.Loss.of_config(ConfigDict({**good, **settings}), pair()[0], pair()[2])


def test_the_heads_run_on_a_share_of_the_row_that_holds_the_counted_positions():
    shares = {(128, 253): 128, (127, 254): 128, (129, 253): 192, (193, 253): 0, (30, 253): 32, (128, 192): 144}
    shares |= {(10, 20): 10, (11, 20): 0}
    assert {case: data_sources.window(*case) for case in shares} == shares


@pytest.mark.parametrize("predicts", [1, 3])
def test_heads_on_a_window_of_the_row_give_the_same_sums(predicts):
    """Counted positions lie anywhere in a row; a window of their number contains them, also at the row's ends."""
    rng = np.random.default_rng(0)
    rows, columns, width = 5, 16, 4
    parts = {
        "draft": rng.normal(size=(rows, columns, 3)),
        "labels": rng.integers(0, 9, (rows, columns, predicts)),
        "weights": np.zeros((rows, columns, predicts)),
    }
    starts = np.asarray([-2, 0, 5, 11, 14])
    for row, start in enumerate(starts):
        parts["weights"][row, max(start, 0) : start + width] = 1.0
    windows = objective._windows(jax.tree.map(jnp.asarray, parts), jnp.asarray(starts), width)
    assert windows["weights"].sum() == parts["weights"].sum()
    total = lambda parts: np.einsum("BTP,BTD->D", parts["weights"], parts["draft"])
    np.testing.assert_allclose(total(windows), total(parts), rtol=1e-5)
