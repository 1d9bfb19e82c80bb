"""Seconds of a block's parts, from the run's own blocks and from drafting and rules that are timed separately."""

import jax
import numpy as np
import pytest
import tiny

from specjax.decoding import batch
from specjax.decoding.sampling import Sampling, row_keys
from specjax.evaluation import latency, prediction
from specjax.evaluation.engine import Method
from specjax.runtime import timing

TARGET, PARAMS = tiny.decoder(0, layers=2)
PLAIN = tiny.plan(TARGET, gamma=0, slots=1, max_new=1)
PLAN = tiny.plan(TARGET, "ngram", gamma=2, slots=1, max_new=1)
ONE = np.ones(1, np.int32)
LIMITS = batch.make_limits([1], [-1], batch.HERE)
ROWS = latency.Rows(jax.device_put(ONE[None]), jax.device_put(ONE), row_keys(0, jax.device_put(ONE)), LIMITS, 0, 1)


class Scripted(latency.PartsMeter):
    """A meter whose rounds take a second of a clock of its own, and report prepared seconds."""

    def __init__(self, monkeypatch, drafting, rule, baseline_rule, step):
        plain, drafted = (Method(plan, None, None, Sampling.of(0.0)) for plan in (PLAIN, PLAN))
        super().__init__(plain, [drafted], ROWS)
        self.script = {PLAIN: ([0.0] * len(baseline_rule), baseline_rule), PLAN: (drafting, rule)}
        self.clock, self.step = 0.0, step
        monkeypatch.setattr(latency.time, "perf_counter", lambda: self.clock)

    def _round(self):
        for plan, timings in self._timings.items():
            drafting, rule = self.script[plan]
            span = slice(len(timings.rule), len(timings.rule) + latency._REPEATS)
            timings.drafting.extend(drafting[span])
            timings.rule.extend(rule[span])
            self._steps += [self.step] * latency._REPEATS
            self.clock += 0.5


def scripted(monkeypatch, spread=0.0):
    drafting = [0.2 + spread * (i % 2) for i in range(32)]
    return Scripted(monkeypatch, drafting, [0.1] * 32, [0.05] * 32, 1.0)


def test_rounds_end_with_the_budget_the_interval_or_their_number(monkeypatch):
    wide = scripted(monkeypatch, spread=0.5)
    wide.keep_up(0.0)
    assert wide.rounds == 1, "one round in any case"
    wide.keep_up(5.0)
    assert wide.rounds == 1, "a round takes one second, and a tenth of the run is less"
    wide.keep_up(25.0)
    assert wide.rounds == 3
    wide.keep_up(1e9)
    assert wide.rounds == latency._ROUNDS
    narrow = scripted(monkeypatch)
    narrow.keep_up(1e9)
    assert narrow.rounds == 2, "of one round no interval is believed"


def test_the_targets_call_is_what_is_left_of_the_runs_own_blocks(monkeypatch):
    meter = scripted(monkeypatch)
    meter.keep_up(1e9)
    parts = meter.parts(PLAN, [(3.0, 2), (4.5, 3)], [(6.0, 10), (8.0, 10)], seed=0)
    assert parts.draft_step == pytest.approx(0.1) and parts.rule == pytest.approx(0.1)
    assert parts.verify == pytest.approx(1.5 - 0.2 - 0.1) and parts.target_step == pytest.approx(0.7 - 0.05)
    assert parts.block(2) == pytest.approx(1.5) and parts.baseline == pytest.approx(0.7)
    assert parts.intervals["verify"] == pytest.approx([1.2, 1.2])  # both batches have blocks of 1.5 seconds
    assert parts.intervals["target_step"] == pytest.approx([0.55, 0.75])
    one = meter.parts(PLAN, [(3.0, 2)], [(6.0, 10)], seed=0)
    assert one.intervals["verify"] is None and one.intervals["rule"] is not None
    # A block that seems to take less than its drafting, by noise, leaves nothing, and never less.
    assert meter.parts(PLAN, [(0.1, 1)], [(6.0, 10)], seed=0).verify == 0.0


@pytest.mark.slow
def test_parts_are_timed_without_another_program_that_calls_the_target():
    make = lambda drafter, gamma, options: tiny.plan(
        TARGET, drafter, options, gamma=gamma, slots=32, max_new=16, greedy=True
    )
    methods = [Method(make("ngram", 0, {}), PARAMS, None, Sampling.of(0.0))]
    heads = tiny.heads_params(TARGET, PARAMS)  # they draft from the target's states, which the meter has to vary
    methods.append(Method(make("medusa", 2, {"adapter": tiny.heads(TARGET)}), PARAMS, heads, Sampling.of(0.0)))
    prompts = [[1, 2, 3, 4], [4, 5, 6]]
    run = dict(max_new_tokens=8, eos_ids=(7,), seed=0)
    emitted = [method.decode(prompts, 2, **run).tokens for method in methods]
    programs = latency.loop.compiled_run._cache_size(), latency._repeat._cache_size()
    how = dict(batch_size=2, eos_ids=(7,), seed=0, put=batch.HERE)
    meter = prediction.parts_meter(methods[0], methods[1:], prompts, emitted[0], **how)
    meter.keep_up(0.0)
    assert (latency.loop.compiled_run._cache_size(), latency._repeat._cache_size() - 2) == programs
    parts = meter.parts(methods[1].plan, [(1.0, 10)], [(1.0, 20)], 0)
    assert 0 <= parts.draft_step < 0.05 and 0 <= parts.rule < 0.1 and parts.verify <= 0.1
    assert len(meter._timings[methods[1].plan].drafting) == latency._REPEATS


def test_compile_time_counts_once_where_events_contain_others(monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    timing._compilations().clear()  # of the true clock; tests only take differences

    def event(name, end, seconds):
        clock[0] = end
        jax.monitoring.record_event_duration_secs(f"/jax/{name}", seconds)

    event("core/compile/jaxpr_trace_duration", 1002.0, 1.0)
    event("core/compile/jaxpr_trace_duration", 1004.0, 1.0)
    event("core/compile/jaxpr_trace_duration", 1005.0, 4.0)  # contains both
    event("core/compile/backend_compile_duration", 1009.0, 3.0)
    event("compilation_cache/some_other_duration", 1009.0, 3.0)
    assert timing.compile_seconds() == pytest.approx(7.0)
    timing._compilations().clear()


def test_compiling_is_in_no_other_seconds():
    call = jax.jit(lambda x: jax.lax.fori_loop(0, 3, lambda _, y: np.float32(2) * y, x))
    _, seconds, compiled = timing.timed(lambda: call(np.ones(3, np.float32)))
    _, again, none = timing.timed(lambda: call(np.ones(3, np.float32)))
    assert compiled > 0 and none == 0 and seconds > 0 and again > 0
