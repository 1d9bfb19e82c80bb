"""Adjusted probabilities against a plain reference; draws against the law they claim."""

import jax
import jax.numpy as jnp
import lossless
import numpy as np
import pytest
import scipy.special
import tiny

from specjax.decoding.sampling import Noise, Sampling, Stream, most_probable, probabilities, row_keys
from specjax.runtime.errors import UserError


def reference(logits, temperature, top_k, top_p, min_p=0.0):
    """One row in float64, by the words of the definition: sort, keep k, keep p of what is left; ties stay."""
    probs = np.exp((logits - logits.max()) / temperature)
    probs /= probs.sum()
    truncated = probs.copy()
    if top_k:
        truncated[probs < np.sort(probs)[::-1][min(top_k, len(probs)) - 1]] = 0
        truncated /= truncated.sum()
    if top_p < 1:
        mass, edge = 0.0, 0.0
        for value in np.sort(truncated)[::-1]:
            edge, mass = value, mass + value
            if mass >= top_p:
                break
        truncated[truncated < edge] = 0
    truncated[truncated < min_p * truncated.max()] = 0
    return truncated / truncated.sum()


@jax.jit
def adjusted(logits, sampling):
    return probabilities(logits, sampling, greedy=False)


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (1, 1.0), (5, 1.0), (99, 1.0), (0, 0.6), (0, 1e-6), (7, 0.7)])
def test_probabilities_are_the_plain_references(temperature, top_k, top_p):
    logits = np.random.default_rng(0).normal(size=(3, 4, 30)).astype(np.float32) * 2
    ours = np.asarray(adjusted(jnp.asarray(logits), Sampling.of(temperature, top_k, top_p)))
    expected = np.apply_along_axis(reference, -1, logits.astype(np.float64), temperature, top_k, top_p)
    np.testing.assert_array_equal(ours > 0, expected > 0)
    np.testing.assert_allclose(ours, expected, rtol=2e-5)


@pytest.mark.parametrize("min_p, top_k, top_p", [(0.05, 0, 1.0), (0.3, 0, 0.9), (0.1, 7, 0.8), (1.0, 0, 1.0)])
def test_min_p_keeps_a_share_of_the_largest_probability_after_the_other_cuts(min_p, top_k, top_p):
    logits = np.random.default_rng(0).normal(size=(3, 4, 30)).astype(np.float32) * 2
    ours = np.asarray(adjusted(jnp.asarray(logits), Sampling.of(0.8, top_k, top_p, min_p=min_p)))
    expected = np.apply_along_axis(reference, -1, logits.astype(np.float64), 0.8, top_k, top_p, min_p)
    np.testing.assert_array_equal(ours > 0, expected > 0)
    np.testing.assert_allclose(ours, expected, rtol=2e-5)


def test_only_turning_a_cut_on_compiles_again_and_without_one_there_is_no_loop():
    adjusted = jax.jit(lambda logits, sampling: probabilities(logits, sampling, greedy=False))
    logits = jnp.zeros((1, 1, 30))
    programs = []
    for cuts in ({}, {"top_p": 0.5}, {"top_p": 0.9}, {"top_k": 3}, {"top_k": 4}, {"min_p": 0.1}, {"min_p": 0.2}):
        adjusted(logits, Sampling.of(1.0, **cuts))
        programs.append(adjusted._cache_size())
    assert programs == [1, 2, 2, 3, 3, 4, 4]
    loops = lambda **cuts: str(jax.make_jaxpr(adjusted)(logits, Sampling.of(1.0, **cuts))).count("scan[")
    assert [loops(), loops(min_p=0.1), loops(top_p=0.5), loops(top_k=3), loops(top_k=3, top_p=0.5)] == [0, 0, 1, 1, 2]


def test_ties_at_either_edge_are_all_kept():
    logits = jnp.log(jnp.asarray([[[0.3, 0.2, 0.2, 0.2, 0.1]]]))
    survivors = lambda **cut: (np.asarray(adjusted(logits, Sampling.of(1.0, **cut)))[0, 0] > 0).tolist()
    assert survivors(top_k=2) == [True, True, True, True, False]
    assert survivors(top_p=0.4) == [True, True, True, True, False]
    assert survivors(top_k=1) == survivors(top_p=0.2) == [True, False, False, False, False]


def test_top_p_of_one_drops_no_token_whatever_the_rounding():
    # The cumulative sum of such a long tail passes 1 by rounding well before its end.
    logits = jax.random.normal(jax.random.key(0), (2, 1, 5000)) * 8
    descending = np.sort(np.asarray(adjusted(logits, Sampling.of(1.0))), axis=-1)[..., ::-1]
    assert np.all(np.asarray(jnp.cumsum(jnp.asarray(descending), axis=-1))[..., 3000] >= 0.999999)
    assert np.all(descending > 0)
    cut = np.asarray(adjusted(logits, Sampling.of(1.0, top_k=4000)))
    assert np.all((cut > 0).sum(-1) == 4000)


def test_a_cut_is_a_distribution_of_the_uncut_ratios():
    logits = jax.random.normal(jax.random.key(1), (4, 3, 50)) * 3
    plain, cut = (np.asarray(adjusted(logits, s)) for s in (Sampling.of(1.0), Sampling.of(1.0, 20, 0.8)))
    np.testing.assert_allclose(cut.sum(-1), 1, atol=1e-6)
    ratio = np.where(cut > 0, cut / plain, np.nan)
    np.testing.assert_allclose(np.nanmax(ratio, -1), np.nanmin(ratio, -1), rtol=1e-5)


def test_the_smallest_temperature_is_the_argmax():
    logits = jnp.asarray([[[7.0, 9.0, -3.0, 8.999]]])
    for temperature in (1e-30, 1e-37):
        probs = np.asarray(adjusted(logits, Sampling.of(temperature, top_k=2, top_p=1e-37)))
        assert probs.tolist() == [[[0.0, 1.0, 0.0, 0.0]]]


def test_greedy_probabilities_are_one_hot_at_the_first_argmax():
    logits = jnp.asarray([[[0.0, 2.0, 2.0, -1.0]]])
    probs = probabilities(logits, Sampling.of(0.0), greedy=True)
    assert np.asarray(probs).tolist() == [[[0.0, 1.0, 0.0, 0.0]]]


@pytest.mark.parametrize(
    "values, says",
    [
        ({"temperature": -0.5}, "temperature.*-0.5"),
        ({"temperature": float("nan")}, "temperature.*nan"),
        ({"temperature": float("inf")}, "temperature.*inf"),
        ({"temperature": 1e-42}, "temperature.*1e-42"),
        ({"top_k": -1}, "top_k.*-1"),
        ({"top_p": 1e-42}, "top_p.*1e-42"),
        ({"top_p": 0.0}, "top_p.*0.0"),
        ({"top_p": 1.5}, "top_p.*1.5"),
        ({"min_p": -0.1}, "min_p.*-0.1"),
        ({"min_p": float("nan")}, "min_p.*nan"),
    ],
)
def test_settings_outside_their_range_are_refused(values, says):
    with pytest.raises(UserError, match=says):
        Sampling.of(**values)


# --- draws ---------------------------------------------------------------------------------------------------------

ROWS = 20000


@pytest.fixture(scope="module")
def noise():
    return Noise(row_keys(0, jnp.arange(ROWS)), jnp.full((ROWS,), 7, jnp.int32), False, False)


def p_value(counts, expected):
    return scipy.special.chdtrc(len(expected) - 1, ((counts - expected) ** 2 / expected).sum())


choose = jax.jit(
    lambda noise, weights, offset, stream: noise.choose(weights, jnp.full((ROWS,), offset, jnp.int32), stream),
    static_argnums=(2, 3),
)


def drawn(noise, weights, offset=0, stream=Stream.RECOVER):
    return np.asarray(choose(noise, jnp.broadcast_to(jnp.asarray(weights), (ROWS, len(weights))), offset, stream))


def test_choose_draws_in_proportion_to_unnormalised_weights_and_never_a_zero(noise):
    weights = np.asarray([3.0, 0.0, 1.0, 0.5, 0.0, 5.5, 1e-3], np.float32)
    counts = np.bincount(drawn(noise, weights), minlength=7)
    assert counts[1] == counts[4] == 0
    positive = weights > 0
    assert p_value(counts[positive], weights[positive] / weights.sum() * ROWS) > 1e-4
    # The same counts against slightly other weights: the test could have failed.
    assert p_value(counts[positive], np.asarray([3.3, 1, 0.5, 5.2, 1e-3]) / 10.001 * ROWS) < 1e-6


@pytest.mark.slow
def test_tails_of_262144_ids_are_drawn_as_often_as_they_weigh():
    """2% of the mass is spread over all ids but one, in the middle."""
    vocab, rows = 262144, 32
    weights = np.full(vocab, 0.02 / (vocab - 1), np.float32)
    weights[100_000] = 0.98
    at = lambda position: Noise(row_keys(1, jnp.arange(rows)), jnp.full((rows,), position, jnp.int32), False, False)
    wide, zero = jnp.broadcast_to(weights, (rows, vocab)), jnp.zeros((rows,), jnp.int32)
    draw = jax.jit(lambda position: at(position).choose(wide, zero, Stream.DRAFT))
    tokens = np.concatenate([np.asarray(draw(position)) for position in range(100)])
    tail = tokens[tokens != 100_000]
    assert len(tail) / len(tokens) == pytest.approx(0.02, abs=4 * (0.02 * 0.98 / len(tokens)) ** 0.5)
    assert p_value(np.histogram(tail, 4, (0, vocab))[0], np.full(4, len(tail) / 4)) > 1e-4


def test_shared_noise_resolves_the_tails_of_262144_ids():
    noise = Noise(row_keys(1, jnp.arange(4)), jnp.full((4,), 7, jnp.int32), False, True)
    gumbel = np.asarray(jax.jit(lambda: noise.perturbed(jnp.ones((4, 262144)), jnp.zeros((4,), jnp.int32)))())
    # At the default resolution, exp(-noise) of large noise is a multiple of 2 ** -24.
    steps = np.exp(-gumbel[gumbel > 10].astype(np.float64)) * 2**24
    assert len(steps) > 20 and np.mean(np.abs(steps - np.round(steps)) > 0.05) > 0.6


def test_choose_finds_the_only_positive_weight_however_small(noise):
    assert np.all(drawn(noise, [0.0, 1e-30, 0.0]) == 1)


def test_uniforms_are_uniform_and_independent_of_position_and_draws(noise):
    uniforms = np.asarray(jax.jit(lambda noise: noise.uniforms(3))(noise))
    assert uniforms.min() >= 0 and uniforms.max() < 1
    for column in uniforms.T:
        assert p_value(np.histogram(column, 20, (0, 1))[0], np.full(20, ROWS / 20)) > 1e-4
    token = drawn(noise, [1.0, 1.0], stream=Stream.DRAFT)
    others = [
        drawn(noise, [1.0, 1.0]),
        drawn(noise, [1.0, 1.0], offset=1, stream=Stream.DRAFT),
        uniforms[:, 0] < 0.5,
    ]
    for other in [*others, uniforms[:, 1] < 0.5]:
        counts = np.histogram2d(token, np.asarray(other, int), 2)[0].ravel()
        assert p_value(counts, np.full(4, ROWS / 4)) > 1e-4


def test_streams_are_one_only_where_the_rule_shares_noise(noise):
    weights = [1.0, 2.0, 3.0]
    both = lambda noise: (
        drawn(noise, weights, stream=Stream.DRAFT),
        drawn(noise, weights, stream=Stream.RECOVER),
    )
    draft, recover = both(noise)
    assert 0.2 < np.mean(draft == recover) < 0.6
    draft, recover = both(Noise(noise.row_keys, noise.lengths, False, True))
    np.testing.assert_array_equal(draft, recover)


def test_a_draw_depends_on_row_key_and_position_alone():
    weights = jnp.ones((4, 9))
    noise = lambda keys, lengths: Noise(keys, lengths, False, False)
    draw = jax.jit(lambda keys, lengths, offsets: noise(keys, lengths).choose(weights, offsets, Stream.DRAFT))
    keys, lengths = row_keys(5, jnp.asarray([10, 11, 12, 13])), jnp.asarray([3, 8, 5, 6], jnp.int32)
    zero = jnp.zeros((4,), jnp.int32)
    base = np.asarray(draw(keys, lengths, zero))
    order = jnp.asarray([2, 0, 3, 1])
    np.testing.assert_array_equal(np.asarray(draw(keys[order], lengths[order], zero)), base[np.asarray(order)])
    # Position 8 is position 8, whether the block began there or two tokens before.
    np.testing.assert_array_equal(np.asarray(draw(keys, lengths - 2, zero + 2)), base)


def test_row_keys_depend_on_seed_and_index_and_not_on_the_slot():
    data = lambda seed, indices: jax.random.key_data(row_keys(seed, jnp.asarray(indices))).tolist()
    assert data(0, [3, 1, 4]) == [*data(0, [3]), *data(0, [1, 4])]
    assert len({tuple(key) for seed in range(3) for key in data(seed, list(range(50)))}) == 150


def test_greedy_noise_takes_the_first_maximum(noise):
    greedy = Noise(noise.row_keys, noise.lengths, True, False)
    assert np.all(drawn(greedy, [0.2, 0.4, 0.4]) == 1)


@pytest.mark.slow
def test_the_loop_samples_the_references_distribution_over_151936_ids():
    """The first new token, after a block of two drafted ones: it was accepted or recovered."""
    vocab, rows, rounds = 151_936, 32, 4
    target, params = tiny.decoder(0, sharpness=4.0, vocab_size=vocab)
    draft_params = jax.tree.map(lambda a, b: a + 0.02 * b, params, tiny.decoder(2, vocab_size=vocab)[1])
    plan = tiny.plan(target, "model", {"model": target}, gamma=2, slots=3, max_new=1)
    texts, lengths = jnp.asarray([[5, 9, 70_000]] * rows, jnp.int32), jnp.full((rows,), 3, jnp.int32)
    logits = np.asarray(tiny.full_logits(target, params, texts[:1])[0, -1], np.float64)
    for cuts in ((8, 1.0, 0.0), (0, 0.5, 0.0), (0, 1.0, 0.05)):  # 8, 6 and 12 ids are left
        adjust, tokens, accepted = Sampling.of(0.7, *cuts[:2], min_p=cuts[2]), [], 0
        for seed in range(rounds):
            state = tiny.decode(plan, params, draft_params, texts, lengths, 1, seed=seed, adjust=adjust)
            tokens.append(np.asarray(state.tokens)[:, 3])
            accepted += int(state.statistics.accepted_at.sum())
        counts = np.bincount(np.concatenate(tokens), minlength=vocab)
        expected = reference(logits, 0.7, *cuts) * rows * rounds
        assert counts[expected == 0].sum() == 0, "a token of probability 0 was emitted"
        statistic, freedom = lossless.chi_square(counts, expected)
        assert freedom > 2 and scipy.special.chdtrc(freedom, statistic) > 1e-4, cuts
        assert 0.1 < accepted / (rows * rounds) < 0.9, cuts


def test_the_most_probable_token_is_the_first_of_the_largest():
    scores = jnp.asarray([[0.0, 3.0, 3.0, -1.0], [-jnp.inf, -jnp.inf, -2.0, -2.0], [jnp.nan, 0.0, 0.0, 1.0]])
    np.testing.assert_array_equal(most_probable(scores)[:2], [1, 2])
    assert 0 <= int(most_probable(scores)[2]) < 4
