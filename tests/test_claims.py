"""Verdicts follow from intervals: an interval on one side of a bound decides, one that holds the bound does not."""

import pytest

from configs.records import claims
from configs.records.claims import Claim, Measured

RECORD = {"values": [2.0, 2.1, 1.9]}


def measured(low, high):
    return Measured((low + high) / 2, low, high)


@pytest.mark.parametrize(
    ("low", "high", "above", "below"),
    [
        (1.1, 2.0, True, False),
        (0.5, 0.9, False, True),
        (0.5, 1.5, None, None),
        (1.0, 1.0, False, False),  # an exact number at the bound
        (-float("inf"), float("inf"), None, None),  # a single seed
    ],
)
def test_an_interval_decides_only_what_lies_outside_it(low, high, above, below):
    assert measured(low, high).above(1) is above
    assert measured(low, high).below(1) is below


def test_two_intervals_decide_only_if_they_do_not_overlap():
    assert measured(2, 3).above(measured(0, 1)) is True
    assert measured(0, 1).above(measured(2, 3)) is False
    assert measured(0, 2).above(measured(1, 3)) is None


@pytest.mark.parametrize(
    ("outcomes", "every", "some"),
    [
        ([True, True], True, True),
        ([True, None], None, True),
        ([None, False], False, None),
        ([True, False], False, True),
        ([False, False], False, False),
        ([], True, False),
    ],
)
def test_outcomes_combine_without_deciding_what_is_open(outcomes, every, some):
    assert claims.every(outcomes) is every and claims.some(outcomes) is some


@pytest.mark.parametrize(
    ("bound", "verdict"),
    [(1.0, "reproduced"), (2.0, "not decided"), (3.0, "not reproduced"), (None, "not testable here")],
)
def test_text_and_verdict_follow_from_the_measures(bound, verdict):
    holds = None if bound is None else claims.all_above(bound)
    claim = Claim("says", "where", "r", lambda record: {"ratio": Measured.over_seeds(record["values"])}, holds)
    assert claim.judged(RECORD) == ("ratio: 2.000 [1.752, 2.248]", verdict)
    assert claim.judged(None) == (None, "not measured yet")
    assert "| says | where | – | not measured yet |" in claims.claims_table([claim], {})


def test_a_record_without_the_rows_of_a_claim_is_not_measured_yet():
    assert Claim("says", "where", "r", lambda record: {}, claims.all_above(0)).judged(RECORD)[1] == "not measured yet"


def test_numbers_are_printed_with_their_interval_unit_and_note():
    assert str(Measured.over_seeds([20.0, 22.4, 21.2], "+.1f", unit="%")) == "+21.2% [+18.2, +24.2]"
    assert str(Measured.over_seeds([20.0], "+.1f", unit="%")) == "+20.0% (1 seed)"
    assert str(Measured.of_row({"speedup": 1.5, "speedup_ci": [1.4, 1.6]}, "speedup", unit="x")) == "1.50x [1.40, 1.60]"
    assert str(Measured.exact(192, unit=" MiB")) == "192 MiB"
