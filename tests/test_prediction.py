"""Blocks foretold from counts: what the end of a text cuts short is not counted as refused."""

import numpy as np
import pytest

from specjax.evaluation import prediction
from specjax.reporting import metrics

GAMMA = 6


def counted(acceptance, tokens, rows, drafts=lambda rng: GAMMA):
    """The counts of texts of so many tokens, of which every drafted one stands with the same chance."""
    rng = np.random.default_rng(0)
    names = ("emitted", "target_calls", "drafted", "accepted")
    counts = {name: np.zeros(rows, int) for name in names}
    at = {name: np.zeros((rows, GAMMA), int) for name in ("drafted_at", "accepted_at", "emitted_more_than")}
    for row in range(rows):
        while counts["emitted"][row] < tokens:
            room, offered = tokens - counts["emitted"][row], drafts(rng)
            stood = int(np.argmin(np.append(rng.random(offered) < acceptance, False)))
            emitted, drafted = min(stood + 1, room), min(offered, room)
            accepted = min(stood, emitted)
            for name, value in zip(names, (emitted, 1, drafted, accepted), strict=True):
                counts[name][row] += value
            at["drafted_at"][row, : min(drafted, accepted + 1)] += 1
            at["accepted_at"][row, :accepted] += 1
            at["emitted_more_than"][row, : emitted - 1] += 1
    return metrics.Counts(**counts, **at)


@pytest.mark.parametrize(("acceptance", "tokens"), [(0.5, 16), (0.8, 30), (0.9, 64)])
def test_as_many_blocks_are_expected_as_texts_took(acceptance, tokens):
    counts = counted(acceptance, tokens, 2000)
    assert prediction.expected_iterations(counts, 1) == pytest.approx(counts.target_calls.sum(), rel=6e-3)
    cut = counts.emitted_more_than.sum(0) / counts.target_calls.sum()
    assert (prediction.uncut_ctar(counts, np.ones(2000)) >= cut).all()


def test_a_batch_is_expected_to_take_as_long_as_its_slowest_row():
    counts = counted(0.8, 30, 2000)
    taken = counts.target_calls.reshape(-1, 4).max(1).sum()
    assert prediction.expected_iterations(counts, 4) == pytest.approx(taken, rel=6e-3)


def test_of_a_drafter_that_offers_fewer_tokens_at_times_the_blocks_are_taken_as_they_were():
    counts = counted(0.9, 300, 200, drafts=lambda rng: int(rng.integers(0, GAMMA + 1)))
    found = prediction.uncut_ctar(counts, np.ones(200))
    np.testing.assert_array_equal(found, counts.emitted_more_than.sum(0) / counts.target_calls.sum())
    assert prediction.expected_iterations(counts, 1) == pytest.approx(counts.target_calls.sum(), rel=0.02)
