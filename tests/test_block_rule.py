"""Block verification is exact and accepts at least as many tokens as token verification, by enumeration."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import lossless
import numpy as np
import pytest
import tiny
from enumeration import EMITTED, EnumeratedNoise, Tables, block_distribution, emitted_distribution, mean_accepted
from lossless import GREEDY, p_value
from test_draft_vocabulary import Reduced
from test_exactness import SETTINGS, check_against_plain, pair, sample_p_value, small  # noqa: F401
from test_rules import Stopping

from specjax.decoding import loop
from specjax.decoding.drafters.base import Proposal
from specjax.decoding.drafters.table import make_options
from specjax.decoding.rules import Block, Lossless
from specjax.decoding.sampling import Noise, Sampling, Stream, row_keys
from specjax.runtime.errors import UserError


class Truncated(Tables):
    """Distributions that are on no grid; with `cut`, only the most probable tokens of each have a probability."""

    def __init__(self, seed, vocab, gamma, mixed, cut=0):
        super().__init__(seed, vocab, gamma, mixed)
        self.cut = cut

    def _draw(self):
        target = self.random.dirichlet(np.full(self.vocab, 0.8))
        draft = 0.5 * target + 0.5 * self.random.dirichlet(np.full(self.vocab, 0.8))
        shares = [np.where(row >= np.sort(row)[self.cut], row, 0) for row in (target, draft)]
        target, draft = (row / row.sum() for row in shares)
        count = self.random.integers(self.gamma + 1) if self.mixed else self.gamma
        return target, draft, int(np.argmax(draft)), int(count)


def blocks_of(rule, tables, one_hot, **how):
    return block_distribution(rule, tables, one_hot, thresholds=True, **how)


def check_exact(tables, one_hot=False, **how) -> float:
    """Checks the joint distribution; returns how many more tokens a block accepts than with token verification."""
    blocks, tokenwise = (blocks_of(rule, tables, one_hot, **how) for rule in (Block(), Lossless()))
    target = tables.target_distribution((), EMITTED)
    for grouped in (blocks, tokenwise):
        np.testing.assert_allclose(emitted_distribution(grouped, tables.vocab), target, atol=1e-6)
    return mean_accepted(blocks) - mean_accepted(tokenwise)


@pytest.mark.parametrize("one_hot", [False, True], ids=["sampled", "one_hot"])
def test_block_emits_the_targets_joint_distribution_and_accepts_at_least_as_many_tokens(one_hot):
    tables = [Tables(0, 3, 0, False), Tables(1, 3, 1, True), Tables(2, 3, 2, True), Truncated(3, 3, 2, False)]
    tables += [Truncated(4, 3, 2, True, cut=1), Truncated(5, 3, 2, False, cut=1), Truncated(6, 3, 3, False)]
    gains = [check_exact(table, one_hot) for table in tables]
    assert min(gains) > -1e-6
    # A deterministic draft's ratios are at most 1, so for it both rules accept equally often.
    assert max(gains) > 0.02 if not one_hot else max(gains) < 1e-6


def test_a_block_accepts_the_first_tokens_with_the_running_minimum_of_the_products_of_ratios():
    tables = Truncated(4, 3, 3, False)
    expected = 0.0
    for draft, chance, _ in tables.paths((), False):
        weight = 1.0
        for i, token in enumerate(draft):
            weight = min(weight * tables.target(draft[:i])[token] / tables.draft(draft[:i])[token], 1)
            expected += chance * weight
    assert mean_accepted(blocks_of(Block(), tables, False, depth=1)) == pytest.approx(expected, abs=1e-5)


def test_texts_of_the_target_and_two_probabilities_per_token_give_both_expected_acceptances():
    """So a gain is measured by one forward of each model over sampled text, without decoding."""
    tables = Truncated(4, 3, 3, False)
    block = tokenwise = 0.0
    for text in itertools.product(range(3), repeat=3):
        pairs = [(tables.target(text[:i])[token], tables.draft(text[:i])[token]) for i, token in enumerate(text)]
        chance, ratio, largest, product = np.prod([target for target, _ in pairs]), 1.0, 1.0, 1.0
        for target, draft in pairs:
            ratio, product = ratio * target / draft, product * min(draft / target, 1)
            largest = max(largest, ratio)
            block, tokenwise = block + chance / largest, tokenwise + chance * product
    for rule, expected in ((Block(), block), (Lossless(), tokenwise)):
        assert mean_accepted(blocks_of(rule, tables, False, depth=1)) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("seed", [0, 1])
def test_block_stays_exact_if_the_draft_stops_by_its_confidence(seed):
    assert check_exact(Stopping(seed, 2)) > -1e-6


def test_the_enumeration_catches_a_stop_that_looks_at_the_token_it_drops():
    tables = Stopping(0, 2, peeks=True)
    joint = emitted_distribution(blocks_of(Block(), tables, False), 4)
    assert np.abs(joint - tables.target_distribution((), EMITTED)).max() > 1e-2


@pytest.mark.parametrize("one_hot", [False, True], ids=["sampled", "one_hot"])
def test_block_stays_exact_with_a_reduced_vocabulary(one_hot):
    assert check_exact(Reduced(1, 4, 2, True), one_hot, vocabulary=Reduced.VOCABULARY) > -1e-6


def test_a_target_that_is_not_finite_is_reached_as_often_as_the_tokens_before_it():
    row = jnp.asarray([0.5, 0.25, 0.25])
    target = jnp.stack([row, jnp.full((3,), jnp.nan), row])[None]
    proposal = Proposal(jnp.asarray([[1, 0]], jnp.int32), jnp.full((1, 2, 3), 0.5), jnp.asarray([2], jnp.int32))
    accepted = jax.jit(lambda uniforms: Block()(EnumeratedNoise(uniforms), proposal, target, None)[0])
    for uniform, expected in ((0.49, 1), (0.51, 0)):  # the first token's ratio is one half
        assert int(accepted(jnp.asarray([[uniform, 0.0]]))[0]) == expected


def test_no_two_blocks_have_the_same_random_numbers():
    @jax.jit
    def draws(lengths):
        keys = jnp.broadcast_to(jax.random.key(0), lengths.shape)
        noise = Noise(keys, lengths, False, False, by_block=True)
        drafted = [noise.choose(jnp.ones((4, 2**16)), jnp.full((4,), i), Stream.DRAFT) for i in range(3)]
        return noise.uniforms(3), jnp.stack(drafted)

    for values in draws(jnp.arange(4, dtype=jnp.int32)):
        assert np.unique(values).size == 12


KINDS = ("ngram", "early_exit", "skip_layers", "medusa", "eagle3", "block_parallel", "pard", "model")
GREEDY_DRAFTS = {"draft_sample_method": "greedy"}


@SETTINGS
@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind != "model")) for kind in KINDS])
def test_the_loop_samples_the_targets_distribution_by_blocks(small, kind, adjust):  # noqa: F811
    assert sample_p_value(small, kind, adjust, "block", seed=1) > 1e-4


@pytest.mark.slow
@SETTINGS
@pytest.mark.parametrize("rule", ["lossless", "block"])
@pytest.mark.parametrize("kind", KINDS[1:])
def test_the_loop_samples_the_targets_distribution_with_greedy_drafts(small, kind, rule, adjust):  # noqa: F811
    assert sample_p_value(small, kind, adjust, rule, seed=1, **GREEDY_DRAFTS) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["model", "early_exit"])
def test_the_loop_samples_the_targets_distribution_by_blocks_of_confident_drafts(small, kind):  # noqa: F811
    stops = lambda sampling: dataclasses.replace(sampling, threshold=jnp.float32(0.3))
    target, params, draft, draft_params = small
    options = tiny.drafter_options(kind, target, draft) | {"threshold": 0.3}
    plan = lossless.small_plan(target, kind, options, "block")
    assert p_value(plan, params, draft_params, stops(Sampling.of(1.0)), 3) > 1e-4


@pytest.mark.parametrize("adaptive", [False, True])
def test_with_greedy_drafts_proposals_have_no_distributions_at_any_temperature(small, adaptive):  # noqa: F811
    target, params, draft, draft_params = small
    sampling = Sampling.of(1.0, block_costs=(1.0, 1.0, 1.0) if adaptive else None)

    def propose(method, batch=2):
        options = tiny.drafter_options("model", target, draft) | {"draft_sample_method": method, "adaptive": adaptive}
        plan = tiny.plan(target, "model", options, gamma=2, slots=4, max_new=8)
        texts, lengths = jnp.ones((batch, 4), jnp.int32), jnp.full((batch,), 4, jnp.int32)
        state = loop.prefill(plan, params, draft_params, texts, lengths, row_keys(0, jnp.arange(batch)))
        return loop.propose(plan, params, draft_params, state, sampling)[0].probs

    assert jax.eval_shape(lambda: propose("greedy")) is None
    assert jax.eval_shape(lambda: propose("probabilistic")).shape == (2, 2, target.vocab_size)


def test_an_unknown_way_to_draft_is_refused():
    with pytest.raises(UserError, match="draft_sample_method.*probabilistic.*greedy.*'argmax'"):
        make_options("early_exit", {"draft_sample_method": "argmax"})
    with pytest.raises(UserError, match="leave_unsure is True, and no token is unsure without a threshold"):
        make_options("early_exit", {"leave_unsure": True})


def test_at_temperature_0_blocks_equal_greedy_decoding(pair):  # noqa: F811
    check_against_plain(pair, GREEDY, [("model", 3, False)], "block")
