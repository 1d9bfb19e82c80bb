"""Costs of blocks that are measured before decoding, and those that a config states."""

import jax.numpy as jnp
import numpy as np
import pytest
import test_kangaroo
import tiny
from ml_collections import ConfigDict

from specjax.data import tasks
from specjax.decoding import batch, loop
from specjax.decoding.sampling import Sampling
from specjax.evaluation import cases, prediction
from specjax.evaluation.engine import Method
from specjax.hub.model import Model
from specjax.hub.tokenizer import train_byte_bpe
from specjax.runtime.errors import UserError

models = test_kangaroo.models  # a fixture


@pytest.mark.slow
def test_blocks_of_every_length_are_timed_by_one_executable_before_any_text(models):
    target, params, _, _ = models
    own, options = tiny.heads_params(target, params), {"adapter": tiny.heads(target), "adaptive": True}
    plan = tiny.plan(target, "medusa", options, gamma=2, slots=32, max_new=16, greedy=True, spare=32)
    before = loop.compiled_run._cache_size()
    costs = prediction.measure_block_costs(
        Method(plan, params, own, Sampling.of(0.0)),
        [[1, 2, 3], [4, 5]],
        max_new_tokens=16,
        batch_size=2,
        eos_ids=(),
        seed=0,
        put=batch.HERE,
    )
    assert loop.compiled_run._cache_size() == before + 1
    assert costs.shape == (3,) and np.all(np.asarray(costs) > 0) and costs.dtype == jnp.float32
    # They serve a run of that plan.
    texts, lengths = tiny.prompts(3, 2, 6, 24)
    state = tiny.decode(plan, params, own, texts, lengths, 8, adjust=Sampling.of(0.0, block_costs=costs.tolist()))
    assert np.all(np.asarray(state.num_emitted) == 8)
    assert isinstance(state, loop.DecodeState)


def job_of(models, section):
    target, params, _, _ = models
    cuts = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
    config = ConfigDict({"target": "T", "drafters": {"d": section}, "leniences": (), **cuts})
    tokenizer = train_byte_bpe(["no text is read"], 260)
    task = tasks.load_task(ConfigDict({"name": "arithmetic", "path": "", "seed": 0, "size": 2}))
    return cases.Job(config, {"T": Model(target, params, tokenizer)}, task, [], {})


SECTION = {"kind": "early_exit", "exit_layer": 1, "rules": {"lossless": (2, 3)}}


@pytest.mark.slow
def test_a_config_gives_costs_or_has_them_measured(models):
    setting = cases.Setting("lossless", 0.0, 1)
    plain, two, three = cases.make_cases(job_of(models, {**SECTION, "adaptive": True, "costs": (0.25, 0.25)}), setting)
    assert np.asarray(two.sampling.block_costs).tolist() == [1, 1.5, 2]
    assert np.asarray(three.sampling.block_costs).tolist() == [1, 1.5, 2, 2.5]
    assert not any(map(cases.needs_costs, (plain, two, three)))
    made = cases.make_cases(job_of(models, {**SECTION, "adaptive": True}), setting)
    assert [cases.needs_costs(case) for case in made] == [False, True, True]
    fixed = cases.make_cases(job_of(models, SECTION), setting)
    assert not any(map(cases.needs_costs, fixed)) and all(case.sampling.block_costs is None for case in fixed)


def test_costs_that_do_not_come_in_twos_or_are_not_positive_are_refused(models):
    setting = cases.Setting("lossless", 0.0, 1)
    with pytest.raises(UserError, match=r"drafters.d.costs has 1 numbers; give the costs of a drafted token"):
        cases.make_cases(job_of(models, {**SECTION, "adaptive": True, "costs": (0.1,)}), setting)
    with pytest.raises(UserError, match="and positive; not 0.1 and 0.0"):
        cases.make_cases(job_of(models, {**SECTION, "adaptive": True, "costs": (0.1, 0.0)}), setting)


@pytest.mark.parametrize("kind", ["early_exit", "ngram"])
def test_a_config_may_give_every_option_of_drafts_with_a_head_at_its_default(kind):
    """configs/evaluate.py has them all, for the command line; another value is refused where it means nothing."""
    usual = {"threshold": 0.0, "leave_unsure": False, "lookup": 0.0, "head_gamma": 0}
    usual["draft_sample_method"] = "probabilistic"
    section = {"kind": kind, "rules": {"lossless": (2,)}, **usual}
    read = lambda section: cases.read_drafters(ConfigDict({"target": "T", "drafters": {"d": section}, "leniences": ()}))
    assert read(section)["d"].options == read({"kind": kind, "rules": {"lossless": (2,)}})["d"].options
    if kind == "ngram":
        with pytest.raises(UserError, match="drafters.d.head_gamma"):
            read(section | {"head_gamma": 2})
