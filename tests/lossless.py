"""Two checks of losslessness for any drafter: emitted tokens follow the target's distribution (chi-square), and under
noise shared with plain decoding they equal its tokens one by one."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
import tiny

from specjax.decoding import loop
from specjax.decoding.sampling import Sampling, Stream, probabilities, row_keys
from specjax.models.decoder import Decoder

# --- the distribution of emitted tokens ----------------------------------------------------------------------------

SMALL_VOCAB, NUM_EMITTED, NUM_ROWS, SMALL_GAMMA = 5, 3, 3000, 2
SMALL_PROMPTS, SMALL_LENGTHS = [[3, 0, 0, 0, 0, 0], [1, 2, 1, 2, 1, 0], [0, 4, 4, 0, 4, 4]], [1, 5, 6]


def small_target():
    """A target over five tokens, few enough to enumerate every continuation, and its parameters."""
    return tiny.decoder(0, vocab_size=SMALL_VOCAB)


def small_draft(vocab: int = SMALL_VOCAB):
    """A draft for `small_target` with one layer, and its parameters."""
    return tiny.decoder(9, vocab_size=vocab, layers=1)


def small_plan(target, kind, options, rule="lossless") -> loop.Plan:
    """The Plan with which `p_value` decodes its prompts."""
    slots, max_new = len(SMALL_PROMPTS[0]), NUM_EMITTED + 2
    return tiny.plan(target, kind, options, gamma=SMALL_GAMMA if kind else 0, slots=slots, max_new=max_new, rule=rule)


@functools.partial(jax.jit, static_argnums=0)
def text_probabilities(target, params, texts, adjust):
    """The adjusted distribution after every token of whole texts, from the uncached forward."""
    return probabilities(tiny.full_logits(target, params, texts), adjust, greedy=False)


def exact_distributions(target, params, adjust):
    """Probabilities `[prompts, V ** n]` of the next n tokens of each of SMALL_PROMPTS."""
    continuations = np.asarray(list(itertools.product(range(SMALL_VOCAB), repeat=NUM_EMITTED)))
    count, prompts = len(continuations), len(SMALL_PROMPTS)
    texts = np.pad(np.repeat(SMALL_PROMPTS, count, axis=0), ((0, 0), (0, NUM_EMITTED)))
    continuations = np.tile(continuations, (prompts, 1))
    at = np.repeat(SMALL_LENGTHS, count)[:, None] + np.arange(NUM_EMITTED)
    np.put_along_axis(texts, at, continuations, axis=1)
    probs = np.asarray(text_probabilities(target, params, jnp.asarray(texts, jnp.int32), adjust), np.float64)
    return probs[np.arange(len(texts))[:, None], at - 1, continuations].prod(axis=1).reshape(prompts, count)


def p_value(plan, params, draft_params, adjust, seed=0) -> float:
    """p of a chi-square test over all prompts: counts of the first n emitted tokens against the exact distribution.

    Rows of one prompt differ only in their keys. They run in a batch with rows of other lengths and limits.
    """
    batch = NUM_ROWS * len(SMALL_PROMPTS)
    texts = jnp.asarray(np.tile(SMALL_PROMPTS, (NUM_ROWS, 1)), jnp.int32)
    lengths = jnp.asarray(np.tile(SMALL_LENGTHS, NUM_ROWS), jnp.int32)
    max_new = NUM_EMITTED + np.arange(batch) % 3
    state = tiny.decode(plan, params, draft_params, texts, lengths, max_new, seed=seed, adjust=adjust)
    assert np.array_equal(np.asarray(state.num_emitted), max_new)
    emitted = np.asarray(state.tokens)[np.arange(batch)[:, None], np.asarray(lengths)[:, None] + np.arange(NUM_EMITTED)]
    cells = emitted @ SMALL_VOCAB ** np.arange(NUM_EMITTED)[::-1]
    statistic, freedom = 0.0, 0
    for i, joint in enumerate(exact_distributions(plan.target, params, adjust)):
        expected = joint * NUM_ROWS
        counts = np.bincount(cells[i :: len(SMALL_PROMPTS)], minlength=len(expected))
        assert counts[expected == 0].sum() == 0, "a token of probability 0 was emitted"
        one_statistic, one_freedom = chi_square(counts, expected)
        statistic, freedom = statistic + one_statistic, freedom + one_freedom
    return float(scipy.special.chdtrc(freedom, statistic))


def chi_square(counts, expected) -> tuple[float, int]:
    """The chi-square statistic and its degrees of freedom; cells that expect less than 5 are pooled."""
    large = expected >= 5
    pooled = np.append(expected[large], expected[~large].sum())
    seen = np.append(counts[large], counts[~large].sum())
    seen, pooled = seen[pooled > 1], pooled[pooled > 1]
    return float(((seen - pooled) ** 2 / pooled).sum()), len(pooled) - 1


# --- token for token -----------------------------------------------------------------------------------------------

VOCAB, BATCH, SLOTS, MAX_NEW = 24, 256, 12, 24
EOS = (3, 17)
TIE = 1e-5
GREEDY = [Sampling.of(0.0)]
COUPLED = [Sampling.of(1.0), Sampling.of(0.7, top_k=6), Sampling.of(0.7, top_p=0.8)]


@dataclasses.dataclass(frozen=True)
class Pair:
    """A target, parameters of a draft of the target's shape, and the prompts on which they are compared."""

    target: Decoder
    params: dict
    draft_params: dict
    texts: jax.Array
    lengths: jax.Array

    @classmethod
    def of(cls, target, params):
        """The draft's parameters are the target's with noise: they agree often, not always."""
        return cls(target, params, tiny.with_noise(params, 0.1), *tiny.prompts(0, BATCH, SLOTS, VOCAB))

    def plan(self, kind, gamma, rule, greedy, max_new=MAX_NEW, **options):
        """A Plan for these prompts; `options` are added to the drafter's usual ones (`tiny.drafter_options`)."""
        options = {**tiny.drafter_options(kind, self.target), **options}
        slots = self.texts.shape[1]
        return tiny.plan(
            self.target, kind, options, gamma=gamma, slots=slots, max_new=max_new, rule=rule, greedy=greedy
        )


def row_limits(batch: int, max_new: int) -> np.ndarray:
    """Uneven limits, 0 .. max_new; every fourth row has max_new."""
    limits = np.random.default_rng(5).integers(0, max_new + 1, batch)
    return np.where(np.arange(batch) % 4 == 0, max_new, limits)


def tie_gap(pair, row, text, position, state, adjust, greedy) -> float:
    """How close the plain decode's choice at `position` was: the gap of the two best scores (log-probabilities with
    their noise), or of the two sides of a top-k or top-p cut."""
    logits = tiny.full_logits(pair.target, pair.params, jnp.asarray([text[:position]], jnp.int32))[:, -1:]
    scores = np.asarray(logits)[0, 0]
    cut_gaps = []
    if not greedy:
        probs = np.asarray(probabilities(logits, adjust, greedy=False))[0, 0]
        key = jax.random.fold_in(jax.random.fold_in(state.row_keys[row], position), Stream.SHARED)
        with np.errstate(divide="ignore"):
            scores = np.log(probs) + np.asarray(jax.random.gumbel(key, probs.shape, mode="high"))
        # A cut of top-k or top-p that falls between nearly equal probabilities is a near-tie as well.
        uncut = np.sort(np.asarray(jax.nn.softmax(logits[0, 0] / adjust.temperature)))[::-1]
        support = int((probs > 0).sum())
        if support < len(uncut):
            mass = uncut[:support].sum() / (1 if adjust.top_k is None else uncut[: int(adjust.top_k)].sum())
            top_p = 1.0 if adjust.top_p is None else float(adjust.top_p)
            cut_gaps = [uncut[support - 1] - uncut[support], abs(mass - top_p)]
    first, second = np.sort(scores)[::-1][:2]
    return min([float(first - second), *cut_gaps])


def assert_same_tokens(pair, state, reference, adjust, greedy):
    """Every row equals the reference. A difference passes only where the reference has a tie, and is printed."""
    ties = []
    for row, (ours, plain) in enumerate(zip(tiny.texts_of(state), tiny.texts_of(reference), strict=True)):
        if ours == plain:
            continue
        position = next((i for i, (a, b) in enumerate(zip(ours, plain, strict=False)) if a != b), None)
        assert position is not None, f"row {row} ends at {len(ours)} instead of {len(plain)}"
        gap = tie_gap(pair, row, plain, position, reference, adjust, greedy)
        assert gap < TIE, f"row {row}, position {position}: {ours[position]} for {plain[position]}, gap {gap}"
        ties.append((row, position, gap))
    for tie in ties:
        print("tie: row {}, position {}, gap {:.2g}".format(*tie))
    assert len(ties) <= BATCH // 50, ties


def compare_with_plain(pair, settings, drafts, rule, max_new=MAX_NEW):
    """Decodes plainly and with every draft, at each sampling setting, and asserts equal tokens.

    Args:
      drafts: (plan, draft parameters, changes of the sampling setting) of each draft.
    Yields:
      (plan, state) of each speculative decode, for assertions about its counts.
    """
    limits, greedy = row_limits(pair.texts.shape[0], max_new), rule != "coupled"
    decode = lambda plan, draft_params, adjust: tiny.decode(
        plan, pair.params, draft_params, pair.texts, pair.lengths, limits, eos=EOS, seed=3, adjust=adjust
    )
    plain_plan = pair.plan("ngram", 0, rule, greedy, max_new)
    for adjust in settings:
        reference = decode(plain_plan, None, adjust)
        emitted, last = np.asarray(reference.num_emitted), [text[-1] for text in tiny.texts_of(reference)]
        assert np.all((emitted == limits) | (np.isin(last, EOS) & (emitted < limits)))
        assert (emitted == limits).sum() > 20 and (emitted < limits).sum() > 20
        for plan, draft_params, changes in drafts:
            state = decode(plan, draft_params, dataclasses.replace(adjust, **changes))
            assert_same_tokens(pair, state, reference, adjust, greedy)
            calls = int(state.statistics.target_calls.sum())
            assert calls < emitted.sum(), "nothing was ever accepted"
            yield plan, state


# --- one block -----------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def one_block(plan, params, draft_params, state, limits, adjust):
    """`loop.block` that also returns the target's logits and the proposal: (state, logits, proposal)."""
    proposal, state = loop.propose(plan, params, draft_params, state, adjust)
    logits, cache, taps = loop.verify(plan, params, state.target_cache, state.pending, state.lengths, proposal)
    state = dataclasses.replace(state, target_cache=cache)
    state = loop.accept_and_commit(plan, draft_params, state, proposal, logits, taps, adjust, limits)
    return state, logits, proposal


def blocks(plan, params, draft_params, prompts, max_new, adjust):
    """Decodes block by block. Yields (state before the block, state after it, the target's logits, the proposal)."""
    batch = prompts[0].shape[0]
    limits = tiny.limits(batch, max_new)
    state = loop.prefill(plan, params, draft_params, *prompts, row_keys(4, jnp.arange(batch)))
    while not np.all(np.asarray(state.done)):
        before = state
        state, logits, proposal = one_block(plan, params, draft_params, before, limits, adjust)
        yield before, state, logits, proposal
