"""The throughput model against values worked by hand: every form of acceptance, both forms of cost, batches, advice."""

import itertools

import pytest

from specjax.evaluation import throughput as model

# A draft step of 1, verification of 10, 11, 12 on 1, 2, 3 tokens, 0 of rule: blocks of 10, 12, 14 by gamma.
COSTS = model.Costs(draft_step=1.0, verify=(10.0, 11.0, 12.0))


def test_ctar_follows_from_iid_and_from_positional_acceptance():
    assert model.iid(0.5, 3) == (0.5, 0.25, 0.125)
    assert model.iid(1.0, 2) == (1.0, 1.0) and model.iid(0.3, 0) == ()
    assert model.by_position((0.5, 0.5, 0.2)) == (0.5, 0.25, 0.05)
    assert model.rates_of((0.5, 0.25, 0.0, 0.0)) == (0.5, 0.5, 0.0, 0.0)


def test_a_block_emits_one_token_more_than_are_accepted():
    # (1 - a^4) / (1 - a) at a = 1/2, Leviathan et al.
    assert model.emitted(model.iid(0.5, 3), 3) == 1.875
    assert model.emitted((0.75, 0.625), 2) == 2.375
    assert model.emitted((0.75, 0.625), 1) == 1.75
    assert model.emitted((), 0) == 1.0
    with pytest.raises(ValueError, match="gamma 3 exceeds the 2 positions"):
        model.emitted((0.75, 0.625), 3)


def test_throughput_is_emitted_tokens_over_the_seconds_of_a_block():
    assert [COSTS.block(gamma) for gamma in range(3)] == [10.0, 12.0, 14.0]
    assert model.throughput((0.8, 0.6), COSTS, 2) == pytest.approx(2.4 / 14)
    assert model.speedup((0.8, 0.6), COSTS, 2) == pytest.approx(24 / 14)
    assert model.speedup((0.8, 0.6), COSTS, 0) == 1.0
    with pytest.raises(ValueError, match=r"for 1 \.\. 3 tokens, not for 4"):
        COSTS.block(3)


def test_the_published_rows_are_consistent_with_one_gamma_and_one_target():
    # arXiv 2402.01528: TAR 3.70 at 6.69 ms gives 32.59 tokens/s, 3.81 at 13.13 ms gives 23.10.
    for emitted, draft_step, published in ((3.70, 6.69e-3, 32.59), (3.81, 13.13e-3, 23.10)):
        costs = model.Costs(draft_step, (60e-3,) * 9)
        assert emitted / costs.block(8) == pytest.approx(published, rel=5e-3)


def test_shared_layers_run_once_on_every_token_of_a_block():
    # Kangaroo: (k + 1) * shared layers + k * adapter + deep layers on k + 1 tokens + rule.
    costs = model.Costs(draft_step=0.5, verify=(20.0, 21.0, 22.0), rule=0.25, shared=2.0)
    assert [costs.block(gamma) for gamma in range(3)] == [22.25, 25.75, 29.25]


def test_a_batch_runs_as_long_as_its_slowest_row():
    # Two tokens at gamma 1, accepted half of the time: one block or two, so 1.5; of two rows, 2 - 1/4.
    assert model.expected_rounds([(0.5,)], (2,)) == 1.5
    assert model.expected_rounds([(0.5,), (0.5,)], (2, 2)) == 1.75
    assert model.expected_rounds([(1.0,), (0.0,)], (4, 4)) == 4.0
    assert model.expected_rounds([(), ()], (7, 7)) == 7.0
    assert model.expected_rounds([(0.5,), ()], (2, 1)) == 1.5
    pair = [(0.5, 0.1), (0.5, 0.1)]
    assert model.batch_throughput(pair, (2, 2), COSTS, 1) == pytest.approx(4 / (1.75 * 12))
    # Two rows of unlike acceptance take longer than two of their mean.
    unlike = model.batch_throughput([(0.9,), (0.1,)], (8, 8), COSTS, 1)
    assert unlike < 0.9 * model.batch_throughput([(0.5,), (0.5,)], (8, 8), COSTS, 1)
    # Groups of texts that follow each other.
    assert model.batch_throughput(2 * pair, (2,) * 4, COSTS, 1, 2, group=2) == pytest.approx(8 / (3.5 * 12))


def test_expected_rounds_are_those_of_enumerated_blocks():
    ctars, tokens = [(0.6, 0.3), (0.9, 0.2)], 5
    chances = [[0.4, 0.3, 0.3], [0.1, 0.7, 0.2]]  # of 1, 2, 3 tokens a block

    def rounds_of(law):
        result = [0.0] * (tokens + 1)
        for blocks in itertools.product(range(3), repeat=tokens):
            totals = list(itertools.accumulate(block + 1 for block in blocks))
            chance = 1.0
            for block in blocks:
                chance *= law[block]
            result[next(i for i, total in enumerate(totals) if total >= tokens) + 1] += chance
        return result

    laws = [rounds_of(law) for law in chances]
    pairs = itertools.product(enumerate(laws[0]), enumerate(laws[1]))
    expected = sum(max(a, b) * p * q for (a, p), (b, q) in pairs)
    assert model.expected_rounds(ctars, (tokens, tokens)) == pytest.approx(expected)


def test_the_best_gamma_is_found_and_is_0_where_speculation_does_not_pay():
    # 1.8 / 12 = 0.150 beats 2.0 / 14 = 0.143 and 1 / 10.
    assert model.best_gamma((0.8, 0.2), COSTS) == 1
    assert model.best_gamma((0.8, 0.6), COSTS) == 2
    assert model.best_gamma((0.1, 0.01), COSTS) == 0


def test_break_even_is_where_both_are_equally_fast():
    # 1 + a = 1.2, and a + a^2 = 0.4.
    assert model.break_even_acceptance(COSTS, 1) == pytest.approx(0.2)
    assert model.break_even_acceptance(COSTS, 2) == pytest.approx((-1 + 2.6**0.5) / 2)
    slow = model.Costs(draft_step=10.0, verify=(10.0, 20.0))
    assert model.break_even_acceptance(slow, 1) is None
    free = model.Costs(draft_step=0.0, verify=(10.0, 10.0))
    assert model.break_even_acceptance(free, 1) == pytest.approx(0.0)


def test_parity_is_the_latency_at_which_a_draft_is_as_fast_as_another():
    # The deep draft of the published rows would have to step in 7.1 ms in place of 13.13 to reach the wide one's 32.59.
    step = model.parity_draft_step(3.81, 8, 32.59, 60e-3)
    assert step == pytest.approx((3.81 / 32.59 - 0.060) / 8)
    assert 3.81 / model.Costs(step, (60e-3,) * 9).block(8) == pytest.approx(32.59)
    assert model.parity_draft_step(1.5, 8, 32.59, 60e-3) is None


def test_sensitivity_says_what_a_better_draft_brings():
    result = model.sensitivity((0.5, 0.25), COSTS, 2)
    # By position 0.5 becomes 0.55: 1 + 0.55 + 0.3025 for 1.75; blocks of 13.8 for 14.
    assert result["acceptance"] == pytest.approx(1.8525 / 1.75)
    assert result["latency"] == pytest.approx(14 / 13.8)
    # No acceptance beyond 1.
    assert model.sensitivity((0.95, 0.95), COSTS, 2)["acceptance"] == pytest.approx(3 / 2.9)


def test_seconds_between_measured_gammas_are_interpolated():
    assert model.interpolated({0: 10.0, 2: 12.0, 4: 16.0}, 5) == (10.0, 11.0, 12.0, 14.0, 16.0, 18.0)
    assert model.interpolated({0: 10.0, 4: 18.0}, 2) == (10.0, 12.0, 14.0)
    with pytest.raises(ValueError, match="at 0 drafted tokens and at one more number"):
        model.interpolated({2: 1.0, 4: 2.0}, 4)


def test_the_memory_bound_speedup_weighs_the_draft_by_its_parameters():
    assert model.memory_bound_speedup(3.0, 4, target_params=80, draft_params=10) == 8 * 3.0 / 12


def test_a_refilled_batch_takes_the_blocks_of_list_scheduling():
    """Plain texts of 5, 2, 2 and 4 tokens in two rows: 5 + nothing, and 2 + 2 + 4."""
    assert model.expected_rounds([()] * 4, (5, 2, 2, 4), 2) == 8
    ctar, tokens = (0.6, 0.3), (9, 14, 6)
    alone = [model.expected_rounds([ctar], [count]) for count in tokens]
    assert model.expected_rounds([ctar] * 3, tokens, 1) == pytest.approx(sum(alone))
    # The last text waits in a row of its own for nobody, so the sampled estimate is that of two rows, which is exact.
    exact = model.expected_rounds([ctar] * 2, tokens[:2])
    assert model.expected_rounds([ctar] * 3, (*tokens[:2], 0), 2) == pytest.approx(exact, rel=0.02)
