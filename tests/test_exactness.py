"""Losslessness of the whole jitted loop: its output distribution by chi-square, its tokens by equality with plain
decoding."""

import dataclasses

import jax.numpy as jnp
import lossless
import numpy as np
import pytest
import tiny
from lossless import COUPLED, EOS, GREEDY, MAX_NEW, VOCAB, Pair, assert_same_tokens, compare_with_plain, p_value

from specjax.decoding.plan import capacity_for
from specjax.decoding.sampling import Sampling
from specjax.models import kv_cache
from specjax.models.decoder import Decoder
from specjax.models.vocabulary import draft_vocabulary

# --- the output distribution ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    """(target, params, draft, draft_params) of the chi-square tests."""
    return *lossless.small_target(), *lossless.small_draft()


def sample_p_value(models, kind, adjust, rule="lossless", seed=0, **more):
    """`lossless.p_value` of a drafter of this kind."""
    target, params, draft, draft_params = models
    options = tiny.drafter_options(kind, target, draft) | more if kind else None
    plan = lossless.small_plan(target, kind, options, rule)
    return p_value(plan, params, tiny.draft_params_of(kind, target, params, draft_params), adjust, seed)


CUT = Sampling.of(0.7, top_k=4, top_p=0.85)
# A setting with cuts is another program, of which one serves every temperature.
SETTINGS = pytest.mark.parametrize(
    "adjust", [pytest.param(Sampling.of(1.0), id="uncut", marks=pytest.mark.slow), pytest.param(CUT, id="cut")]
)
# Drafters that share the code of drafting with others.
SHARING = ("skip_layers", "medusa", "eagle3", "block_parallel", "pard")
# Of early exit the quick tests have the one with a reduced vocabulary.
SLOW_KINDS = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("early_exit", *SHARING)]


@pytest.mark.slow
def test_the_loop_samples_the_targets_distribution_at_temperature_1(small):
    assert sample_p_value(small, "model", Sampling.of(1.0)) > 1e-4


@SETTINGS
@pytest.mark.parametrize("kind", ["model", "ngram", *SLOW_KINDS])
def test_the_loop_samples_the_targets_distribution(small, kind, adjust):
    assert sample_p_value(small, kind, adjust, seed=1) > 1e-4


@pytest.mark.slow
@SETTINGS
@pytest.mark.parametrize("padding", [-2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_draft_of_another_vocabulary_size_leaves_the_targets_distribution(small, padding, adjust):
    models = (*small[:2], *lossless.small_draft(lossless.SMALL_VOCAB + padding))
    assert sample_p_value(models, "model", adjust, seed=1) > 1e-4


REDUCED = draft_vocabulary([0, 2, 3])
SLOW_REDUCED = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("model", "skip_layers")]


@pytest.mark.slow
@SETTINGS
@pytest.mark.parametrize("kind", ["early_exit", *SLOW_REDUCED])
def test_a_reduced_vocabulary_leaves_the_targets_distribution(small, kind, adjust):
    models, more = reduced_draft(*small, REDUCED) if kind == "model" else (small, {"vocabulary": REDUCED})
    assert sample_p_value(models, kind, adjust, seed=1, **more) > 1e-4


UNSURE = {"threshold": 0.4, "leave_unsure": True}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["model", *SLOW_KINDS])
def test_leaving_out_unsure_tokens_leaves_the_targets_distribution(small, kind):
    for adjust in (Sampling.of(1.0), CUT):
        adjust = dataclasses.replace(adjust, threshold=jnp.float32(UNSURE["threshold"]))
        assert sample_p_value(small, kind, adjust, seed=1, **UNSURE) > 1e-4


def reduced_draft(target, params, draft, draft_params, vocabulary):
    """The models with the draft's head cut to a vocabulary, and no further options."""
    kernel = draft.head_kernel(draft_params, vocabulary)
    return (target, params, draft.reduced(vocabulary), draft.reduced_params(draft_params, kernel)), {}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["model", "ngram", "early_exit"])
def test_the_coupled_rule_samples_the_targets_distribution(small, kind):
    assert sample_p_value(small, kind, Sampling.of(1.0), "coupled") > 1e-4
    assert sample_p_value(small, kind, Sampling.of(1.3, top_p=0.9), "coupled", seed=1) > 1e-4


@pytest.mark.slow
def test_plain_decoding_samples_the_targets_distribution(small):
    assert sample_p_value(small, None, Sampling.of(1.0)) > 1e-4


@pytest.mark.parametrize(
    "fault",
    [
        "wrong residual",
        *[pytest.param(f, marks=pytest.mark.slow) for f in ("no bonus", "unclipped residual")],
    ],
)
def test_the_chi_square_test_rejects_a_rule_with_a_planted_fault(small, fault):
    assert sample_p_value(small, "model", Sampling.of(1.0), tiny.Planted(fault)) < 1e-6


@pytest.mark.slow
def test_the_chi_square_test_passes_the_second_implementation_of_the_rule(small):
    assert sample_p_value(small, "model", Sampling.of(1.0), tiny.Planted("")) > 1e-4


# --- token for token -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair():
    return Pair.of(*tiny.decoder(1, sharpness=2.0))


def check_against_plain(pair, settings, drafts, rule, max_new=MAX_NEW):
    """`compare_with_plain` with each (kind, gamma, draft is the target itself)."""
    greedy = rule != "coupled"
    entries = []
    for kind, gamma, is_target in drafts:
        draft_params = tiny.draft_params_of(kind, pair.target, pair.params, pair.draft_params)
        entries.append((pair.plan(kind, gamma, rule, greedy, max_new), pair.params if is_target else draft_params, {}))
    outcomes = compare_with_plain(pair, settings, entries, rule, max_new)
    for (plan, state), (_, _, is_target) in zip(outcomes, drafts * len(settings), strict=True):
        if is_target:  # every draft is accepted
            calls, emitted = np.asarray(state.statistics.target_calls), np.asarray(state.num_emitted)
            np.testing.assert_array_equal(calls, -(-emitted // (plan.gamma + 1)))


QUICK = [("model", 3, False), ("model", 3, True), ("ngram", 4, False), ("early_exit", 2, False)]


def test_greedy_speculative_equals_greedy_plain(pair):
    check_against_plain(pair, GREEDY, QUICK, "lossless")


@pytest.mark.slow
def test_coupled_equals_plain_decoding_with_the_same_noise(pair):
    # The slow tests try every drafter, and each cut alone: cuts are other programs.
    check_against_plain(pair, COUPLED[:1], QUICK[:2], "coupled")
    check_against_plain(pair, [Sampling.of(0.7, top_k=6, top_p=0.8)], QUICK[:1], "coupled")


@pytest.mark.parametrize(
    "rule, settings", [("lossless", GREEDY), pytest.param("coupled", COUPLED, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("kind", ["model", pytest.param("early_exit", marks=pytest.mark.slow)])
def test_a_reduced_vocabulary_changes_no_token(pair, kind, rule, settings):
    vocabulary = draft_vocabulary(range(3, VOCAB, 2))
    draft_params, options = None, {"vocabulary": vocabulary}
    if kind == "model":
        pair_of_models = (pair.target, pair.params, pair.target, pair.draft_params)
        (_, _, model, draft_params), _ = reduced_draft(*pair_of_models, vocabulary)
        options = {"model": model}
    plan = pair.plan(kind, 3, rule, rule == "lossless", **options)
    list(compare_with_plain(pair, settings, [(plan, draft_params, {})], rule))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["model", *SLOW_KINDS])
def test_leaving_out_unsure_tokens_changes_no_token(pair, kind):
    """Where the draft is unsure of the first token, the block has none and is one step of plain decoding."""
    draft_params = tiny.draft_params_of(kind, pair.target, pair.params, pair.draft_params)
    changes, counts = {"threshold": jnp.float32(UNSURE["threshold"])}, []
    for options in ({"threshold": UNSURE["threshold"]}, UNSURE):
        entry = pair.plan(kind, 3, "lossless", True, **options), draft_params, changes
        [(_, state)] = compare_with_plain(pair, GREEDY, [entry], "lossless")
        counted = state.statistics
        counts.append([int(x.sum()) for x in (counted.target_calls, counted.drafted, counted.drafted_at[:, 0])])
    (calls, drafted, at_first), (calls_left, drafted_left, at_first_left) = counts
    assert at_first == calls  # every block drafts a token
    assert 0 < at_first_left < calls_left and drafted_left < drafted and calls_left >= calls


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["model", "ngram", "early_exit", *SHARING])
@pytest.mark.parametrize("rule, settings", [("lossless", GREEDY), ("coupled", COUPLED)])
def test_every_gamma_equals_plain_decoding(pair, kind, rule, settings):
    # Rules differ in how a drafted token is judged, not in how many are: under coupled, the extremes and one between.
    gammas = (4,) if kind in SHARING else (1, 4, 5) if rule == "coupled" else (1, 2, 3, 4, 5)
    check_against_plain(pair, settings[:1], [(kind, gamma, False) for gamma in gammas], rule)
    # Distributions are cut before a draft of any length is compared with them, so one length tries each cut.
    check_against_plain(pair, settings[1:], [(kind, 4, False)], rule)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["model", "ngram", "early_exit"])
@pytest.mark.usefixtures("layers_by_themselves")
def test_equality_holds_where_texts_outgrow_a_cache_prefix(pair, kind, monkeypatch):
    monkeypatch.setattr(kv_cache, "_SHORTEST_PREFIX", 32)
    texts, lengths = tiny.prompts(8, 96, 50, VOCAB)
    longer = dataclasses.replace(pair, texts=texts, lengths=lengths)
    assert kv_cache.prefixes(capacity_for(96, 96, 3))[0] < 96 + 96
    check_against_plain(longer, [Sampling.of(1.0)], [(kind, 3, False)], "coupled", max_new=96)


@pytest.mark.slow
def test_prompts_of_one_token_decode_like_plain_decoding(pair):
    texts = jnp.arange(VOCAB, dtype=jnp.int32)[:, None]
    lengths = jnp.ones((VOCAB,), jnp.int32)
    short = dataclasses.replace(pair, texts=texts, lengths=lengths)
    greedy = Sampling.of(0.0)
    run = lambda plan, draft: tiny.decode(plan, pair.params, draft, texts, lengths, 10)
    reference = run(short.plan("ngram", 0, "lossless", True, 10), None)
    for kind in ("model", "ngram", "medusa"):
        state = run(
            short.plan(kind, 2, "lossless", True, 10),
            tiny.draft_params_of(kind, pair.target, pair.params, pair.draft_params),
        )
        assert_same_tokens(short, state, reference, greedy, True)


def test_eos_inside_a_block_ends_the_row_there(pair):
    plan = pair.plan("model", 3, "lossless", True)
    state = tiny.decode(plan, pair.params, pair.params, pair.texts, pair.lengths, MAX_NEW, eos=EOS)
    inside = 0
    for row, text in enumerate(tiny.texts_of(state)):
        emitted = text[int(pair.lengths[row]) :]
        assert not set(emitted[:-1]) & set(EOS)
        assert emitted[-1] in EOS or len(emitted) == MAX_NEW
        inside += emitted[-1] in EOS and len(emitted) % 4 != 0 and len(emitted) < MAX_NEW
    assert inside > 20, "the draft is the target, so these rows ended inside a block"


# --- planted faults of the cache -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class FaultyDecoder(Decoder):
    """A Decoder of another class, so that it is compiled separately from the sound one."""

    fault: str


def _late(write):
    """Verification writes one slot late."""
    late = lambda new, axis: int(axis == 2 and new.shape[2] == FAULT_GAMMA + 1)
    return lambda slots, new, start, *, axis: write(slots, new, start + late(new, axis), axis=axis)


def _keeps_rejected(write):
    """Rolls back one slot too few: the pending token does not overwrite the slot of the rejected one."""

    def faulty(slots, new, start, *, axis):
        if axis != 2 or new.shape[2] != FAULT_GAMMA + 1:
            return write(slots, new, start, axis=axis)
        return write(slots, new[:, :, 1:], start + 1, axis=axis)

    return faulty


FAULT_GAMMA = 3
FAULTS = {"late": _late, "keeps rejected": _keeps_rejected}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.usefixtures("layers_by_themselves")
def test_equality_catches_an_off_by_one_rollback(pair, fault, monkeypatch):
    greedy = Sampling.of(0.0)
    run = lambda plan: tiny.decode(plan, pair.params, pair.params, pair.texts, pair.lengths, MAX_NEW, eos=EOS)
    reference = run(pair.plan("ngram", 0, "lossless", True))
    monkeypatch.setattr(kv_cache, "write_rows", FAULTS[fault](kv_cache.write_rows))
    faulty = dataclasses.replace(pair, target=FaultyDecoder(pair.target.config, fault))
    state = run(faulty.plan("ngram", FAULT_GAMMA, "lossless", True))
    with pytest.raises(AssertionError, match="row"):
        assert_same_tokens(pair, state, reference, greedy, True)
