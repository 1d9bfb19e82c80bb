"""Latency profiles: measured once, kept for one device, estimated where a shape does not fit, and the lines' fits."""

import json
from pathlib import Path

import pytest
import tiny

from configs.draft_design import profiling as profile
from configs.draft_design import series
from configs.draft_design.profiling import Point, Profile, StepCase
from specjax.runtime import config as configs
from specjax.runtime.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
CONFIG = f"{ROOT}/configs/draft_design/profile.py"
RATES = {"bytes_per_second": 1e9, "operations_per_second": 1e9}


@pytest.fixture
def clock(monkeypatch):
    """Cases take a millisecond a layer and token; what has been timed together, in order."""
    timed = []

    def fake(cases, repeats):
        timed.append([case.shape.layers for case in cases])
        return {case.key: Point(1e-3 * case.shape.layers * case.tokens, 0.1) for case in cases}

    monkeypatch.setattr(profile, "_timed", fake)
    monkeypatch.setattr(profile, "_measured_rates", lambda repeats: RATES)
    return timed


def test_a_measured_case_is_stored_and_not_measured_again(tmp_path, clock):
    cases = [StepCase(tiny.config(layers=layers)) for layers in (1, 2)]
    points = Profile(tmp_path / "p.json").measure(cases, 3)
    assert [point.seconds for point in points] == [1e-3, 2e-3]
    more = [*cases, StepCase(tiny.config(layers=2), tokens=4)]
    assert Profile(tmp_path / "p.json").measure(more, 3) == [*points, Point(8e-3, 0.1)]
    assert clock == [[1, 2], [2]]


def test_what_does_not_fit_the_memory_is_estimated_and_says_so(tmp_path, clock):
    small, large = StepCase(tiny.config(layers=1)), StepCase(tiny.config(layers=8))
    points = Profile(tmp_path / "p.json", memory=profile.bytes_of([small, large]) // 2).measure([large, small], 3)
    read = profile.step_bytes(large.shape, large.context)
    assert points == [Point(read / 1e9, 0.0, estimate=True), Point(1e-3, 0.1)]
    assert clock == [[1]]


def test_an_estimate_is_what_is_read_or_computed_whichever_takes_longer():
    one, many = StepCase(tiny.config()), StepCase(tiny.config(), tokens=9)
    read = profile.step_bytes(one.shape, one.context)
    assert profile.estimated_seconds(one, RATES) == read / 1e9
    computed = 2 * 9 * (read - profile.kv_bytes(one.shape, one.context)) / 4 / 1e9
    assert profile.estimated_seconds(many, RATES) == pytest.approx(computed)


def test_shapes_that_do_not_fit_together_are_measured_separately(tmp_path, clock):
    cases = [StepCase(tiny.config(layers=layers)) for layers in (1, 2, 3)]
    Profile(tmp_path / "p.json", memory=int(1.26 * profile.bytes_of(cases[2:]))).measure(cases, 3)
    assert clock == [[1], [2], [3]]


def test_cases_of_one_shape_share_its_weights_and_are_measured_together(tmp_path, clock):
    cases = [StepCase(tiny.config(layers=1), tokens=tokens) for tokens in (1, 2, 3)]
    # Room for the weights once and every cache, but not for the weights twice.
    memory = int((profile.bytes_of(cases) + profile.weight_bytes(cases[0].shape) / 2) / 0.8)
    Profile(tmp_path / "p.json", memory=memory).measure(cases, 3)
    assert clock == [[1, 1, 1]]


def test_a_profile_of_another_device_is_refused(tmp_path, clock):
    path = tmp_path / "p.json"
    Profile(path).measure([StepCase(tiny.config())], 3)
    stored = json.loads(path.read_text())
    stored["device"]["device_kind"] = "NVIDIA H100"
    path.write_text(json.dumps(stored))
    with pytest.raises(UserError, match=r"is of another device \(device_kind: NVIDIA H100 there, cpu here\)"):
        Profile(path)
    path.write_text("{}")
    with pytest.raises(UserError, match="is damaged .* delete it and profile again"):
        Profile(path)


@pytest.mark.slow
def test_the_clock_runs_real_steps(tmp_path):
    (point,) = Profile(tmp_path / "p.json").measure([StepCase(tiny.config(layers=1), context=8, steps=2)], 2)
    assert point.seconds > 0 and not point.estimate


@pytest.mark.parametrize(
    ("milliseconds", "slope", "r_squared"),
    [
        ((3.0, 5.0, 7.0), 2.0, 1.0),
        ((1.0, 2.0, 2.0), 0.5, 0.75),  # through the mean (2, 5/3) it leaves 1/6 of the variation of 2/3
    ],
)
def test_the_line_through_points_is_the_one_worked_by_hand(milliseconds, slope, r_squared):
    points = zip((1, 2, 3), milliseconds, strict=True)
    rows = [{"table": "batch", "estimate": False, "batch": x, "milliseconds": y} for x, y in points]
    result = series._line(rows, "batch", "batch")
    assert result["milliseconds_for_one_more"] == pytest.approx(slope)
    assert result["r_squared"] == pytest.approx(r_squared)


@pytest.mark.slow
def test_series_hold_what_they_hold_fixed(tmp_path, clock):
    config = configs.load(CONFIG)
    rows = series.measured(config, tmp_path)
    of = lambda name: [row for row in rows if row["table"] == name]
    assert [row["layers"] for row in of("depth_at_fixed_parameters")] == list(config.depths)
    assert all(abs(row["parameters"] / config.parameters - 1) < 0.03 for row in of("depth_at_fixed_parameters"))
    assert len({(row["layers"], row["parameters"] // 10**5) for row in of("heads_at_fixed_width")}) == 1
    assert {row["layers"] for row in of("width_at_fixed_depth")} == {config.depth}
    assert all(row["estimate"] for row in of("published_shapes"))
    depth = next(row for row in of("lines") if row["against"] == "layers")
    assert depth["milliseconds_for_one_more"] == pytest.approx(1.0) and depth["r_squared"] == pytest.approx(1.0)
    assert (tmp_path / "report.html").stat().st_size > 0


def test_heads_that_do_not_divide_are_refused(tmp_path, clock):
    config = configs.load(f"{CONFIG}:smoke")
    config.heads = (3,)
    with pytest.raises(UserError, match="a width of 32 does not divide into 3 heads"):
        series.measured(config, tmp_path)
    config.heads, config.widths = (2,), (20,)
    with pytest.raises(UserError, match="a width of 20 does not divide into heads of 8"):
        series.measured(config, tmp_path)


def test_the_spread_is_the_interquartile_range_over_the_median():
    assert Point.of((1.0, 2.0, 3.0)) == Point(2.0, 0.5)
    assert Point.of((4.0,)) == Point(4.0, 0.0)
