"""Lookup before a draft with a head: output distribution, tokens equal to plain decoding, what the head missed."""

import dataclasses

import jax
import jax.numpy as jnp
import lossless
import numpy as np
import pytest
import tiny
from lossless import COUPLED, GREEDY, Pair, compare_with_plain, p_value

from specjax.decoding import loop
from specjax.decoding.drafters.adaptive import block_costs
from specjax.decoding.drafters.lookup_first import LookupFirstDrafter
from specjax.decoding.drafters.table import build_drafter, make_options
from specjax.decoding.sampling import Sampling
from specjax.models.vocabulary import draft_vocabulary
from specjax.runtime.errors import UserError

# On these short texts of few ids a match of one token is common, and has an estimated chance of 0.2 or more.
LOOKUP = {"lookup": 0.15}
SLOW = pytest.mark.slow
SHARING = [pytest.param(kind, marks=SLOW) for kind in ("skip_layers", "medusa", "block_parallel", "pard")]
KINDS = pytest.mark.parametrize("kind", ["model", "eagle3", *SHARING])


@pytest.fixture(scope="module")
def small():
    return lossless.small_target(), lossless.small_draft()


def small_p(small, kind, adjust, rule="lossless", vocabulary=None, wrong=None, **more):
    (target, params), (draft, draft_params) = small
    if vocabulary is not None:
        kernel = draft.head_kernel(draft_params, vocabulary)
        draft, draft_params = draft.reduced(vocabulary), draft.reduced_params(draft_params, kernel)
    options = tiny.drafter_options(kind, target, draft) | LOOKUP | more
    plan = lossless.small_plan(target, kind, options, rule)
    if wrong is not None:
        plan = dataclasses.replace(plan, drafter=wrong(**vars(plan.drafter)))
    return p_value(plan, params, tiny.draft_params_of(kind, target, params, draft_params), adjust, seed=1)


CUT = Sampling.of(0.7, top_k=4, top_p=0.85)


@pytest.mark.slow
@KINDS
def test_the_output_distribution_is_the_targets(small, kind):
    for adjust in (Sampling.of(1.0), CUT):
        assert small_p(small, kind, adjust) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["lossless", "block", pytest.param("coupled", marks=pytest.mark.slow)])
def test_it_is_the_targets_where_the_head_has_few_ids_and_drafts_fewer_tokens(small, rule):
    """Looked-up tokens need not be among the head's ids."""
    vocabulary = draft_vocabulary([0, 2, 3])
    assert small_p(small, "model", Sampling.of(1.0), rule, vocabulary, head_gamma=1) > 1e-4


class TakenForDrawn(LookupFirstDrafter):
    """A fault: the rule takes looked-up tokens for tokens drawn from the head's distribution."""

    def _joined(self, *rows):
        return dataclasses.replace(super()._joined(*rows), one_hot=None)


@pytest.mark.slow
def test_the_chi_square_test_rejects_a_rule_that_takes_looked_up_tokens_for_drawn_ones(small):
    assert small_p(small, "model", Sampling.of(1.0), wrong=TakenForDrawn) < 1e-6


@pytest.fixture(scope="module")
def pair():
    return Pair.of(*tiny.decoder(1, sharpness=2.0))


@KINDS
@pytest.mark.parametrize("rule, settings", [("lossless", GREEDY), pytest.param("coupled", COUPLED[:1], marks=SLOW)])
@pytest.mark.parametrize("adaptive", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_tokens_equal_those_of_plain_decoding(pair, kind, rule, settings, adaptive):
    draft_params = tiny.draft_params_of(kind, pair.target, pair.params, pair.draft_params)
    changes = {"block_costs": jnp.asarray(block_costs(0.1, 0.05, 4), jnp.float32)} if adaptive else {}
    plan = pair.plan(kind, 4, rule, rule == "lossless", head_gamma=2, adaptive=adaptive, **LOOKUP)
    for _, state in compare_with_plain(pair, settings, [(plan, draft_params, changes)], rule):
        drafted = np.asarray(state.statistics.drafted_at.sum(0))
        assert drafted[1] > 0, "the head has to draft"
        assert adaptive or drafted[3] > 0, "only lookup drafts four tokens"


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, rows", [("model", 1), ("model", 64), ("eagle3", 32), pytest.param("pard", 32, marks=SLOW)]
)
def test_the_head_catches_up_on_tokens_that_were_looked_up(pair, kind, rows):
    """Its distribution after the pending token is that after a prefill of the whole text, whatever drafted before."""
    plan, adjust = pair.plan(kind, 4, "lossless", False, 60, head_gamma=2, **LOOKUP), Sampling.of(1.0)
    params, own = pair.params, tiny.draft_params_of(kind, pair.target, pair.params, pair.draft_params)
    prompts = pair.texts[1 : rows + 1], pair.lengths[1 : rows + 1]
    fresh = jax.jit(lambda state: loop.propose(plan, params, own, state, adjust)[0])
    matches = accepted = checked = 0
    for before, after, _, proposal in lossless.blocks(plan, params, own, prompts, 60, adjust):
        matched, live = np.asarray(proposal.one_hot), ~np.asarray(before.done)
        head = live & ~matched
        texts = before.tokens[:, : pair.texts.shape[1] + 60]
        expected = fresh(loop.prefill(plan, params, own, texts, before.lengths, before.row_keys))
        found, expected = np.asarray(proposal.probs)[head, 0], np.asarray(expected.probs)[head, 0]
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
        matches, checked = matches + (live & matched).sum(), checked + head.sum()
        accepted += (np.asarray(after.lengths - before.lengths) > 2)[live & matched].sum()
    assert matches > 5 and checked > 5 and (rows == 1 or accepted > 3)


def test_what_it_refuses():
    target, _ = tiny.decoder(0)
    with pytest.raises(UserError, match="shares the target's first layers; leave lookup out"):
        build_drafter(make_options("early_exit", {"lookup": 0.3}), target, 2)
    with pytest.raises(UserError, match="head_gamma is 2; it is a number of tokens, and means something only with"):
        make_options("eagle3", {"head_gamma": 2})
    with pytest.raises(UserError, match="lookup must be 0 .none. or a chance below 1, not 2.0"):
        make_options("eagle3", {"lookup": 2.0})
    with pytest.raises(UserError, match='lookup is an option of .*"eagle3".*, not of "ngram"; leave it out'):
        make_options("ngram", {"lookup": 0.3})
