"""Layer executions: what the caches' meters count, against calls counted from outside."""

import dataclasses

import jax
import numpy as np
import pytest
import test_kangaroo
import tiny

from specjax.decoding import batch, scheduler
from specjax.decoding.results import layers_per_token
from specjax.decoding.sampling import Sampling
from specjax.models.decoder import Decoder
from specjax.models.kv_cache import Cache, Meter

models = test_kangaroo.models  # a fixture

CALLS = []


@dataclasses.dataclass(frozen=True)
class Witnessed(Decoder):
    """A decoder that reports every call to the host: layers times columns, over all rows."""

    def extend(self, params, cache, inputs, positions, mask=None, *, layers=None):
        lo, hi = layers if layers is not None else (0, self.layers)
        jax.debug.callback(lambda _: CALLS.append((hi - lo) * positions.size), positions[0, 0])
        return super().extend(params, cache, inputs, positions, mask, layers=layers)


PROMPTS = [[3, 1, 2, 5], [7], [4, 4, 9, 1, 1, 2], [8, 2]]
GAMMA, MAX_NEW, THRESHOLD = 3, 9, 0.6


def decode(models, kind, gamma=GAMMA, rows=4, threshold=THRESHOLD, slots=None):
    _, params, adapter, adapter_params = models
    target = Witnessed(models[0].config)
    draft_params = adapter_params if kind == "kangaroo" else None
    options = {**tiny.drafter_options(kind, target, adapter=adapter), "threshold": threshold} if gamma else {}
    padded, slots = slots, batch.prompt_slots(PROMPTS)
    plan = tiny.plan(target, kind, options, gamma=gamma, slots=slots, max_new=MAX_NEW, greedy=True)
    how = dict(indices=range(rows), slots=padded, seed=0, sampling=Sampling.of(0.0, threshold=threshold))
    CALLS.clear()
    result = scheduler.decode(plan, params, draft_params, PROMPTS[:rows], max_new_tokens=MAX_NEW, eos_ids=(), **how)
    jax.effects_barrier()
    prefilled = rows * plan.chunk * -(-(max(map(len, PROMPTS[:rows])) - 1) // plan.chunk)
    return target.layers, result, sum(CALLS) - target.layers * prefilled


@pytest.mark.slow
def test_the_meters_agree_with_calls_counted_from_outside(models):
    layers, result, witnessed = decode(models, "skip_layers")
    measured = layers_per_token([result], layers)
    emitted = 4 * MAX_NEW
    assert measured["target_layers_per_token_padded"] * emitted == pytest.approx(witnessed)
    assert measured["target_layers_per_token"] < measured["target_layers_per_token_padded"]


@pytest.mark.slow
def test_the_shared_layers_run_once_per_token_and_the_adapter_once_per_drafted_token(models):
    """A block of k drafted tokens runs all layers on k + 1 tokens and the adapter on k (arXiv 2404.18911)."""
    layers, result, witnessed = decode(models, "kangaroo", rows=1)
    (row,) = result.rows
    calls = int(row.statistics.target_calls[0])
    # What lies beyond the limit was drafted too: the statistics leave it out, the layers ran.
    drafted = row.executions["draft"]
    assert 0 <= drafted - int(row.statistics.drafted[0]) <= GAMMA
    assert row.executions["target"] == layers * (calls + drafted)
    assert result.padded["target"] == witnessed
    assert calls < drafted < GAMMA * calls, "blocks have to differ in length"
    measured = layers_per_token([result], layers)
    assert measured["draft_layers_per_token"] == pytest.approx(drafted / MAX_NEW)
    assert measured["target_layers_per_token"] >= measured["target_layers_per_token_once"]


def test_plain_decoding_runs_every_layer_once_per_token(models):
    layers, result, witnessed = decode(models, "ngram", gamma=0, threshold=0.0)
    measured = layers_per_token([result], layers)
    assert measured["target_layers_per_token"] == measured["target_layers_per_token_padded"] == layers
    assert measured["target_layers_per_token_once"] == layers and measured["draft_layers_per_token"] == 0
    assert witnessed == layers * 4 * MAX_NEW


def test_rows_that_fill_up_a_batch_run_but_do_not_count(models):
    layers, result, _ = decode(models, "ngram", gamma=0, threshold=0.0, rows=3, slots=4)
    measured = layers_per_token([result], layers)
    assert measured["target_layers_per_token"] == layers
    assert measured["target_layers_per_token_padded"] == pytest.approx(layers * 4 / 3)


def test_a_meter_counts_a_rows_own_columns_and_all_columns():
    meter = dataclasses.replace(Meter.zeros(3), counted=np.asarray([0, 1, 5], np.int32))
    after = Cache((), (), meter, None).metered(2, 3).metered(1, 1).meter
    assert np.asarray(after.own).tolist() == [0, 3, 7] and int(after.columns) == 7
