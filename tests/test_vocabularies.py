"""Models of one tokenizer whose embeddings are padded to different sizes decode and distil together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from specjax.decoding.sampling import Sampling
from specjax.distillation import divergences, objective
from specjax.models.decoder import Decoder
from specjax.models.language_model import LanguageModel, fit_logits

VOCAB, BATCH, SLOTS, MAX_NEW = 24, 32, 8, 12
LOSSLESS = ("lossless", False)
LOSSLESS_GREEDY, COUPLED = ("lossless", True), ("coupled", False)
DIVERGENCES = [
    *("forward_kl", "jsd"),
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("reverse_kl", "total_variation")),
]


def resized(params, rows, seed=7):
    """The parameters with a tied embedding of so many rows: cut, or padded with rows as likely as any."""
    table = np.asarray(params["embedding"])
    more = np.random.default_rng(seed).normal(size=(max(rows - len(table), 0), table.shape[1])) * table.std()
    return {**params, "embedding": jnp.asarray(np.concatenate([table, more])[:rows], jnp.float32)}


@pytest.fixture(scope="module")
def target():
    return tiny.decoder(1, sharpness=2.0)


def near(target, rows):
    """A draft that often agrees with the target, of another number of rows."""
    _, params = target
    noise = tiny.decoder(2)[1]
    params = jax.tree.map(lambda a, b: a + 0.1 * b, params, noise)
    return Decoder(tiny.config(vocab_size=rows)), resized(params, rows)


def decode(target, draft, *, gamma=3, rule="lossless", greedy=False):
    texts, lengths = tiny.prompts(0, BATCH, SLOTS, VOCAB)
    model, params = draft or (None, None)
    options = {"model": model}
    plan = tiny.plan(target[0], "model", options, gamma=gamma, slots=SLOTS, max_new=MAX_NEW, rule=rule, greedy=greedy)
    adjust = Sampling.of(0.0 if greedy else 1.0)
    return tiny.decode(plan, target[1], params, texts, lengths, MAX_NEW, adjust=adjust)


def test_fitting_cuts_the_ids_beyond_and_gives_missing_ones_probability_0():
    logits = jnp.asarray([[1.0, 2.0, 3.0]])
    np.testing.assert_array_equal(fit_logits(logits, 2), [[1.0, 2.0]])
    np.testing.assert_array_equal(fit_logits(logits, 3), logits)
    probs = jax.nn.softmax(fit_logits(logits, 5))
    np.testing.assert_array_equal(probs[:, 3:], 0)
    np.testing.assert_allclose(probs[:, :3], jax.nn.softmax(logits), rtol=1e-6)


def test_a_fitted_model_has_the_same_parameters_and_other_logits(target):
    model, params = target
    narrow, wide = model.with_vocab_size(20), model.with_vocab_size(30)
    assert (narrow.vocab_size, wide.vocab_size, narrow.num_params) == (20, 30, model.num_params)
    assert wide.with_vocab_size(VOCAB) == model
    tokens = jnp.asarray([[1, 2, 3]])
    np.testing.assert_array_equal(
        tiny.full_logits(narrow, params, tokens), tiny.full_logits(model, params, tokens)[..., :20]
    )
    assert tiny.full_logits(wide, params, tokens).shape == (1, 3, 30)


def test_an_id_without_a_row_is_looked_up_as_the_last_one(target):
    model, params = target
    foreign = tiny.full_logits(model, params, jnp.asarray([[1, VOCAB + 5, 2]]))
    np.testing.assert_array_equal(foreign, tiny.full_logits(model, params, jnp.asarray([[1, VOCAB - 1, 2]])))


@pytest.mark.parametrize(
    "rule, greedy",
    [pytest.param(*case, marks=pytest.mark.slow) for case in (LOSSLESS, LOSSLESS_GREEDY, COUPLED)],
)
def test_padding_rows_of_a_draft_change_not_one_token_and_not_one_count(target, rule, greedy):
    draft, params = near(target, VOCAB)
    padded = Decoder(tiny.config(vocab_size=VOCAB + 8)), resized(params, VOCAB + 8)
    plain, wide = (decode(target, pair, rule=rule, greedy=greedy) for pair in ((draft, params), padded))
    assert tiny.texts_of(plain) == tiny.texts_of(wide)
    for left, right in zip(jax.tree.leaves(plain.statistics), jax.tree.leaves(wide.statistics), strict=True):
        np.testing.assert_array_equal(left, right)
    assert int(plain.statistics.accepted_at.sum()) > 0


@pytest.mark.slow
@pytest.mark.parametrize("rows", [VOCAB - 6, pytest.param(VOCAB + 8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("rule, greedy", [LOSSLESS_GREEDY, pytest.param(*COUPLED, marks=pytest.mark.slow)])
def test_with_any_draft_vocabulary_the_tokens_are_those_of_plain_decoding(target, rows, rule, greedy):
    plain = decode(target, None, gamma=0, rule=rule, greedy=greedy)
    speculative = decode(target, near(target, rows), rule=rule, greedy=greedy)
    assert tiny.texts_of(speculative) == tiny.texts_of(plain)
    assert int(speculative.statistics.accepted_at.sum()) > 0
    assert max(map(max, tiny.texts_of(plain))) >= VOCAB - 6  # the narrow draft was fed ids that it lacks


class Table(LanguageModel):
    """A "model" without context: the logits after a token are a row of its table."""

    layers = 1

    def extend(self, params, cache, tokens, positions):
        return params["table"][tokens], cache

    def column_logits(self, params, hidden):
        return hidden


def loss(target_table, divergence, temperature=1.0):
    tokens = jax.random.randint(jax.random.key(5), (3, 10), 0, 6, jnp.int32)
    lengths, start = jnp.asarray([10, 7, 4], jnp.int32), jnp.asarray([1, 3, 2], jnp.int32)
    compare = divergences.of_config({"divergence": divergence, "beta": 0.3})
    of = objective.Loss(Table(None), Table(None), compare, temperature, chunk=12)
    batch = {"tokens": tokens, "lengths": lengths, "loss_start": start}
    return jax.jit(lambda draft_table: of({"table": draft_table}, {"table": target_table}, batch))


def value_and_gradient(target_table, divergence, temperature=1.0):
    of = loss(target_table, divergence, temperature)
    return jax.jit(jax.value_and_grad(lambda draft_table: of(draft_table).loss))


def table(seed, columns):
    return 2 * jax.random.normal(jax.random.key(seed), (6, columns))


@pytest.mark.parametrize("divergence", [*DIVERGENCES, "cross_entropy"])
def test_a_wider_draft_learns_what_it_would_without_its_padding(divergence):
    target, draft = table(0, 8), table(1, 11)
    both = value_and_gradient(target, divergence, 0.5)
    (value, gradient), (narrow_value, narrow_gradient) = both(draft), both(draft[:, :8])
    np.testing.assert_allclose(value, narrow_value, rtol=1e-6)
    np.testing.assert_allclose(gradient[:, :8], narrow_gradient, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(gradient[:, 8:], 0)
    assert loss(target, divergence)(draft).acceptance == loss(target, divergence)(draft[:, :8]).acceptance


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_narrower_draft_learns_the_targets_distribution_over_the_ids_that_it_has(divergence):
    target, draft = table(0, 11), table(1, 8)
    both = value_and_gradient(target, divergence)
    value, gradient = both(draft)
    np.testing.assert_allclose(value, loss(target[:, :8], divergence)(draft).loss, rtol=1e-6)
    assert np.isfinite(value) and np.isfinite(gradient).all() and np.abs(gradient).max() > 0
    np.testing.assert_allclose(both(target[:, :8])[0], 0, atol=1e-5)  # and is done when it says just that


def test_the_acceptance_of_a_narrower_draft_counts_the_tokens_that_it_cannot_say():
    target, draft = table(0, 11), table(1, 8)
    sums = loss(target, "forward_kl")(draft)
    probs = lambda logits: np.asarray(jax.nn.softmax(logits))
    overlap = np.minimum(probs(target)[:, :8], probs(draft)).sum(axis=1)
    tokens = np.asarray(jax.random.randint(jax.random.key(5), (3, 10), 0, 6, jnp.int32))
    read = [tokens[b, t - 1] for b, (lo, hi) in enumerate([(1, 10), (3, 7), (2, 4)]) for t in range(lo, hi)]
    np.testing.assert_allclose(sums.acceptance, overlap[read].sum(), rtol=1e-5)
    assert sums.acceptance < divergences.acceptance(target[None, :, :8], draft[None])[0][np.asarray(read)].sum()


def test_of_a_token_that_the_draft_lacks_hard_labels_teach_nothing():
    draft = table(1, 4)  # tokens 4 and 5 occur in the text
    sums = loss(table(0, 6), "cross_entropy")(draft)
    tokens = np.asarray(jax.random.randint(jax.random.key(5), (3, 10), 0, 6, jnp.int32))
    pairs = [
        (tokens[b, t - 1], tokens[b, t]) for b, (lo, hi) in enumerate([(1, 10), (3, 7), (2, 4)]) for t in range(lo, hi)
    ]
    known = [(read, label) for read, label in pairs if label < 4]
    assert 0 < len(known) < len(pairs)
    assert sums.tokens == len(known)
    log_probs = np.asarray(jax.nn.log_softmax(draft))
    np.testing.assert_allclose(sums.loss, -sum(log_probs[pair] for pair in known), rtol=1e-5)
