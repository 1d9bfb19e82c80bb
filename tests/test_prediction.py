"""Predicted numbers of blocks: what the end of a text cuts off does not count as rejected."""

import numpy as np
import pytest

from specjax.evaluation import prediction
from specjax.reporting import metrics

GAMMA = 6


def counted(acceptance, tokens, rows, drafts=lambda rng: GAMMA):
    """Counts of texts of `tokens` tokens in which every drafted token is accepted with the same chance."""
    rng = np.random.default_rng(0)
    names = ("emitted", "target_calls", "drafted", "accepted")
    counts = {name: np.zeros(rows, int) for name in names}
    at = {name: np.zeros((rows, GAMMA), int) for name in ("drafted_at", "accepted_at", "emitted_more_than")}
    for row in range(rows):
        while counts["emitted"][row] < tokens:
            room, offered = tokens - counts["emitted"][row], drafts(rng)
            passed = int(np.argmin(np.append(rng.random(offered) < acceptance, False)))
            emitted, drafted = min(passed + 1, room), min(offered, room)
            accepted = min(passed, emitted)
            for name, value in zip(names, (emitted, 1, drafted, accepted), strict=True):
                counts[name][row] += value
            at["drafted_at"][row, : min(drafted, accepted + 1)] += 1
            at["accepted_at"][row, :accepted] += 1
            at["emitted_more_than"][row, : emitted - 1] += 1
    return metrics.Counts(**counts, **at)


@pytest.mark.parametrize(("acceptance", "tokens"), [(0.5, 16), (0.8, 30), (0.9, 64)])
def test_the_predicted_number_of_blocks_is_the_number_taken(acceptance, tokens):
    counts = counted(acceptance, tokens, 2000)
    assert prediction.expected_iterations(counts, 1, 1) == pytest.approx(counts.target_calls.sum(), rel=6e-3)
    cut = counts.emitted_more_than.sum(0) / counts.target_calls.sum()
    assert (prediction.uncut_ctar(counts, np.ones(2000)) >= cut).all()


def test_a_batch_is_predicted_to_take_as_long_as_its_slowest_row():
    counts = counted(0.8, 30, 2000)
    taken = counts.target_calls.reshape(-1, 4).max(1).sum()
    assert prediction.expected_iterations(counts, 4, 4) == pytest.approx(taken, rel=6e-3)


def test_for_a_drafter_of_varying_lengths_the_measured_blocks_are_used_unchanged():
    counts = counted(0.9, 300, 200, drafts=lambda rng: int(rng.integers(0, GAMMA + 1)))
    ctar = prediction.uncut_ctar(counts, np.ones(200))
    np.testing.assert_array_equal(ctar, counts.emitted_more_than.sum(0) / counts.target_calls.sum())
    assert prediction.expected_iterations(counts, 1, 1) == pytest.approx(counts.target_calls.sum(), rel=0.02)


def test_texts_of_unlike_acceptance_are_predicted_to_slow_a_batch_down():
    parts = [counted(acceptance, 60, 40) for acceptance in (0.3, 0.9)]
    order = np.argsort(np.tile(np.arange(40), 2), kind="stable")
    join = lambda name: np.concatenate([getattr(part, name) for part in parts])[order]
    counts = metrics.Counts(**{name: join(name) for name in vars(parts[0])})
    taken = counts.target_calls.reshape(-1, 4).max(1).sum()
    assert prediction.expected_iterations(counts, 4, 4) == pytest.approx(taken, rel=0.05)
    ctars = prediction.text_ctars(counts)
    low, high = ctars[::2].mean(0), ctars[1::2].mean(0)
    assert low[0] == pytest.approx(0.3, abs=0.05) and high[0] == pytest.approx(0.9, abs=0.05)
    # Texts that differ by chance alone are all like their mean.
    same = prediction.text_ctars(counted(0.6, 60, 400))
    assert same[:, 0].std() < 0.02 and same[:, 0].mean() == pytest.approx(0.6, abs=0.02)
    assert prediction.text_ctars(counted(1.0, 60, 2)).tolist() == [[1.0] * GAMMA] * 2
    assert prediction.text_ctars(counted(0.0, 60, 2)).max() < 1e-6
