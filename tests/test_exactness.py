"""Losslessness of the whole jitted loop: its law by chi-square, its tokens by equality with plain decoding."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import tiny

from specjax.decoding.plan import capacity_for
from specjax.decoding.sampling import Sampling, Stream, probabilities
from specjax.models import kv_cache
from specjax.models.decoder import Decoder

# --- the law -------------------------------------------------------------------------------------------------------

LAW_VOCAB, LAW_EMITTED, LAW_ROWS, LAW_GAMMA = 5, 3, 3000, 2
LAW_PROMPTS, LAW_LENGTHS = [[3, 0, 0, 0, 0, 0], [1, 2, 1, 2, 1, 0], [0, 4, 4, 0, 4, 4]], [1, 5, 6]


@pytest.fixture(scope="module")
def law_models():
    target, params = tiny.decoder(0, vocab_size=LAW_VOCAB)
    draft, draft_params = tiny.decoder(9, vocab_size=LAW_VOCAB, layers=1)
    return target, params, draft, draft_params


def drafter_options(kind, draft, target):
    return {
        "model": {"model": draft},
        "ngram": {"shortest": 1, "longest": 2},
        "early_exit": {"exit_layer": 1},
        "skip_layers": {"skipped": (0,)},
        "medusa": {"adapter": tiny.heads(target)},
    }[kind]


def own_params(kind, target, params, draft_params):
    """What this drafter has of its own, where it has anything."""
    return tiny.heads_params(target, params) if kind == "medusa" else draft_params


def exact_law(target, params, prompt, adjust):
    """Probabilities `[V ** n]` of the next n tokens, from the uncached forward."""
    continuations = np.asarray(list(itertools.product(range(LAW_VOCAB), repeat=LAW_EMITTED)))
    texts = np.concatenate([np.broadcast_to(prompt, (len(continuations), len(prompt))), continuations], axis=1)
    probs = np.asarray(
        probabilities(tiny.full_logits(target, params, jnp.asarray(texts, jnp.int32)), adjust, greedy=False),
        np.float64,
    )
    law = np.ones(len(continuations))
    for i in range(LAW_EMITTED):
        law *= probs[np.arange(len(texts)), len(prompt) + i - 1, continuations[:, i]]
    return law


def law_p_value(models, plan, adjust, seed=0):
    """p of a chi-square test over all prompts: the counts of the first n emitted tokens against the exact law.

    Rows of one prompt differ in their keys alone, and run beside rows of other lengths and limits.
    """
    target, params, _, draft_params = models
    batch = LAW_ROWS * len(LAW_PROMPTS)
    texts = jnp.asarray(np.tile(LAW_PROMPTS, (LAW_ROWS, 1)), jnp.int32)
    lengths = jnp.asarray(np.tile(LAW_LENGTHS, LAW_ROWS), jnp.int32)
    max_new = LAW_EMITTED + np.arange(batch) % 3
    state = tiny.decode(plan, params, draft_params, texts, lengths, max_new, seed=seed, adjust=adjust)
    assert np.array_equal(np.asarray(state.num_emitted), max_new)
    emitted = np.asarray(state.tokens)[np.arange(batch)[:, None], np.asarray(lengths)[:, None] + np.arange(LAW_EMITTED)]
    cells = emitted @ LAW_VOCAB ** np.arange(LAW_EMITTED)[::-1]
    statistic, freedom = 0.0, 0
    for i, length in enumerate(LAW_LENGTHS):
        expected = exact_law(target, params, LAW_PROMPTS[i][:length], adjust) * LAW_ROWS
        counts = np.bincount(cells[i :: len(LAW_PROMPTS)], minlength=len(expected))
        assert counts[expected == 0].sum() == 0, "a token of probability 0 was emitted"
        large = expected >= 5
        pooled = np.append(expected[large], expected[~large].sum())
        seen = np.append(counts[large], counts[~large].sum())
        seen, pooled = seen[pooled > 1], pooled[pooled > 1]
        statistic += ((seen - pooled) ** 2 / pooled).sum()
        freedom += len(pooled) - 1
    return float(scipy.special.chdtrc(freedom, statistic))


def law_plan(models, kind, rule="lossless"):
    target, _, draft, _ = models
    slots, max_new = len(LAW_PROMPTS[0]), LAW_EMITTED + 2
    options = drafter_options(kind, draft, target)
    return tiny.plan(target, kind, options, gamma=LAW_GAMMA, slots=slots, max_new=max_new, rule=rule)


def law_arguments(law_models, kind):
    target, params, draft, draft_params = law_models
    return target, params, draft, own_params(kind, target, params, draft_params)


SLOW_KINDS = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("skip_layers", "medusa")]


@pytest.mark.parametrize("kind", ["model", "ngram", "early_exit", *SLOW_KINDS])
def test_the_loop_samples_the_targets_law(law_models, kind):
    plan, models = law_plan(law_models, kind), law_arguments(law_models, kind)
    assert law_p_value(models, plan, Sampling.of(1.0)) > 1e-4
    # Traced settings: the same executable serves the adjusted law.
    assert law_p_value(models, plan, Sampling.of(0.7, top_k=4, top_p=0.85), seed=1) > 1e-4


@pytest.mark.parametrize("rows", [LAW_VOCAB - 2, pytest.param(LAW_VOCAB + 3, marks=pytest.mark.slow)])
def test_a_draft_padded_to_another_vocabulary_leaves_the_targets_law(law_models, rows):
    draft, draft_params = tiny.decoder(9, vocab_size=rows, layers=1)
    models = (*law_models[:2], draft, draft_params)
    assert law_p_value(models, law_plan(models, "model"), Sampling.of(1.0)) > 1e-4
    assert law_p_value(models, law_plan(models, "model"), Sampling.of(0.7, top_k=4, top_p=0.85), seed=1) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["model", "ngram", "early_exit"])
def test_the_loop_samples_the_targets_law_when_coupled(law_models, kind):
    plan = law_plan(law_models, kind, "coupled")
    assert law_p_value(law_models, plan, Sampling.of(1.0)) > 1e-4
    assert law_p_value(law_models, plan, Sampling.of(1.3, top_p=0.9), seed=1) > 1e-4


@pytest.mark.slow
def test_plain_decoding_samples_the_targets_law(law_models):
    plan = tiny.plan(law_models[0], gamma=0, slots=len(LAW_PROMPTS[0]), max_new=LAW_EMITTED + 2)
    assert law_p_value(law_models, plan, Sampling.of(1.0)) > 1e-4


@pytest.mark.parametrize(
    "fault",
    [
        "wrong residual",
        *[pytest.param(f, marks=pytest.mark.slow) for f in ("no bonus", "unclipped residual")],
    ],
)
def test_the_chi_square_test_catches_a_planted_rule(law_models, fault):
    assert law_p_value(law_models, law_plan(law_models, "model", tiny.Planted(fault)), Sampling.of(1.0)) < 1e-6


@pytest.mark.slow
def test_the_chi_square_test_passes_the_plain_writing_of_the_rule(law_models):
    assert law_p_value(law_models, law_plan(law_models, "model", tiny.Planted("")), Sampling.of(1.0)) > 1e-4


# --- token for token -----------------------------------------------------------------------------------------------

VOCAB, BATCH, SLOTS, MAX_NEW = 24, 256, 12, 24
EOS = (3, 17)
TIE = 1e-5


@dataclasses.dataclass(frozen=True)
class Pair:
    """A target, a draft of its own shape, and the prompts on which they are compared."""

    target: Decoder
    params: dict
    draft_params: dict
    texts: jax.Array
    lengths: jax.Array

    def plan(self, kind, gamma, rule, greedy, max_new=MAX_NEW):
        options = drafter_options(kind, self.target, self.target)
        slots = self.texts.shape[1]
        return tiny.plan(
            self.target, kind, options, gamma=gamma, slots=slots, max_new=max_new, rule=rule, greedy=greedy
        )


@pytest.fixture(scope="module")
def pair():
    target, params = tiny.decoder(1, sharpness=2.0)
    noise = tiny.decoder(2)[1]
    draft_params = jax.tree.map(lambda a, b: a + 0.1 * b, params, noise)  # agrees often, not always
    return Pair(target, params, draft_params, *tiny.prompts(0, BATCH, SLOTS, VOCAB))


def row_limits(batch, max_new):
    """0 .. max_new, uneven; a quarter of the rows has all of it."""
    limits = np.random.default_rng(5).integers(0, max_new + 1, batch)
    return np.where(np.arange(batch) % 4 == 0, max_new, limits)


def gap(pair, text, position, state, adjust, greedy):
    """How far the plain decode's choice at `position` was from another one (in log-probability with its noise)."""
    row, text = text
    logits = tiny.full_logits(pair.target, pair.params, jnp.asarray([text[:position]], jnp.int32))[:, -1:]
    scores = np.asarray(logits)[0, 0]
    margins = []
    if not greedy:
        probs = np.asarray(probabilities(logits, adjust, greedy=False))[0, 0]
        key = jax.random.fold_in(jax.random.fold_in(state.row_keys[row], position), Stream.SHARED)
        with np.errstate(divide="ignore"):
            scores = np.log(probs) + np.asarray(jax.random.gumbel(key, probs.shape))
        # A cut of top-k or top-p that falls between nearly equal probabilities is a near-tie as well.
        whole = np.sort(np.asarray(jax.nn.softmax(logits[0, 0] / adjust.temperature)))[::-1]
        kept = int((probs > 0).sum())
        if kept < len(whole):
            before = whole[:kept].sum() / (whole[: int(adjust.top_k)].sum() if int(adjust.top_k) else 1)
            margins = [whole[kept - 1] - whole[kept], abs(before - float(adjust.top_p))]
    first, second = np.sort(scores)[::-1][:2]
    return min([float(first - second), *margins])


def assert_same_tokens(pair, state, reference, adjust, greedy):
    """Equality of every row; a difference is let pass only at a tie of the reference, and each is listed."""
    ties = []
    for row, (ours, plain) in enumerate(zip(tiny.texts_of(state), tiny.texts_of(reference), strict=True)):
        if ours == plain:
            continue
        position = next((i for i, (a, b) in enumerate(zip(ours, plain, strict=False)) if a != b), None)
        assert position is not None, f"row {row} ends at {len(ours)} instead of {len(plain)}"
        width = gap(pair, (row, plain), position, reference, adjust, greedy)
        assert width < TIE, f"row {row}, position {position}: {ours[position]} for {plain[position]}, gap {width}"
        ties.append((row, position, width))
    for tie in ties:
        print("tie: row {}, position {}, gap {:.2g}".format(*tie))
    assert len(ties) <= BATCH // 50, ties


def compare_with_plain(pair, settings, drafts, rule, greedy, max_new=MAX_NEW):
    """Decodes plainly and with each (kind, gamma, draft is target), at each sampling setting."""
    rows = row_limits(pair.texts.shape[0], max_new)
    run = lambda plan, draft, adjust: tiny.decode(
        plan, pair.params, draft, pair.texts, pair.lengths, rows, eos=EOS, seed=3, adjust=adjust
    )
    drafted_with = lambda kind: own_params(kind, pair.target, pair.params, pair.draft_params)
    plans = [
        (pair.plan(kind, gamma, rule, greedy, max_new), pair.params if own else drafted_with(kind), own)
        for kind, gamma, own in drafts
    ]
    for adjust in settings:
        reference = run(pair.plan("ngram", 0, rule, greedy, max_new), None, adjust)
        emitted, last = np.asarray(reference.num_emitted), [text[-1] for text in tiny.texts_of(reference)]
        assert np.all((emitted == rows) | (np.isin(last, EOS) & (emitted < rows)))
        assert (emitted == rows).sum() > 20 and (emitted < rows).sum() > 20
        for plan, draft_params, own in plans:
            state = run(plan, draft_params, adjust)
            assert_same_tokens(pair, state, reference, adjust, greedy)
            calls, saved = np.asarray(state.statistics.target_calls), emitted > 0
            assert calls.sum() < emitted.sum(), "nothing was ever accepted"
            if own:
                assert np.all(calls[saved] == -(-emitted[saved] // (plan.gamma + 1)))


GREEDY, COUPLED = (
    [Sampling.of(0.0)],
    [Sampling.of(1.0), Sampling.of(0.7, top_k=6), Sampling.of(0.7, top_p=0.8)],
)
QUICK = [("model", 3, False), ("model", 3, True), ("ngram", 4, False), ("early_exit", 2, False)]


def test_greedy_speculative_equals_greedy_plain(pair):
    compare_with_plain(pair, GREEDY, QUICK, "lossless", True)


def test_coupled_equals_plain_decoding_with_the_same_noise(pair):
    compare_with_plain(pair, COUPLED, QUICK, "coupled", False)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["model", "ngram", "early_exit", "skip_layers", "medusa"])
@pytest.mark.parametrize("rule, settings", [("lossless", GREEDY), ("coupled", COUPLED)])
def test_every_gamma_equals_plain_decoding(pair, kind, rule, settings):
    # These two draft by steps that they share with the others, of which every gamma is tried.
    gammas = (4,) if kind in ("skip_layers", "medusa") else (1, 2, 3, 4, 5)
    compare_with_plain(pair, settings, [(kind, gamma, False) for gamma in gammas], rule, rule == "lossless")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["model", "ngram", "early_exit"])
def test_equality_holds_where_texts_outgrow_a_cache_prefix(pair, kind):
    texts, lengths = tiny.prompts(8, 96, 50, VOCAB)
    longer = dataclasses.replace(pair, texts=texts, lengths=lengths)
    assert kv_cache.prefixes(capacity_for(96, 96, 3))[0] < 96 + 96
    compare_with_plain(longer, [Sampling.of(1.0)], [(kind, 3, False)], "coupled", False, max_new=96)


@pytest.mark.slow
def test_prompts_of_one_token_decode_alike(pair):
    texts = jnp.arange(VOCAB, dtype=jnp.int32)[:, None]
    lengths = jnp.ones((VOCAB,), jnp.int32)
    short = dataclasses.replace(pair, texts=texts, lengths=lengths)
    greedy = Sampling.of(0.0)
    run = lambda plan, draft: tiny.decode(plan, pair.params, draft, texts, lengths, 10)
    reference = run(short.plan("ngram", 0, "lossless", True, 10), None)
    for kind in ("model", "ngram", "medusa"):
        state = run(
            short.plan(kind, 2, "lossless", True, 10), own_params(kind, pair.target, pair.params, pair.draft_params)
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
    assert inside > 20, "the draft is the target, so these rows ended in the middle of a block"


# --- planted faults of the cache -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class FaultyDecoder(Decoder):
    """A Decoder in name; being another class, it is compiled apart from the sound one."""

    fault: str


def _late(write):
    """Verification writes one slot late."""
    return lambda slots, new, start: write(slots, new, start + int(new.shape[2] == FAULT_GAMMA + 1))


def _keeps_refused(write):
    """Rolls back one slot too few: the pending token does not overwrite the refused one's slot."""

    def faulty(slots, new, start):
        if new.shape[2] != FAULT_GAMMA + 1:
            return write(slots, new, start)
        return write(slots, new[:, :, 1:], start + 1)

    return faulty


FAULT_GAMMA = 3
FAULTS = {"late": _late, "keeps refused": _keeps_refused}


@pytest.mark.parametrize("fault", FAULTS)
def test_equality_catches_an_off_by_one_rollback(pair, fault, monkeypatch):
    greedy = Sampling.of(0.0)
    run = lambda plan: tiny.decode(plan, pair.params, pair.params, pair.texts, pair.lengths, MAX_NEW, eos=EOS)
    reference = run(pair.plan("ngram", 0, "lossless", True))
    monkeypatch.setattr(kv_cache, "write", FAULTS[fault](kv_cache.write))
    faulty = dataclasses.replace(pair, target=FaultyDecoder(pair.target.config, fault))
    state = run(faulty.plan("ngram", FAULT_GAMMA, "lossless", True))
    with pytest.raises(AssertionError, match="row"):
        assert_same_tokens(pair, state, reference, greedy, True)
