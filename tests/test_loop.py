"""The decoding loop: its caches, its counts, what a row depends on, and what makes it compile again."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from lossless import blocks

from specjax.decoding import loop
from specjax.decoding.drafters.base import Context, Drafter, Prompts, Proposal
from specjax.decoding.drafters.states import NoDrafter, StatesDrafter
from specjax.decoding.plan import capacity_for
from specjax.decoding.prefill import PLAIN, PROMPT, compiled_prefill
from specjax.decoding.rules import Lossless
from specjax.decoding.sampling import Noise, Sampling, row_keys
from specjax.models.decoder import Decoder
from specjax.runtime.errors import UserError

SLOTS, MAX_NEW, BATCH, VOCAB = 6, 20, 8, 24


@pytest.fixture(scope="module")
def models():
    return tiny.target_and_draft()


def make_plan(models, kind, gamma, **changes):
    sizes = {"slots": SLOTS, "max_new": MAX_NEW, **changes}
    return tiny.plan(models[0], kind, tiny.drafter_options(kind, models[0]), gamma=gamma, **sizes)


# --- caches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [None, "model", "kangaroo", "medusa", "eagle3", "block_parallel"])
def test_no_state_in_bfloat16_grows_with_the_capacity_on_a_cpu(kind):
    """XLA would convert such an array to float32 and back in every block, to write a few columns of it."""
    target, params = tiny.decoder(1, compute_dtype="bfloat16")
    plan = tiny.plan(target, gamma=0, slots=SLOTS, max_new=MAX_NEW)
    adapter, draft_params = tiny.adapter(target)
    if kind is None:
        plan = dataclasses.replace(plan, drafter=StatesDrafter.of(NoDrafter(), 0, target, (1, 2)))
    else:
        options = tiny.drafter_options(kind, target, adapter=adapter)
        plan = tiny.plan(target, kind, options, gamma=2, slots=SLOTS, max_new=MAX_NEW)
        own = params if kind == "model" else draft_params
        draft_params = tiny.draft_params_of(kind, target, params, own)
    keys, texts = row_keys(0, jnp.arange(BATCH)), tiny.prompts(3, BATCH, SLOTS, VOCAB)
    state = loop.prefill(plan, params, draft_params, *texts, keys)
    long = [leaf.dtype for leaf in jax.tree.leaves(state) if plan.capacity in leaf.shape]
    assert jnp.float32 in long and jnp.bfloat16 not in long


@pytest.mark.parametrize("kind", ["model", "early_exit"])
def test_after_every_block_cached_logits_equal_those_of_the_uncached_forward(models, kind):
    target, params, draft_params = models
    gamma = 3
    plan = make_plan(models, kind, gamma)
    accepted, rows, prompts = set(), np.arange(BATCH)[:, None], tiny.prompts(3, BATCH, SLOTS, VOCAB)
    decoded = blocks(plan, params, draft_params, prompts, MAX_NEW, Sampling.of(1.0))
    for before, state, logits, proposal in decoded:
        live, at = ~np.asarray(before.done), np.asarray(before.lengths)[:, None] - 1 + np.arange(gamma + 1)
        text = np.asarray(before.tokens).copy()  # the committed text and the draft
        text[rows, at[:, 1:]] = np.asarray(proposal.tokens)
        full = np.asarray(tiny.full_logits(target, params, jnp.asarray(text)))[rows, at]
        np.testing.assert_allclose(np.asarray(logits)[live], full[live], atol=1e-4)
        if kind == "model":
            drafted = tiny.full_logits(plan.drafter.model, draft_params, jnp.asarray(text))
        else:
            drafted = tiny.full_logits(target, params, jnp.asarray(text), layers=(0, plan.drafter.exit_layer))
        expected = np.asarray(jax.nn.softmax(drafted, axis=-1))[rows, at[:, :-1]]
        np.testing.assert_allclose(np.asarray(proposal.probs)[live], expected[live], atol=1e-4)
        accepted |= set((np.asarray(state.lengths) - at[:, 0] - 2)[live].tolist())
    assert accepted == set(range(gamma + 1)), "every number of accepted tokens has to occur"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ngram", pytest.param("model", marks=pytest.mark.slow)])
def test_rows_that_fill_the_capacity_lose_nothing(models, kind):
    """Every slot is used: spare slots leave the text unchanged, one slot fewer changes it."""
    texts = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (BATCH, SLOTS)), jnp.int32)
    lengths = jnp.full((BATCH,), SLOTS, jnp.int32)
    run = lambda spare: tiny.texts_of(
        tiny.decode(make_plan(models, kind, 3, spare=spare), *models[1:], texts, lengths, MAX_NEW)
    )
    tight = run(0)
    assert [len(text) for text in tight] == [SLOTS + MAX_NEW] * BATCH
    assert tight == run(64)
    assert tight != run(-1), "the capacity is larger than it need be, or clamping goes unnoticed"


def test_prompts_longer_than_the_cache_are_refused(models):
    plan = dataclasses.replace(make_plan(models, "ngram", 2), capacity=SLOTS - 1)
    texts, lengths = tiny.prompts(0, 2, SLOTS, VOCAB)
    with pytest.raises(ValueError, match="do not fit"):
        loop.prefill(plan, models[1], None, texts, lengths, row_keys(0, jnp.arange(2)))


@pytest.mark.slow
def test_decoding_leaves_the_callers_arrays_alive(models):
    texts, lengths = tiny.prompts(3, BATCH, SLOTS, VOCAB)
    keys = row_keys(0, jnp.arange(BATCH))
    plan = make_plan(models, "model", 3)
    state = loop.prefill(plan, *models[1:], texts, lengths, keys)
    jax.block_until_ready(loop.run(plan, *models[1:], state, Sampling.of(1.0), tiny.limits(BATCH, MAX_NEW)))
    assert not any(x.is_deleted() for x in (texts, lengths, keys, *jax.tree.leaves(models[1:])))


# --- what a row may depend on --------------------------------------------------------------------------------------


KINDS = ("model", "ngram", "early_exit", "skip_layers", "medusa", "eagle3", "pard", "block_parallel")
EVERY_KIND = [KINDS[0], *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:])]


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_a_rows_text_does_not_depend_on_its_batch(models, kind):
    texts, lengths = tiny.prompts(3, BATCH, SLOTS, VOCAB)
    both = (models[1], tiny.draft_params_of(kind, *models))
    run = lambda texts, lengths, indices, **how: tiny.texts_of(
        tiny.decode(
            make_plan(models, kind, 3, **how),
            *both,
            texts,
            lengths,
            MAX_NEW,
            eos=(5,),
            seed=2,
            indices=indices,
        )
    )
    whole = run(texts, lengths, np.arange(BATCH))
    # Other slots, and other neighbours in half of them.
    order = np.random.default_rng(1).permutation(BATCH)
    moved, strangers = np.arange(BATCH) % 2 == 0, order + 100
    other_texts, other_lengths = tiny.prompts(8, BATCH, SLOTS, VOCAB)
    mixed = run(
        jnp.where(moved[:, None], texts[order], other_texts),
        jnp.where(moved, lengths[order], other_lengths),
        np.where(moved, order, strangers),
    )
    assert [mixed[i] for i in np.flatnonzero(moved)] == [whole[i] for i in order[moved]]
    # Alone, in a wider padding.
    wide = jnp.pad(texts, ((0, 0), (0, SLOTS)))
    for row in range(BATCH):
        assert run(wide[row : row + 1], lengths[row : row + 1], [row], slots=2 * SLOTS) == [whole[row]]


def test_a_rows_text_depends_on_its_index_and_the_seed(models):
    plan = make_plan(models, "model", 3)
    texts, lengths = tiny.prompts(3, BATCH, SLOTS, VOCAB)
    run = lambda **how: tiny.texts_of(tiny.decode(plan, *models[1:], texts, lengths, MAX_NEW, eos=(5,), **how))
    base = run(seed=2)
    assert all(a != b for a, b in zip(base, run(seed=3), strict=True))
    assert all(a != b for a, b in zip(base, run(seed=2, indices=np.arange(BATCH) + 50), strict=True))


# --- compilation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [EVERY_KIND[0], *EVERY_KIND[-2:]])
def test_one_compile_serves_every_prompt_length_and_every_traced_setting(models, kind):
    plan, both = make_plan(models, kind, 3), (models[1], tiny.draft_params_of(kind, *models))
    texts, lengths = tiny.prompts(3, BATCH, SLOTS, VOCAB)
    tiny.decode(plan, *both, texts, lengths, MAX_NEW, eos=(5,))
    compiled = compiled_prefill._cache_size(), loop.compiled_run._cache_size()
    for i, temperature in enumerate((0.3, 2.0)):
        texts, lengths = tiny.prompts(20 + i, BATCH, SLOTS, VOCAB)
        tiny.decode(plan, *both, texts, lengths, 3 + i, eos=(i,), seed=i, adjust=Sampling.of(temperature))
    equal_plan = make_plan(models, kind, 3)
    tiny.decode(equal_plan, *both, texts, lengths, np.arange(BATCH), eos=(1,))
    assert (compiled_prefill._cache_size(), loop.compiled_run._cache_size()) == compiled
    # A capacity that no other test uses, so that this has to compile.
    other = make_plan(models, "ngram", 0, spare=1 + KINDS.index(kind))
    tiny.decode(other, *both, texts, lengths, MAX_NEW, eos=(5,))
    assert (compiled_prefill._cache_size(), loop.compiled_run._cache_size()) == (compiled[0] + 1, compiled[1] + 1)


# --- counts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["model", "ngram"])
def test_the_counts_agree_with_the_origins_and_with_each_other(models, kind):
    plan = make_plan(models, kind, 3)
    texts, lengths = tiny.prompts(3, BATCH, SLOTS, VOCAB)
    state = tiny.decode(plan, *models[1:], texts, lengths, np.arange(BATCH) * 3, eos=(5,), seed=2)
    emitted, counts = np.asarray(state.num_emitted), jax.tree.map(np.asarray, state.statistics)
    # Block efficiency is 1 + the sum of CTAR(w), exactly and in each row.
    np.testing.assert_array_equal(emitted, counts.target_calls + counts.emitted_more_than.sum(-1))
    origins, width = np.asarray(state.origins) % len(loop.ORIGINS), np.arange(plan.capacity)[None]
    inside = (width >= np.asarray(lengths)[:, None]) & (width < np.asarray(state.lengths)[:, None])
    accepted = ((origins == loop.ACCEPTED) & inside).sum(-1)
    np.testing.assert_array_equal(accepted, counts.accepted_at.sum(-1))
    others = (np.isin(origins, (loop.RECOVERED, loop.BONUS)) & inside).sum(-1)
    assert np.all(others <= counts.target_calls)
    np.testing.assert_array_equal(accepted + others, emitted)
    assert np.all(origins[width < np.asarray(lengths)[:, None]] == PROMPT)
    assert np.all(counts.accepted_at <= counts.drafted_at)
    assert np.all(counts.drafted_at.sum(-1) <= counts.drafted)
    assert np.all(counts.drafted <= 3 * counts.target_calls)
    # A position is reached only where all earlier ones were accepted.
    assert np.all(counts.drafted_at[:, 1:] <= counts.accepted_at[:, :-1])
    assert emitted[0] == counts.target_calls[0] == counts.drafted[0] == 0, "row 0 may emit nothing"


def test_the_baselines_calls_are_its_emitted_tokens(models):
    plan = make_plan(models, "ngram", 0)
    texts, lengths = tiny.prompts(3, BATCH, SLOTS, VOCAB)
    state = tiny.decode(plan, models[1], None, texts, lengths, np.arange(BATCH) * 3, eos=(5,), seed=2)
    emitted = np.asarray(state.num_emitted)
    np.testing.assert_array_equal(np.asarray(state.statistics.target_calls), emitted)
    assert int(state.iterations) == emitted.max()
    for row, (start, end) in enumerate(zip(np.asarray(lengths), np.asarray(state.lengths), strict=True)):
        assert np.all(np.asarray(state.origins)[row, start:end] == PLAIN)


@pytest.mark.parametrize("fewest", [1000, 2], ids=["together", "last_half_in_half_the_rows"])
def test_sample_is_the_loop_without_a_drafter(models, monkeypatch, fewest):
    monkeypatch.setattr(loop, "_FEWEST_HALVED", fewest)
    target, params, _ = models
    texts, lengths = tiny.prompts(3, BATCH, SLOTS, VOCAB)
    keys = row_keys(2, jnp.arange(BATCH))
    tokens, ends = loop.sample(
        target,
        params,
        texts,
        lengths,
        keys,
        sampling=Sampling.of(1.0),
        greedy=False,
        max_new_tokens=MAX_NEW,
        eos_ids=(5,),
    )
    assert tokens.shape == (BATCH, SLOTS + MAX_NEW)
    state = tiny.decode(make_plan(models, "ngram", 0), params, None, texts, lengths, MAX_NEW, eos=(5,), seed=2)
    for row, text in enumerate(tiny.texts_of(state)):
        assert np.asarray(tokens)[row, : int(ends[row])].tolist() == text
        assert not np.asarray(tokens)[row, int(ends[row]) :].any()


# --- scripted model and drafter ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Counter(Decoder):
    """A target that predicts t + 1 after t. Its hidden state is the token; it needs no cache."""

    def start(self, params, prompts, lengths, capacity):
        return ()

    def extend(self, params, cache, inputs, positions, mask=None, *, layers=None):
        return inputs[..., None].astype(jnp.float32), cache

    def column_logits(self, params, hidden):
        return jax.nn.one_hot(hidden[..., 0].astype(jnp.int32) + 1, self.vocab_size)


COUNTER = Counter(tiny.config(vocab_size=20, layers=1))


@dataclasses.dataclass(frozen=True)
class Script(Drafter):
    """Proposes `blocks[b][k]` in the k-th block of row b."""

    blocks: tuple
    gamma: int

    def start(self, params, target_params, prompts: Prompts):
        return jnp.zeros((), jnp.int32)

    def propose(self, params, target_params, state, target_cache, context: Context):
        padded = [[(*block, *(0,) * self.gamma)[: self.gamma] for block in row] for row in self.blocks]
        tokens = jnp.asarray(padded, jnp.int32)[:, state]
        counts = jnp.asarray([[len(block) for block in row] for row in self.blocks], jnp.int32)[:, state]
        return Proposal(tokens, None, counts), state, target_cache

    def commit(self, params, state, outcome):
        return state + 1


def test_a_scripted_decode_gives_the_exact_tokens_origins_and_counts():
    blocks = (
        ((3, 9), (5, 6), (8, 9)),  # the loop's docstring; then all accepted; then cut at the limit of 6
        ((11,), (), (9, 9)),  # accepted; nothing drafted; rejected at once, EOS recovered
        ((15, 16), (0, 0), (0, 0)),  # EOS drafted and accepted inside a block
        ((0, 0), (0, 0), (0, 0)),  # may emit one token only
    )
    plan = loop.Plan(COUNTER, Script(blocks, 2), Lossless(), 2, capacity_for(3, 6, 2), True)
    texts = jnp.asarray([[0, 1, 2], [10, 0, 0], [13, 14, 0], [4, 0, 0]], jnp.int32)
    lengths = jnp.asarray([3, 1, 2, 1], jnp.int32)
    state = tiny.decode(plan, {}, (), texts, lengths, [6, 6, 6, 1], eos=(14, 15))
    assert tiny.texts_of(state) == [
        [0, 1, 2, 3, 4, 5, 6, 7, 8],
        [10, 11, 12, 13, 14],
        [13, 14, 15],
        [4, 5],
    ]
    p, a, r, b = PROMPT, loop.ACCEPTED, loop.RECOVERED, loop.BONUS
    codes, ends = np.asarray(state.origins), np.asarray(state.lengths)
    # Each recovered token also holds the number of drafted tokens of its block.
    assert [(row[:n] // len(loop.ORIGINS)).tolist() for row, n in zip(codes, ends, strict=True)] == [
        [0, 0, 0, 0, 2, 0, 0, 0, 0],
        [0, 0, 0, 0, 2],
        [0, 0, 0],
        [0, 2],
    ]
    origins = [(row[:n] % len(loop.ORIGINS)).tolist() for row, n in zip(codes, ends, strict=True)]
    assert origins == [[p, p, p, a, r, a, a, b, a], [p, a, b, b, r], [p, p, a], [p, r]]
    counts = jax.tree.map(np.asarray, state.statistics)
    np.testing.assert_array_equal(counts.target_calls, [3, 3, 1, 1])
    # What lies beyond EOS or the limit was not drafted: one of row 0's last block, one of row 2's, one of row 3's.
    np.testing.assert_array_equal(counts.drafted, [2 + 2 + 1, 1 + 0 + 1, 1, 1])
    np.testing.assert_array_equal(counts.drafted_at, [[3, 2], [2, 0], [1, 0], [1, 0]])
    np.testing.assert_array_equal(counts.accepted_at, [[3, 1], [1, 0], [1, 0], [0, 0]])
    np.testing.assert_array_equal(counts.emitted_more_than, [[2, 1], [1, 0], [0, 0], [0, 0]])
    assert int(state.iterations) == 3
    assert np.all(np.asarray(state.done))


def test_a_row_that_may_emit_nothing_is_left_as_it_was():
    plan = loop.Plan(COUNTER, None, Lossless(), 0, capacity_for(2, 2, 0), True)
    texts, lengths = jnp.asarray([[7, 8], [3, 0]], jnp.int32), jnp.asarray([2, 1], jnp.int32)
    state = tiny.decode(plan, {}, None, texts, lengths, [0, 2])
    assert tiny.texts_of(state) == [[7, 8], [3, 4, 5]]
    np.testing.assert_array_equal(np.asarray(state.statistics.target_calls), [0, 2])


# --- drafters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shortest, longest, drafted",
    [
        (
            1,
            2,
            [
                ([1, 2, 3, 4, 1, 2], [3, 4, 1]),
                ([1, 2, 7, 5, 2, 8, 1, 2], [7, 5, 2]),  # the longer match wins over the later one
                ([5, 2, 7, 6, 2, 8, 9, 2], [8, 9, 2]),  # of equal matches the latest
                ([1, 2, 3, 4], []),  # no match
                ([6, 6, 6], [6, 6, 6]),  # a match that overlaps the end continues its period
                ([9, 1, 2, 1, 2], [1, 2, 1]),
                ([0], []),  # the padding of a short text is not a match
            ],
        ),
        (2, 3, [([4, 2, 3, 2], []), ([0, 4, 2, 3, 4, 2], [3, 4, 2])]),  # a match of one token is too short
    ],
)
def test_ngram_copies_what_followed_the_longest_then_latest_match(models, shortest, longest, drafted):
    batch, slots = len(drafted), 12
    texts = jnp.asarray([text + [0] * (slots - len(text)) for text, _ in drafted], jnp.int32)
    lengths = jnp.asarray([len(text) for text, _ in drafted], jnp.int32)
    drafter = tiny.make_drafter("ngram", models[0], 3, {"shortest": shortest, "longest": longest})
    state = drafter.start(None, None, Prompts(texts, lengths, slots))
    noise = Noise(row_keys(0, jnp.arange(batch)), lengths, False, False)
    last_two, live = jnp.zeros((batch, 2), jnp.int32), jnp.ones((batch,), bool)
    context = Context(last_two, lengths, live, noise, Sampling.of(1.0), tokens=texts)
    proposal, _, _ = jax.jit(lambda state, context: drafter.propose(None, None, state, None, context))(state, context)
    assert proposal.probs is None
    counts = np.asarray(proposal.num_drafted)
    drafts = [row[:n].tolist() for row, n in zip(np.asarray(proposal.tokens), counts, strict=True)]
    assert drafts == [continuation for _, continuation in drafted]


class Cycle(Counter):
    """A target whose text repeats with a period of 3."""

    def column_logits(self, params, hidden):
        return jax.nn.one_hot((hidden[..., 0].astype(jnp.int32) + 1) % 3, self.vocab_size)


@pytest.mark.parametrize("gamma", [4, 8])
def test_ngram_drafts_gamma_tokens_of_a_text_with_a_shorter_period(gamma):
    target = Cycle(tiny.config(vocab_size=20, layers=1))
    plan = tiny.plan(target, "ngram", {"shortest": 2, "longest": 4}, gamma=gamma, slots=1, max_new=86, greedy=True)
    state = tiny.decode(plan, {}, (), jnp.zeros((1, 1), jnp.int32), jnp.ones((1,), jnp.int32), 86)
    # Without a match the first 4 tokens take 4 calls; after that every call emits gamma + 1.
    assert int(state.statistics.target_calls[0]) == 4 + -(-82 // (gamma + 1))


def test_bad_drafter_options_are_refused_in_one_sentence(models):
    target = models[0]
    for kind, gamma, options, message in (
        ("modle", 2, {}, "modle.*model"),
        ("ngram", -1, {"shortest": 1, "longest": 2}, "gamma.*-1"),
        ("ngram", 2, {"shortest": 3, "longest": 2}, "shortest=3"),
        ("early_exit", 2, {"exit_layer": 2}, "exit_layer.*1 .. 1.*2"),
    ):
        with pytest.raises(UserError, match=message):
            tiny.make_drafter(kind, target, gamma, options)
