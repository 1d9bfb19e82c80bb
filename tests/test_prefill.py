"""Prefill: one program for all prompt lengths, chunks of any size, and caches that a conversation extends."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import test_kangaroo
import tiny

from specjax.decoding import batch, loop, scheduler
from specjax.decoding.drafters.adaptive import AdaptiveDrafter, block_costs
from specjax.decoding.plan import Plan, power_of_two_times
from specjax.decoding.prefill import compiled_prefill
from specjax.decoding.sampling import Sampling, row_keys

models = test_kangaroo.models  # a fixture: target, its parameters, adapter, its parameters

GAMMA, NEW, VOCAB = 3, 12, 24
SLOW = pytest.mark.slow


def speculative(models, kind, **changes):
    target, params, adapter, adapter_params = models
    options = tiny.drafter_options(kind, target, adapter=adapter)
    draft = {"kangaroo": adapter_params, "model": params, "pard": params}.get(kind) or tiny.draft_params_of(
        kind, target, params, None
    )
    return tiny.plan(target, kind, options, gamma=GAMMA, max_new=NEW, **{"slots": 30, **changes}), draft


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, chunks", [("kangaroo", (7, 40)), *(pytest.param(k, (1, 7, 40), marks=SLOW) for k in ("kangaroo", "model"))]
)
def test_the_size_of_chunks_does_not_change_the_text(models, kind, chunks):
    texts, lengths = tiny.prompts(3, 4, 30, VOCAB)
    decoded = []
    for chunk in chunks:
        plan, draft = speculative(models, kind, greedy=True, chunk=chunk)
        decoded.append(tiny.texts_of(tiny.decode(plan, models[1], draft, texts, lengths, NEW)))
    assert all(texts == decoded[0] for texts in decoded)


def turns(models, plan, draft, costs=None):
    """Tokens of three turns, whose texts are the earlier ones with changed ends: with kept caches, and without."""
    how = {"indices": range(3), "seed": 1, "sampling": Sampling.of(1.0, block_costs=costs), "eos_ids": (5,)}
    texts, conversation = [[1, 2, 3], [4] * 12, [9]], batch.Conversation()
    for turn in range(3):
        decoded = [
            scheduler.decode(plan, models[1], draft, texts, max_new_tokens=NEW, conversation=caches, **how)
            for caches in (conversation, None)
        ]
        yield [each.tokens for each in decoded]
        # As after a stop string: the last tokens are dropped, and others follow.
        texts = [[*text, *row[: 5 - turn], 7, 3, turn] for text, row in zip(texts, decoded[0].tokens, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        "eagle3",
        "ngram",
        *(pytest.param(kind, marks=SLOW) for kind in ("kangaroo", "medusa", "block_parallel", "pard", "model")),
    ],
)
def test_caches_that_are_extended_give_the_tokens_of_new_ones(models, kind):
    plan, draft = speculative(models, kind)
    prefilled = compiled_prefill._cache_size()
    assert all(extended == fresh for extended, fresh in turns(models, plan, draft))
    assert compiled_prefill._cache_size() - prefilled <= 1


@pytest.mark.slow
def test_an_idle_drafter_catches_up_after_its_caches_were_extended(models):
    plan, draft = speculative(models, "model")
    plan = dataclasses.replace(plan, drafter=AdaptiveDrafter(plan.drafter, GAMMA))
    costs = block_costs(0.4, 0.2, GAMMA)  # so dear that many blocks draft nothing
    assert all(extended == fresh for extended, fresh in turns(models, plan, draft, costs))


def test_a_conversation_prefills_only_what_is_new(models):
    plan, conversation = tiny.plan(models[0], gamma=0, slots=30, max_new=NEW), batch.Conversation()
    conversation.plan, conversation.texts = plan, [[1, 2, 3, 4], [7, 7], [8]]
    conversation.state = loop.prefill(plan, models[1], None, *tiny.prompts(0, 3, 30, VOCAB), row_keys(0, np.arange(3)))
    state, starts = conversation.take(plan, [[1, 2, 9, 4], [7, 7, 7], [8]])
    assert state is not None and starts.tolist() == [2, 2, 1]
    assert conversation.take(plan, [[1], [7], [8]])[0] is None, "a state is extended once: it is donated"


def test_capacities_are_powers_of_two_that_neither_gamma_nor_the_prompt_changes(models):
    assert [power_of_two_times(32, n) for n in (1, 32, 33, 64, 65, 1000)] == [32, 32, 64, 64, 128, 1024]
    how = {"max_new_tokens": 64, "greedy": True}
    plans = {Plan.for_prompts(models[0], length, **how).capacity for length in range(8, 384, 25)}
    assert plans == {512}
    drafter = tiny.make_drafter("ngram", models[0], 8, {})
    gammas = {Plan.for_prompts(models[0], 383, drafter=drafter, gamma=gamma, **how).capacity for gamma in (0, 2, 8)}
    assert gammas == {512}


def test_texts_that_do_not_fit_are_refused(models):
    plan = dataclasses.replace(tiny.plan(models[0], gamma=0, slots=4, max_new=4), capacity=8, prompt_slots=8)
    how = {"indices": range(1), "seed": 0, "sampling": Sampling.of(1.0), "eos_ids": ()}
    with pytest.raises(ValueError, match="need 9 slots"):
        scheduler.decode(plan, models[1], None, [[1, 2, 3, 4]], max_new_tokens=4, **how)
    one = jnp.ones((1,), jnp.int32)
    with pytest.raises(ValueError, match="do not fit"):
        loop.prefill(plan, models[1], None, jnp.zeros((1, 9), jnp.int32), one, row_keys(0, one))
