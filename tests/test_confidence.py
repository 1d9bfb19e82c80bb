"""Confidence of a draft: the stop by that after temperature, and how it tells accepted from refused tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from lossless import VOCAB, one_block
from test_kangaroo import BATCH, MAX_NEW, SLOTS, models, plan_of  # noqa: F401 (a fixture)

from specjax.decoding import loop
from specjax.decoding.drafters.base import Context
from specjax.decoding.drafters.drafting import draft
from specjax.decoding.results import BatchResult, Row
from specjax.decoding.sampling import Noise, Sampling, row_keys
from specjax.decoding.statistics import Statistics
from specjax.evaluation import confidence
from specjax.evaluation.engine import Method, Output


def drafted(temperature, *, adjusted):
    """How many of 4 tokens are drafted where every distribution has probability 0.5 for one token of ten."""
    probs = jnp.full((1, 10), 0.5 / 9).at[0, 3].set(0.5)
    noise = Noise(row_keys(0, jnp.arange(1)), jnp.full((1,), 5, jnp.int32), temperature == 0, False)
    adjust = Sampling.of(temperature, threshold=0.6)
    context = Context(jnp.zeros((1, 2), jnp.int32), noise.lengths, jnp.ones((1,), bool), noise, adjust)
    step = lambda tokens, offset, carry: (jnp.log(probs), carry)
    return int(
        draft(context, 4, (), lambda carry: (jnp.log(probs), carry), step, stops=True, adjusted=adjusted)[
            0
        ].num_drafted[0]
    )


@pytest.mark.slow
def test_adjusted_confidence_is_that_after_temperature_and_raw_confidence_is_not():
    assert drafted(0.2, adjusted=False) == 1
    # 0.5 against 0.056 at temperature 1 is 0.99996 at 0.2; the greedy choice is certain.
    assert [drafted(t, adjusted=True) for t in (0.0, 0.2, 1.0)] == [4, 4, 1]


def test_the_option_reaches_the_drafter(models):  # noqa: F811
    target, _, adapter, _ = models
    options = {"adapter": adapter, "exit_layer": 1, "threshold": 0.5}
    for kind in ("kangaroo", "early_exit"):
        assert not tiny.make_drafter(kind, target, 2, options).adjusted
        assert tiny.make_drafter(kind, target, 2, options | {"adjusted": True}).adjusted


@pytest.mark.slow
@pytest.mark.parametrize(("threshold", "temperature"), [(0.5, 0.0), (0.0, 1.0)])
def test_the_histogram_has_each_accepted_and_each_first_refused_token_at_its_own_confidence(
    models,  # noqa: F811
    threshold,
    temperature,
):
    _, params, _, adapter_params = models
    plan = plan_of(models, threshold, greedy=temperature == 0)
    adjust = Sampling.of(temperature, threshold=threshold)
    texts, lengths = tiny.prompts(3, BATCH, SLOTS, VOCAB)
    state = loop.prefill(plan, params, adapter_params, texts, lengths, row_keys(4, jnp.arange(BATCH)))
    expected = {"accepted": [], "rejected": []}
    while not np.all(np.asarray(state.done)):
        before = state
        state, _, proposal = one_block(plan, params, adapter_params, before, tiny.limits(BATCH, MAX_NEW), adjust)
        emitted = np.asarray(state.lengths) - np.asarray(before.lengths)
        for row in np.flatnonzero(~np.asarray(before.done)):
            start, count = int(before.lengths[row]), int(proposal.num_drafted[row])
            # The distributions of this row, anew and without a cache, from its text and what was drafted.
            text = np.asarray(before.tokens)[row : row + 1].copy()
            text[0, start : start + plan.gamma] = np.asarray(proposal.tokens)[row]
            logits = plan.drafter.score(adapter_params, params, jnp.asarray(text), before.prompt_lengths[row : row + 1])
            sure = np.asarray(jax.nn.softmax(logits, axis=-1).max(-1))[0, start - 1 :]
            origins = np.asarray(state.origins)[row, start : start + emitted[row]] % len(loop.ORIGINS)
            for place, origin in enumerate(origins[:count]):
                if origin in (loop.ACCEPTED, loop.RECOVERED):
                    expected["accepted" if origin == loop.ACCEPTED else "rejected"].append(sure[place])
    prompts = [np.asarray(texts)[row, : int(lengths[row])].tolist() for row in range(BATCH)]
    spans = [slice(int(start), int(end)) for start, end in zip(state.prompt_lengths, state.lengths, strict=True)]
    listed = lambda array: [row[span].tolist() for row, span in zip(np.asarray(array), spans, strict=True)]
    counts = jax.tree.map(np.asarray, Statistics.zeros(1, plan.gamma))
    rows = [Row(*pair, counts, {}, 0.0, 0.0) for pair in zip(listed(state.tokens), listed(state.origins), strict=True)]
    result = BatchResult(rows, {}, prefill_seconds=0.0, decode_seconds=0.0, iterations=0, row_blocks=0)
    method = Method(plan, params, adapter_params, adjust)
    outcome = confidence.histogram(method, prompts, Output([result]))
    for fate, values in expected.items():
        bins = np.minimum((np.asarray(values) * confidence.BINS).astype(int), confidence.BINS - 1)
        assert len(values) > 3
        assert outcome[fate] == np.bincount(bins, minlength=confidence.BINS).tolist()


def test_there_is_no_histogram_without_probabilities_or_for_an_encoder_decoder(models):  # noqa: F811
    how = dict(gamma=2, slots=SLOTS, max_new=MAX_NEW)
    encoder_decoder, _ = tiny.encoder_decoder(0)
    for target, kind in ((models[0], "ngram"), (encoder_decoder, "early_exit")):
        plan = tiny.plan(target, kind, {"shortest": 1, "longest": 2, "exit_layer": 1}, **how)
        assert confidence.histogram(Method(plan, {}, None, Sampling.of(1.0)), [], Output()) is None
