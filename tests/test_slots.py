"""Rows of a batch that take the next prompt when a text ends: texts, counts and times are those of one prompt alone."""

import dataclasses
import itertools

import numpy as np
import pytest
import test_kangaroo
import tiny

from specjax.decoding import loop, results, scheduler
from specjax.decoding.drafters.adaptive import AdaptiveDrafter, block_costs
from specjax.decoding.prefill import compiled_prefill, prefill_shapes, refill
from specjax.decoding.sampling import Sampling, row_keys
from specjax.evaluation import rows
from specjax.evaluation.engine import Output
from specjax.models import kv_cache
from specjax.runtime import mesh as meshes
from specjax.runtime import process_memory
from specjax.runtime.errors import UserError

models = test_kangaroo.models  # a fixture: target, its parameters, adapter, its parameters

SLOTS, NEW, GAMMA, VOCAB, EOS = 3, 24, 3, 24, (5, 11)


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Prompts of 1 to 17 tokens."""
    random = np.random.default_rng(seed)
    return [random.integers(0, VOCAB, 1 + 5 * number % 17).tolist() for number in range(count)]


def speculative(models, kind, gamma=GAMMA, more=None, **changes):
    target, params, adapter, adapter_params = models
    options = tiny.drafter_options(kind, target, adapter=adapter) | (more or {})
    own = {"kangaroo": adapter_params, "model": tiny.decoder(2)[1]}.get(kind)
    own = tiny.draft_params_of(kind, target, params, None) if own is None and gamma else own
    return tiny.plan(target, kind, options, gamma=gamma, slots=17, max_new=NEW, **changes), own


def decode(models, plan, own, texts, **how):
    settings = {"indices": range(len(texts)), "seed": 1, "sampling": Sampling.of(0.0 if plan.greedy else 1.0)}
    return scheduler.decode(plan, models[1], own, texts, **settings | {"max_new_tokens": NEW, "eos_ids": EOS} | how)


def counts_of(result, row=None):
    rows = slice(None) if row is None else slice(row, row + 1)
    return {name: values[rows].tolist() for name, values in results.counts_of(result.rows).items()}


def alone(models, plan, own, texts, slots=SLOTS, **how):
    """The result of each prompt without others; the same program as in a batch by default, which compiles less."""
    return [decode(models, plan, own, [text], indices=[i], slots=slots, **how) for i, text in enumerate(texts)]


SLOW = pytest.mark.slow
CASES = {
    "plain": dict(kind="ngram", gamma=0),
    "lossless": dict(kind="model", greedy=True),
    "kangaroo": dict(kind="kangaroo", greedy=True),
    "coupled": dict(kind="model", rule="coupled"),
    "medusa": dict(kind="medusa", greedy=True),
    "ngram": dict(kind="ngram", greedy=True),
    "lookup_first": dict(kind="model", greedy=True, more={"lookup": 0.15}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", [*list(CASES)[:2], *(pytest.param(case, marks=SLOW) for case in list(CASES)[2:])])
def test_a_text_and_its_counts_do_not_depend_on_the_row_that_it_takes(models, case):
    plan, own = speculative(models, **CASES[case])
    texts = prompts(11)
    slots = SLOTS if plan.gamma else 1
    result, single = decode(models, plan, own, texts, slots=SLOTS), alone(models, plan, own, texts, slots)
    assert len({len(row) for row in result.tokens}) > 3, "the texts have to be uneven"
    assert result.tokens == [each.tokens[0] for each in single]
    assert result.origins == [each.origins[0] for each in single]
    for row, each in enumerate(single):
        assert counts_of(result, row) == counts_of(each)
        assert result.rows[row].executions == each.rows[0].executions
    assert result.padded["target"] >= sum(row.executions["target"] for row in result.rows)


@pytest.mark.slow
def test_rows_are_useful_until_the_end_and_nothing_compiles_after_the_first_refills(models):
    plan, own = speculative(models, "ngram", gamma=0)
    texts, slots, how = prompts(64), SLOTS, {"eos_ids": (17, 17)}
    decode(models, plan, own, texts, slots=slots, **how, seed=2)
    programs = [each._cache_size() for each in (compiled_prefill, refill, loop.compiled_run)]
    refilled = decode(models, plan, own, texts, slots=slots, **how)
    assert [each._cache_size() for each in (compiled_prefill, refill, loop.compiled_run)] == programs
    parts = [slice(first, first + slots) for first in range(0, 64, slots)]
    fixed = [decode(models, plan, own, texts[part], indices=range(64)[part], slots=slots, **how) for part in parts]
    assert [row for each in fixed for row in each.tokens] == refilled.tokens
    calls = refilled.statistics.target_calls.sum()
    assert calls / refilled.row_blocks >= 0.95 and calls / sum(each.row_blocks for each in fixed) <= 0.82
    # The last texts ran in fewer rows.
    assert refilled.row_blocks < slots * refilled.iterations
    assert refilled.padded["target"] == plan.target.layers * refilled.row_blocks


@pytest.mark.slow
def test_an_adaptive_draft_writes_in_refilled_rows_what_it_writes_alone(models):
    plan, own = speculative(models, "model", greedy=True)
    plan = dataclasses.replace(plan, drafter=AdaptiveDrafter(plan.drafter, GAMMA))
    how = {"sampling": Sampling.of(0.0, block_costs=block_costs(0.3, 0.1, GAMMA))}
    texts = prompts(7)
    result, single = decode(models, plan, own, texts, slots=2, **how), alone(models, plan, own, texts, 2, **how)
    assert result.tokens == [each.tokens[0] for each in single]
    assert counts_of(result)["drafted"] != [counts_of(each)["drafted"][0] for each in single]


def test_stop_strings_end_texts_of_refilled_rows_with_the_counts_until_there(models):
    plan, own = speculative(models, **CASES["lossless"])
    ends = lambda prompt, tokens: next((place + 1 for place, token in enumerate(tokens) if token % 7 == 3), None)
    texts, how = prompts(8), {"end_of": ends, "blocks": 2, "eos_ids": (-1, -1)}
    result, single = decode(models, plan, own, texts, slots=SLOTS, **how), alone(models, plan, own, texts, **how)
    assert result.tokens == [each.tokens[0] for each in single] and {len(row) for row in result.tokens} != {NEW}
    assert [counts_of(result, row) for row in range(8)] == list(map(counts_of, single))


def test_a_text_that_does_not_end_does_not_hold_up_the_others(models):
    """They are complete, with their times, when it ends; and its time is that of the whole run."""
    plan, own = speculative(models, "ngram", gamma=0)
    texts, ended, never = prompts(11), [], decode(models, plan, own, prompts(11), slots=SLOTS).tokens[0]
    end_of = lambda prompt, tokens: 2 if tokens[:2] != never[:2] and len(tokens) > 1 else None
    on_end = lambda number, row, seconds, recorded: ended.append((number, len(row.tokens), seconds))
    how = {"end_of": end_of, "blocks": 1, "on_end": on_end, "eos_ids": (-1, -1)}
    result = decode(models, plan, own, texts, slots=SLOTS, **how)
    assert [number for number, _, _ in ended] == [*range(1, 11), 0]
    assert [count for _, count, _ in ended] == [2] * 10 + [NEW]
    seconds = [at for _, _, at in ended]
    assert seconds == sorted(seconds) and seconds[-1] == result.rows[0].seconds == pytest.approx(result.seconds)
    assert all(0 < row.first_token_seconds < row.seconds for row in result.rows)


def test_rows_that_are_refilled_together_get_the_texts_of_rows_refilled_one_by_one(models, monkeypatch):
    """As on a GPU; the last refill has fewer prompts than rows."""
    plan, own = speculative(models, "ngram", greedy=True)
    texts, refilled, fill = prompts(9), [], scheduler.refill
    one_by_one = decode(models, plan, own, texts, slots=4)
    monkeypatch.setattr(scheduler, "_SHARE_OF_A_REFILL", {"cpu": 1 / 2})
    monkeypatch.setattr(
        scheduler, "refill", lambda *args: refilled.append(np.asarray(args[-1]).tolist()) or fill(*args)
    )
    together = decode(models, plan, own, texts, slots=4)
    assert together.tokens == one_by_one.tokens
    assert [counts_of(together, row) for row in range(9)] == [counts_of(one_by_one, row) for row in range(9)]
    assert {len(rows) for rows in refilled} == {2} and any(4 in rows for rows in refilled)


def test_rows_that_do_not_fit_in_memory_are_refused_with_the_number_that_does(models, monkeypatch):
    plan, own = speculative(models, "ngram", gamma=0)
    prompt = np.zeros((1, 17), np.int32), np.ones((1,), np.int32)
    shapes = prefill_shapes(plan, models[1], None, *prompt, row_keys(0, np.arange(1)))
    one = sum(x.size * x.dtype.itemsize for x in shapes)
    monkeypatch.setattr(process_memory, "free_bytes", lambda devices: 5.4 * one)
    assert len(decode(models, plan, own, prompts(11), slots=SLOTS).tokens) == 11
    with pytest.raises(UserError, match="12 rows need .* GB for their caches, and .* are free, which is enough for 5;"):
        decode(models, plan, own, prompts(11), slots=12)


@pytest.mark.slow
@pytest.mark.usefixtures("layers_by_themselves")
def test_on_a_gpu_prefixes_follow_the_longest_row_and_refilled_rows_continue_in_them(models, monkeypatch):
    """The loop runs four blocks at a time there, and returns in the middle of them when rows have ended."""
    plan, own = speculative(models, "ngram", gamma=0)
    long, short, prefixes, run = [1] * 17, prompts(4)[:2], [], loop.compiled_run
    texts, how = [long, *short, *short, long, *short], {"slots": 2, "eos_ids": range(0, VOCAB, 3)}
    on_cpu = decode(models, plan, own, texts, **how)
    monkeypatch.setattr(meshes, "platform", lambda: "gpu")
    monkeypatch.setattr(loop, "SMALLEST_CAPACITY", 16)
    monkeypatch.setattr(kv_cache, "prefixes", lambda capacity: [8, 17, capacity])
    monkeypatch.setattr(loop, "compiled_run", lambda *args: prefixes.append(args[-1]) or run(*args))
    # Another capacity is another program.
    on_gpu = decode(models, dataclasses.replace(plan, capacity=plan.capacity + 1), own, texts, **how)
    assert on_gpu.tokens == on_cpu.tokens and on_gpu.iterations == on_cpu.iterations
    assert [counts_of(on_gpu, row) for row in range(8)] == [counts_of(on_cpu, row) for row in range(8)]
    changes = set(itertools.pairwise(prefixes))
    assert changes >= {(17, plan.capacity + 1), (plan.capacity + 1, 17)}


def test_groups_of_unequal_size_count_by_their_seconds(models):
    plan, own = speculative(models, "ngram", greedy=True)
    groups = [decode(models, plan, own, texts, slots=SLOTS) for texts in (prompts(4)[:3], prompts(4)[3:])]
    timed = lambda *seconds: Output(
        [
            dataclasses.replace(group, prefill_seconds=0.0, decode_seconds=each)
            for group, each in zip(groups, seconds, strict=True)
        ]
    )
    row = rows.measured(timed(1.0, 2.0), timed(2.0, 7.0), layers=2, seed=0)
    assert row["tokens_per_second"] == pytest.approx(sum(len(text) for group in groups for text in group.tokens) / 3)
    assert row["speedup"] == pytest.approx(9 / 3)


def test_a_row_has_the_numbers_of_serving_engines(models):
    plan, own = speculative(models, "ngram", greedy=True)
    result = decode(models, plan, own, prompts(7), slots=SLOTS)
    row = rows.measured(Output([result]), Output([result]), layers=2, seed=0)
    serving = row["serving"]
    assert serving["mean_acceptance_length"] == row["block_efficiency"] > 1
    assert serving["draft_acceptance_rate"] == row["acceptance_rate"]
    accepted = row["accepted_tokens"] / row["target_calls"]
    unconditional, histogram = serving["per_position_acceptance_rates"], serving["acceptance_histogram"]
    assert sum(unconditional) == pytest.approx(accepted)
    assert sum(histogram) == row["target_calls"] and len(histogram) == 1 + plan.gamma and min(histogram) >= 0
    assert np.dot(histogram, range(1 + plan.gamma)) == row["accepted_tokens"]
    assert all(a <= b + 1e-9 for a, b in zip(unconditional, row["acceptance_by_position"], strict=True))
    for name in ("ttft", "tpot"):
        assert 0 < serving[f"median_{name}_ms"] <= serving[f"p99_{name}_ms"]
    assert serving["p99_ttft_ms"] <= 1e3 * max(row.seconds for row in result.rows)
