"""The adaptive draft length: its output distribution, what it learns from, when it stops and retries, what it costs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import lossless
import numpy as np
import pytest
import test_kangaroo
import tiny
from enumeration import Tables, block_distribution
from lossless import COUPLED, GREEDY, SMALL_GAMMA, compare_with_plain, one_block, p_value

from specjax.decoding import loop
from specjax.decoding.drafters import adaptive
from specjax.decoding.drafters.adaptive import AdaptiveDrafter, Evidence, best_width, block_costs
from specjax.decoding.drafters.base import Drafter, Outcome, Proposal
from specjax.decoding.drafters.wrapping import Missing
from specjax.decoding.prefill import compiled_prefill
from specjax.decoding.rules import Lossless
from specjax.decoding.sampling import Sampling, row_keys
from specjax.runtime.errors import UserError

models, pair = test_kangaroo.models, test_kangaroo.pair  # fixtures
GAMMA = 4


# --- what is picked ------------------------------------------------------------------------------------------------


def picked(reached, accepted, costs, live=None, available=None):
    """The width of a block of one row, or of rows if counts are of several."""
    reached, accepted = (np.atleast_2d(np.asarray(each, np.float32)) for each in (reached, accepted))
    live = np.ones(len(reached), bool) if live is None else np.asarray(live)
    available = np.asarray([GAMMA] * len(reached) if available is None else available, np.int32)
    return int(jax.jit(best_width)(*map(jnp.asarray, (reached, accepted, live, available, costs))))


def test_the_length_picked_is_the_one_that_emits_most_at_its_cost():
    random = np.random.default_rng(0)
    for _ in range(50):
        reached = random.uniform(0, 20, GAMMA)
        accepted = reached * random.uniform(0, 1, GAMMA)
        costs = np.cumsum(random.uniform(0.05, 0.7, GAMMA + 1)) + 1
        row = (accepted.sum() + 2) / (reached.sum() + 2)
        shares = (accepted + 2 * row) / (reached + 2)
        rates = [(1 + sum(np.prod(shares[:i]) for i in range(1, g + 1))) / costs[g] for g in range(GAMMA + 1)]
        assert picked(reached, accepted, costs) == int(np.argmax(rates))


def test_acceptance_lengthens_the_draft_and_cost_shortens_it():
    costs = block_costs(0.2, 0.1, GAMMA)
    assert costs == pytest.approx((1, 1.3, 1.6, 1.9, 2.2))
    none, seen = np.zeros(GAMMA), np.full(GAMMA, 20.0)
    assert picked(none, none, costs) == GAMMA, "optimistic without evidence"
    by_share = [picked(seen, share * seen, costs) for share in (0, 0.2, 0.4, 0.6, 0.8, 1.0)]
    assert by_share == sorted(by_share) and by_share[0] == 0 and by_share[-1] == GAMMA and len(set(by_share)) > 2
    by_cost = [picked(seen, 0.6 * seen, block_costs(draft, 0.05, GAMMA)) for draft in (0.01, 0.1, 0.2, 0.4, 0.8)]
    assert by_cost == sorted(by_cost, reverse=True) and by_cost[0] == GAMMA and by_cost[-1] == 0
    # Heads that are right about the next token and wrong beyond it draft one.
    assert picked(seen, seen * [0.9, 0.05, 0.05, 0.05], costs) == 1


def test_rows_share_the_width_that_emits_most_in_all_of_them():
    random, hope = np.random.default_rng(1), 2
    for _ in range(30):
        reached = random.uniform(0, 20, (3, GAMMA))
        accepted = reached * random.uniform(0, 1, (3, 1))
        live, available = random.random(3) < 0.7, random.integers(0, GAMMA + 1, 3)
        costs = np.cumsum(random.uniform(0.05, 0.7, GAMMA + 1)) + 1
        emitted = np.zeros(GAMMA + 1)
        for row in np.flatnonzero(live):
            others = [other for other in range(3) if other != row]
            mean = (accepted[others].sum() + hope) / (reached[others].sum() + hope)
            rate = (accepted[row].sum() + hope * mean) / (reached[row].sum() + hope)
            shares = (accepted[row] + hope * rate) / (reached[row] + hope)
            chances = [np.prod(shares[:width]) if width <= available[row] else 0 for width in range(1, GAMMA + 1)]
            emitted += 1 + np.append(0, np.cumsum(chances))
        assert picked(reached, accepted, costs, live, available) == int(np.argmax(emitted / costs))


def test_a_batch_drafts_if_enough_of_its_rows_gain():
    seen, costs = np.full((4, GAMMA), 20.0), block_costs(0.3, 0.1, GAMMA)
    rates = np.array([[0.9], [0.0], [0.0], [0.0]])
    assert picked(seen[:1], rates[:1] * seen[:1], costs) == GAMMA and picked(seen[1:], rates[1:] * seen[1:], costs) == 0
    assert picked(seen, rates * seen, costs) == 0, "one row of four does not pay for the others"
    assert picked(seen, rates * seen, costs, live=[True, True, False, False]) > 0, "rows that have ended do not count"
    # A text that has just started is expected to be like the others, not to have every token accepted.
    assert picked(seen * [[0], [1], [1], [1]], 0 * seen, costs, live=[True, False, False, False]) == 0
    # Where only one row has anything to draft, it has to pay for all.
    assert picked(seen, 0.6 * seen, costs) > 0 and picked(seen, 0.6 * seen, costs, available=[GAMMA, 0, 0, 0]) == 0


@dataclasses.dataclass(frozen=True)
class Anything(Drafter):
    """Drafts gamma tokens, whatever they are."""

    gamma: int

    def propose(self, params, target_params, state, target_cache, context):
        shape = (context.lengths.shape[0], self.gamma)
        counts = jnp.full(shape[:1], self.gamma, jnp.int32)
        return Proposal(jnp.zeros(shape, jnp.int32), None, counts), state, target_cache

    def commit(self, params, state, outcome):
        return state


def after_block(drafter, state, drafted, accepted):
    """The state after one block, from the numbers of drafted and accepted tokens of each row."""
    state = dataclasses.replace(state, drafted=jnp.asarray(drafted, jnp.int32))
    accepted = jnp.asarray(accepted, jnp.int32)
    tokens = jnp.zeros((len(drafted), drafter.gamma + 1), jnp.int32)
    return drafter.commit((), state, Outcome(tokens, accepted + 1, accepted, accepted, ()))


def fresh(rows, gamma=GAMMA):
    zeros = jnp.zeros((rows, gamma), jnp.float32)
    none = jnp.zeros((rows,), jnp.int32)
    return Evidence((), zeros, zeros, none, Missing.nothing(rows))


def test_only_positions_that_were_reached_count():
    state = after_block(AdaptiveDrafter(Anything(GAMMA), GAMMA), fresh(4), [4, 4, 2, 0], [1, 4, 2, 0])
    np.testing.assert_array_equal(np.asarray(state.reached), [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(np.asarray(state.accepted), [[1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])


def test_a_row_whose_drafts_are_rejected_stops_drafting_and_retries_now_and_then():
    costs, widths = block_costs(0.4, 0.1, GAMMA), []
    after = jax.jit(functools.partial(after_block, AdaptiveDrafter(Anything(GAMMA), GAMMA)))
    for change in (1000, 100):  # always rejected, or until block 100, and then never
        state = fresh(1)
        for block in range(200):
            widths.append(picked(state.reached, state.accepted, costs))
            state = after(state, np.asarray(widths[-1:]), np.asarray([widths[-1] if block >= change else 0]))
    rejected, changing = np.asarray(widths).reshape(2, 200)
    assert rejected[0] == GAMMA and (rejected[20:] == 0).mean() > 0.85
    assert (rejected[-50:] > 0).any(), "it has to retry"
    assert (changing[-50:] == GAMMA).all(), "it has to notice that drafting pays now"


@jax.jit
def speed(rates, costs, fixed):
    """Tokens per cost of 600 blocks of rows with these acceptance rates, at a fixed width, or an adaptive one (-1)."""
    drafter, every = AdaptiveDrafter(Anything(GAMMA), GAMMA), jnp.ones(len(rates), bool)

    def block(state, key):
        full = jnp.full(len(rates), GAMMA)
        width = jnp.where(fixed < 0, best_width(state.reached, state.accepted, every, full, costs), fixed)
        passes = (jax.random.uniform(key, (len(rates), GAMMA)) < rates[:, None]) & (jnp.arange(GAMMA)[None] < width)
        accepted = jnp.cumprod(passes, axis=1).sum(1)
        return after_block(drafter, state, jnp.full(len(rates), width), accepted), (jnp.sum(accepted + 1), costs[width])

    _, (emitted, cost) = jax.lax.scan(block, fresh(len(rates)), jax.random.split(jax.random.key(0), 600))
    return jnp.sum(emitted).astype(jnp.float32) / jnp.sum(cost)


@pytest.mark.parametrize("rates", [(0.9, 0.3, 0.9, 0.3), (0.2, 0.3, 0.5, 0.6), (0.3, 0.1, 0.2, 0.1)])
def test_a_batch_that_adapts_is_as_fast_as_with_the_best_fixed_width(rates):
    for draft, column in ((0.05, 0.05), (0.12, 0.15), (0.15, 0.4)):  # more per column, as in larger batches
        costs = jnp.asarray(block_costs(draft, column, GAMMA), jnp.float32)
        speeds = [float(speed(jnp.asarray(rates), costs, width)) for width in (-1, *range(GAMMA + 1))]
        assert speeds[0] >= 0.97 * max(speeds)


def test_a_draft_that_cannot_pay_is_never_tried_and_a_free_one_always():
    none = np.zeros(GAMMA)
    assert picked(none, none, block_costs(1.0, 0.1, GAMMA)) == 0
    assert picked(np.full(GAMMA, 20.0), np.full(GAMMA, 2.0), [1.0] * (GAMMA + 1)) == GAMMA


# --- the law -------------------------------------------------------------------------------------------------------


class Forced(Tables):
    """Tables of which every block drafts `count` tokens."""

    count = 0

    def num_drafted(self, context):
        return self.count


def adaptive_distribution(tables, laws, pick, learn, state, context, emitted):
    """The joint law of a row's next tokens where each block's width is picked from what both rows did before it.

    The other row accepts all or nothing, by chance.
    """
    if emitted == 0:
        return np.ones(())
    joint = np.zeros((tables.vocab,) * emitted)
    width = pick(state)
    for (start, accepted), chances in laws[width].items():
        if start != context:
            continue
        if len(accepted) >= emitted:
            joint[accepted[:emitted]] += chances.sum()
            continue
        rest = emitted - len(accepted) - 1
        for other in (0, width):
            after = learn(state, width, [len(accepted), other]) if rest else state
            for token in np.flatnonzero(chances):
                text = (*context, *accepted, int(token))
                further = adaptive_distribution(tables, laws, pick, learn, after, text, rest)
                joint[(*accepted, token)] += 0.5 * chances[token] * further
    return joint


@pytest.mark.parametrize("one_hot", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["sampled", "one_hot"])
def test_the_joint_distribution_is_the_targets_whatever_was_accepted_before_in_the_batch(one_hot):
    gamma, emitted = 2, 4
    tables = Forced(5, 3, gamma, False)
    tables.target_distribution((), emitted)  # draws every context once, whatever is drafted
    laws = []
    for tables.count in range(gamma + 1):
        laws.append(block_distribution(Lossless(), tables, one_hot, depth=emitted))
    drafter, costs, widths = AdaptiveDrafter(Anything(gamma), gamma), jnp.asarray(block_costs(0.4, 0.2, gamma)), {}
    pick_of = jax.jit(lambda state: best_width(state.reached, state.accepted, jnp.ones(2, bool), full, costs))
    full, learn_of = jnp.full(2, gamma), jax.jit(functools.partial(after_block, drafter))

    def pick(state):
        width = int(pick_of(state))
        widths[width] = widths.get(width, 0) + 1
        return width

    learn = lambda state, width, accepted: learn_of(state, jnp.full(2, width), jnp.asarray(accepted))
    law = adaptive_distribution(tables, laws, pick, learn, fresh(2, gamma), (), emitted)
    np.testing.assert_allclose(law, tables.target_distribution((), emitted), atol=1e-6)
    assert set(widths) == {0, 1, 2}, "every width has to occur"


@pytest.fixture(scope="module")
def small():
    """A target with its parameters and a draft with its own, for the chi-square tests."""
    return lossless.small_target(), lossless.small_draft()


def small_plan(small, threshold=0.0):
    (target, _), (draft, _) = small
    return lossless.small_plan(target, "model", {"model": draft, "threshold": threshold, "adaptive": True})


@pytest.mark.slow
def test_the_loop_samples_the_targets_distribution(small):
    (_, params), (_, draft_params) = small
    adjust = Sampling.of(1.0, threshold=0.5, block_costs=block_costs(0.4, 0.1, SMALL_GAMMA))
    assert p_value(small_plan(small, 0.5), params, draft_params, adjust) > 1e-4


@dataclasses.dataclass(frozen=True)
class Watching(AdaptiveDrafter):
    """Picks the next length by the token that was drafted after a rejection and dropped."""

    def propose(self, params, target_params, state, target_cache, context):
        most = jnp.where(state.reached[:, 0] == 1, 0, self.gamma).astype(jnp.int32)
        context = dataclasses.replace(context, max_drafted=most)
        proposal, inner, cache = self.inner.propose(params, target_params, state.inner, target_cache, context)
        changes = {"inner": inner, "drafted": proposal.num_drafted, "accepted": proposal.tokens.astype(jnp.float32)}
        return proposal, dataclasses.replace(state, **changes), cache

    def commit(self, params, state, outcome):
        dropped = jnp.minimum(outcome.num_accepted + 1, self.gamma - 1)
        token = jnp.take_along_axis(state.accepted, dropped[:, None], axis=1)[:, 0]
        watched = (outcome.num_accepted + 1 < state.drafted) & (token < 2)
        state = super().commit(params, state, outcome)
        return dataclasses.replace(state, reached=jnp.where(watched, 1.0, 0.0)[:, None] + 0 * state.reached)


@pytest.mark.slow
def test_the_chi_square_test_rejects_a_length_picked_by_a_dropped_token(small):
    """The dropped token's noise is drawn again in the next block, whose distribution then depends on it."""
    (_, params), (_, draft_params) = small
    plan = small_plan(small)
    plan = dataclasses.replace(plan, drafter=Watching(plan.drafter.inner, SMALL_GAMMA))
    adjust = Sampling.of(1.0, block_costs=block_costs(0.4, 0.1, SMALL_GAMMA))
    assert p_value(plan, params, draft_params, adjust) < 1e-6


# --- token for token -----------------------------------------------------------------------------------------------


def plan_and_params(models, pair, kind, threshold=0.0, *, gamma, rule="lossless", greedy=False):
    target, params, adapter, adapter_params = models
    options = {"adaptive": True, **({"adapter": adapter} if kind == "kangaroo" else {})}
    options |= {} if kind == "ngram" else {"threshold": threshold}  # ngram has no probabilities
    plan = pair.plan(kind, gamma, rule, greedy, **options)
    if kind == "kangaroo":
        return plan, adapter_params
    return plan, tiny.draft_params_of(kind, target, params, pair.draft_params)


def check_against_plain(models, pair, drafts, settings, rule, costs):
    """`compare_with_plain` with each (kind, gamma, threshold), of which some drafts must be shorter than gamma."""
    entries = []
    for kind, gamma, threshold in drafts:
        made = plan_and_params(models, pair, kind, threshold, gamma=gamma, rule=rule, greedy=rule == "lossless")
        costs_of_blocks = jnp.asarray(block_costs(*costs, gamma), jnp.float32)
        entries.append((*made, {"threshold": jnp.float32(threshold), "block_costs": costs_of_blocks}))
    for plan, state in compare_with_plain(pair, settings, entries, rule):
        drafted, calls = int(state.statistics.drafted.sum()), int(state.statistics.target_calls.sum())
        assert 0 < drafted < 0.9 * plan.gamma * calls, "no length was picked"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "settings", "kinds"),
    [
        (
            "lossless",
            GREEDY,
            [
                ("kangaroo", 4, 0.6),
                *((kind, 4, 0.0) for kind in ("medusa", "eagle3", "block_parallel", "pard", "ngram")),
            ],
        ),
        ("coupled", COUPLED[:1], [("model", 3, 0.0)]),
    ],
)
def test_with_picked_lengths_every_drafter_equals_plain_decoding(models, pair, rule, settings, kinds):
    check_against_plain(models, pair, kinds, settings, rule, (0.2, 0.1))


@pytest.mark.slow
def test_one_compile_serves_all_costs_and_a_draft_that_cannot_pay_runs_no_layer(models, pair):
    target, params, _, _ = models
    plan, draft = plan_and_params(models, pair, "kangaroo", gamma=3)
    drafted, sizes, states = [], set(), []
    for costs in ((0.01, 0.01), (0.3, 0.1), (2.0, 0.1)):
        adjust = Sampling.of(1.0, block_costs=block_costs(*costs, 3))
        state = tiny.decode(plan, params, draft, pair.texts[:64], pair.lengths[:64], 12, adjust=adjust)
        sizes.add((compiled_prefill._cache_size(), loop.compiled_run._cache_size()))
        drafted.append(int(state.statistics.drafted.sum()))
        states.append(state)
    assert len(sizes) == 1
    assert drafted[0] > drafted[1] > drafted[2] == 0
    # Nothing drafted: each layer of the target once a token, verified one column at a time, the adapter never.
    meter = states[-1].target_cache.meter
    assert int(meter.columns) == target.layers * 12 and np.all(np.asarray(meter.own) == target.layers * 12)
    assert int(states[-1].drafter_state.inner.cache.meter.columns) == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kangaroo", "model"])
def test_a_draft_that_sat_out_blocks_fills_its_cache_before_it_drafts_again(models, pair, kind):
    target, params, adapter, _ = models
    gamma, rows = 2, 8
    plan, own = plan_and_params(models, pair, kind, gamma=gamma)
    texts, lengths, batch = pair.texts[:rows], pair.lengths[:rows], np.arange(rows)
    state = loop.prefill(plan, params, own, texts, lengths, row_keys(4, jnp.arange(rows)))
    for length in (2, 0, 0, 0, 0, 0, 0, 2):  # the gap is more than is fed at a time
        before = state
        costs = jnp.full((gamma + 1,), jnp.inf).at[length].set(1.0)
        adjust = dataclasses.replace(Sampling.of(1.0), block_costs=costs)
        state, logits, proposal = one_block(plan, params, own, before, tiny.limits(rows, 24), adjust)
        assert np.all(np.asarray(proposal.num_drafted) == length)
    text, at = np.asarray(before.tokens).copy(), np.asarray(before.lengths)[:, None] - 1 + np.arange(gamma + 1)
    text[batch[:, None], at[:, 1:]] = np.asarray(proposal.tokens)
    full = np.asarray(tiny.full_logits(target, params, jnp.asarray(text)))[batch[:, None], at]
    np.testing.assert_allclose(np.asarray(logits), full, atol=1e-4)
    if kind == "kangaroo":
        drafted = test_kangaroo.full_draft_logits(target, adapter, params, own, jnp.asarray(text))
    else:
        drafted = tiny.full_logits(target, own, jnp.asarray(text))
    draft_probs = np.asarray(jax.nn.softmax(drafted, axis=-1))[batch[:, None], at[:, :-1]]
    np.testing.assert_allclose(np.asarray(proposal.probs), draft_probs, atol=1e-4)


# --- bad input -----------------------------------------------------------------------------------------------------


def test_costs_that_are_not_positive_are_refused(models, pair):
    for costs in ((0.0, 0.1), (0.1, -0.1), (float("nan"), 0.1)):
        with pytest.raises(UserError, match="costs are those of a drafted token .* positive"):
            block_costs(*costs, 3)
    for costs in ((1.0, 0.0), (float("inf"), 1.0)):
        with pytest.raises(UserError, match="costs of blocks must be positive numbers"):
            Sampling.of(1.0, block_costs=costs)
    plan, draft = plan_and_params(models, pair, "early_exit", gamma=2, greedy=True)
    with pytest.raises(ValueError, match="needs the costs of blocks"):
        tiny.decode(plan, models[1], draft, pair.texts, pair.lengths, 4)


def test_without_a_gamma_there_is_nothing_to_adapt(models):
    assert tiny.make_drafter("early_exit", models[0], 0, {"exit_layer": 1, "adaptive": True}) is None
    assert adaptive.AdaptiveDrafter(Anything(2), 2).taps == ()
