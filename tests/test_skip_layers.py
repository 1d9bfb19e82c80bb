"""Drafting with some of the target's layers left out: what is drafted, which are chosen, what is refused."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from lossless import one_block

from specjax.decoding import loop
from specjax.decoding.sampling import Sampling, row_keys
from specjax.draft_design import layer_search
from specjax.models.encoder_decoder import EncoderDecoder
from specjax.reporting import records
from specjax.runtime.errors import UserError

VOCAB, SLOTS, MAX_NEW, BATCH = 24, 6, 12, 8


@pytest.fixture(scope="module")
def models():
    """A target of four layers, of which the third does nothing."""
    target, params = tiny.decoder(1, sharpness=2.0, layers=4)
    nothing = jax.tree.map(jnp.zeros_like, params["blocks"][2])
    return target, {**params, "blocks": {**params["blocks"], 2: nothing}}


def drafted_distributions(target, params, spans, text, first, count):
    """Distributions `[count, V]` after the tokens from `first` on: all layers up to it, then only `spans`."""
    tokens = jnp.asarray([text], jnp.int32)
    places = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    _, cache = target.extend(params, target.start(params, tokens, jnp.asarray([len(text)]), len(text)), tokens, places)
    laws = []
    for place in range(first, first + count):
        hidden = tokens[:, place : place + 1]
        for span in spans:
            hidden, cache = target.extend(params, cache, hidden, places[:, place : place + 1], layers=span)
        laws.append(jax.nn.softmax(target.head(params, hidden)[0, 0]))
    return np.stack(laws)


@pytest.mark.slow
def test_a_block_is_drafted_with_the_kept_layers_on_what_the_whole_target_left(models):
    target, params = models
    gamma = 2
    plan = tiny.plan(target, "skip_layers", {"skipped": [1]}, gamma=gamma, slots=SLOTS, max_new=MAX_NEW)
    assert plan.drafter.spans == ((0, 1), (2, 4))
    assert tiny.make_drafter("skip_layers", target, 2, {"skipped": (3, 0)}).spans == ((1, 3),)
    texts, lengths = tiny.prompts(3, BATCH, SLOTS, VOCAB)
    state = loop.prefill(plan, params, None, texts, lengths, row_keys(4, jnp.arange(BATCH)))
    limits, accepted = tiny.limits(BATCH, MAX_NEW), set()
    for _ in range(3):
        before = state
        state, logits, proposal = one_block(plan, params, None, before, limits, Sampling.of(1.0))
        first = np.asarray(before.lengths) - 1
        text = np.asarray(before.tokens).copy()
        text[np.arange(BATCH)[:, None], first[:, None] + 1 + np.arange(gamma)] = np.asarray(proposal.tokens)
        full = np.asarray(tiny.full_logits(target, params, jnp.asarray(text)))
        for row in range(BATCH):
            np.testing.assert_allclose(logits[row], full[row, first[row] : first[row] + gamma + 1], atol=1e-4)
        laws = drafted_distributions(target, params, plan.drafter.spans, text[3], int(first[3]), gamma)
        np.testing.assert_allclose(np.asarray(proposal.probs)[3], laws, atol=1e-4)
        accepted |= set((np.asarray(state.lengths) - first - 2).tolist())
    assert accepted == {0, 1, 2}


def searched(models, **how):
    target, params = models
    tokens, lengths = tiny.prompts(5, 6, 16, VOCAB)
    how = {"most_skipped": 3, "longest_gamma": 4, "verify_cost": 1.0, "sampling": Sampling.of(1.0), **how}
    return list(layer_search.search(target, params, tokens, lengths, jnp.ones_like(lengths), **how)), tokens, lengths


@pytest.mark.slow
def test_the_search_first_leaves_out_a_layer_that_does_nothing(models):
    target, params = models
    compiled = layer_search._acceptance._cache_size()
    choices, tokens, lengths = searched(models)
    assert layer_search._acceptance._cache_size() == compiled + 1, "all candidates share one executable"
    assert [len(choice.skipped) for choice in choices] == [1, 2, 3]
    assert choices[0].skipped == (2,) and choices[0].acceptance == pytest.approx(1, abs=1e-5)
    assert all(set(a.skipped) < set(b.skipped) for a, b in itertools.pairwise(choices))
    layer, whole = 16 * 16 + 2 * 8 * 16 + 16 * 16 + 3 * 16 * 32 + 2 * 16, target.num_step_params
    for choice in choices:
        assert choice.cost_ratio == pytest.approx(1 - len(choice.skipped) * layer / whole)
        rate, cost = choice.acceptance, choice.cost_ratio
        speedups = [sum(rate**i for i in range(g + 1)) / (g * cost + 1) for g in range(1, 5)]
        assert choice.predicted_speedup == pytest.approx(max(speedups))
        assert choice.gamma == 1 + int(np.argmax(speedups))
    # The overlap, from laws that are computed with the spans that the drafter runs.
    positions = jnp.broadcast_to(jnp.arange(16)[None], tokens.shape)
    hidden = tokens
    for span in tiny.make_drafter("skip_layers", target, 1, {"skipped": choices[1].skipped}).spans:
        hidden, _ = target.extend(params, None, hidden, positions, layers=span)
    laws = [jax.nn.softmax(x, axis=-1) for x in (tiny.full_logits(target, params, tokens), target.head(params, hidden))]
    overlap = np.minimum(*map(np.asarray, laws)).sum(-1)
    counted = np.arange(1, 17)[None] < np.asarray(lengths)[:, None]
    assert choices[1].acceptance == pytest.approx(overlap[counted].mean(), abs=1e-5)


def test_layers_that_are_not_there_and_costs_that_cannot_be_are_refused(models):
    target = models[0]
    for skipped in ((), (4,), (-1, 2)):
        with pytest.raises(UserError, match=r"one or more layers of the target, 0 \.\. 3, not"):
            tiny.make_drafter("skip_layers", target, 2, {"skipped": skipped})
    with pytest.raises(UserError, match="names all 4 layers of the target; leave at least one"):
        tiny.make_drafter("skip_layers", target, 2, {"skipped": range(4)})
    with pytest.raises(UserError, match=r"most_skipped must lie in 1 \.\. 3 for this target, not 4"):
        searched(models, most_skipped=4)
    with pytest.raises(UserError, match="a positive cost"):
        searched(models, verify_cost=0.0)
    with pytest.raises(UserError, match="only decoder-only models can skip layers"):
        searched((EncoderDecoder.__new__(EncoderDecoder), {}))


def test_a_run_that_chose_nothing_is_named(tmp_path):
    records.write_results(
        tmp_path / "results.json", binary="choose_layers", config={"seed": 0}, rows=[{"skipped": [1]}]
    )
    with pytest.raises(UserError, match="holds no choice"):
        records.chosen(tmp_path)
    rows = [{"skipped": [1], "chosen": False}, {"skipped": [1, 2], "chosen": True}]
    records.write_results(tmp_path / "results.json", binary="choose_layers", config={"seed": 0}, rows=rows)
    assert records.chosen(tmp_path)["skipped"] == [1, 2]
