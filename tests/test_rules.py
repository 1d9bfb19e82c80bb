"""Output distributions of the exact rules, by enumeration of every draft, every acceptance and every recovered token.

Uniforms are enumerated on the grid j / G, 0 included, on which every acceptance threshold lies: then exactly the right
share of grid points is accepted, and only by `<`.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from enumeration import EMITTED, EnumeratedNoise, Tables, block_distribution, emitted_distribution, mean_accepted

from specjax.decoding.drafters.base import Proposal
from specjax.decoding.rules import Coupled, Lossless, rule_named
from specjax.decoding.sampling import Noise
from specjax.runtime.errors import UserError


def error_of(rule, tables, one_hot, **how):
    joint = emitted_distribution(block_distribution(rule, tables, one_hot, **how), tables.vocab)
    return np.abs(joint - tables.target_distribution((), EMITTED)).max()


CASES = [(3, gamma, mixed) for gamma in (0, 1, 2) for mixed in (False, True)] + [(4, 1, True), (4, 2, False)]


@pytest.mark.parametrize("one_hot", [False, True], ids=["sampled", "one_hot"])
@pytest.mark.parametrize("vocab, gamma, mixed", CASES)
def test_lossless_emits_exactly_the_targets_joint_distribution(vocab, gamma, mixed, one_hot):
    for seed in range(2):
        assert error_of(Lossless(), Tables(seed, vocab, gamma, mixed), one_hot) < 1e-6


@pytest.mark.parametrize("one_hot", [False, True], ids=["sampled", "one_hot"])
def test_lossless_emits_exactly_the_targets_joint_distribution_with_three_drafted_tokens(one_hot):
    for mixed in (False, True):
        assert error_of(Lossless(), Tables(7, 3, 3, mixed), one_hot) < 1e-6


def test_lossless_is_the_same_distribution_without_jit():
    assert error_of(Lossless(), Tables(3, 3, 2, True), False, jitted=False) < 1e-6


@pytest.mark.parametrize("one_hot", [False, True], ids=["sampled", "one_hot"])
def test_lossless_accepts_the_overlap_of_the_two_distributions(one_hot):
    for seed in range(4):
        tables = Tables(seed, 4, 1, False)
        target, draft = tables.target(()), tables.draft((), one_hot)
        assert mean_accepted(block_distribution(Lossless(), tables, one_hot)) == pytest.approx(
            np.minimum(target, draft).sum(), abs=1e-6
        )


class Stopping(Tables):
    """A draft that stops after a token drawn from an unsure distribution; with `peeks` it drops improbable tokens."""

    THRESHOLD = 0.4  # of vocabulary 4 one shape of draft lies below it, the others above

    def __init__(self, seed, gamma, peeks=False):
        super().__init__(seed, 4, gamma, False)
        self.peeks = peeks

    def paths(self, context, one_hot, draft=(), chance=1.0):
        probs = self.at((*context, *draft))[1] if len(draft) < self.gamma else np.zeros(0)
        if len(draft) == self.gamma:
            yield draft, chance, len(draft)
        for token in np.flatnonzero(probs):
            further, joint = (*draft, int(token)), chance * probs[token]
            if self.peeks and probs[token] < self.THRESHOLD:
                yield draft, joint, len(draft)
            elif not self.peeks and probs.max() < self.THRESHOLD:
                yield further, joint, len(further)
            else:
                yield from self.paths(context, one_hot, further, joint)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_stop_that_reads_distributions_leaves_the_distribution(seed):
    tables = Stopping(seed, 2)
    counts = {count for _, _, count in tables.paths((), False)}
    counts |= {count for token in range(4) for _, _, count in tables.paths((token,), False)}
    assert counts == {1, 2}
    assert error_of(Lossless(), tables, False) < 1e-6


def test_the_enumeration_catches_a_stop_that_looks_at_the_token_it_drops():
    assert error_of(Lossless(), Stopping(0, 2, peeks=True), False) > 1e-2


FAULTS = ["wrong residual", "unclipped residual", "no bonus", "<=", "counts all"]


def test_the_second_implementation_without_a_fault_is_exact():
    for one_hot in (False, True):
        assert error_of(tiny.Planted(""), Tables(1, 3, 2, True), one_hot) < 1e-6


@pytest.mark.parametrize("fault", FAULTS)
def test_the_enumeration_catches_a_planted_fault(fault):
    assert error_of(tiny.Planted(fault), Tables(1, 3, 2, True), False) > 1e-2


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault != "unclipped residual"])
def test_the_enumeration_catches_a_planted_fault_of_a_deterministic_draft(fault):
    assert error_of(tiny.Planted(fault), Tables(1, 3, 2, True), True) > 1e-2


def test_a_uniform_of_zero_never_accepts_a_token_of_target_probability_zero():
    target = jnp.asarray([[[0.0, 1.0, 0.0], [0.5, 0.5, 0.0]]])
    for probs in (None, jnp.asarray([[[0.5, 0.25, 0.25]]])):
        for token in (0, 2):
            noise = EnumeratedNoise(jnp.zeros((1, 1)))
            proposal = Proposal(jnp.asarray([[token]], jnp.int32), probs, jnp.asarray([1], jnp.int32))
            accepted, _ = Lossless()(noise, proposal, target, None)
            assert int(accepted[0]) == 0
            assert np.asarray(noise.weights)[0].argmax() == 1


def test_the_largest_uniform_accepts_a_draft_that_equals_the_target():
    probs = jax.nn.softmax(jax.random.normal(jax.random.key(0), (200, 1, 7)), axis=-1)
    largest = np.nextafter(np.float32(1), np.float32(0))
    for token in range(7):
        proposal = Proposal(jnp.full((200, 1), token, jnp.int32), probs, jnp.ones((200,), jnp.int32))
        noise = EnumeratedNoise(jnp.full((200, 1), largest))
        accepted, _ = Lossless()(noise, proposal, jnp.concatenate([probs, probs], axis=1), None)
        assert np.all(np.asarray(accepted) == 1)


def test_a_residual_empty_by_rounding_falls_back_to_the_target():
    target = jnp.asarray([[[0.25, 0.75], [0.5, 0.5]]])
    draft = jnp.asarray([[[0.5, 0.75]]])  # nowhere below the target, as rounding can leave it
    noise = EnumeratedNoise(jnp.asarray([[0.9]]))
    proposal = Proposal(jnp.zeros((1, 1), jnp.int32), draft, jnp.ones((1,), jnp.int32))
    accepted, _ = Lossless()(noise, proposal, target, None)
    assert int(accepted[0]) == 0
    np.testing.assert_array_equal(np.asarray(noise.weights), [[0.25, 0.75]])


def test_greedy_lossless_accepts_exactly_the_targets_argmax():
    one_hot = lambda *ids: jax.nn.one_hot(jnp.asarray([ids]), 5)
    noise = Noise(jax.random.split(jax.random.key(0), 1), jnp.asarray([4], jnp.int32), True, False)
    for draft, count, follows in (((2, 3), 2, 4), ((2, 1), 1, 3), ((0, 3), 0, 2)):
        proposal = Proposal(jnp.asarray([draft], jnp.int32), None, jnp.asarray([2], jnp.int32))
        accepted, token = Lossless()(noise, proposal, one_hot(2, 3, 4), None)
        assert (int(accepted[0]), int(token[0])) == (count, follows)


class PositionNoise(Noise):
    """Inverse-CDF draws from one enumerated grid value for each emitted position, shared by draft and target."""

    __setattr__ = object.__setattr__

    def __init__(self, values, lengths):
        self.values, self.lengths = values, lengths

    def choose(self, weights, offsets, stream):
        at = jnp.asarray(self.values, jnp.float32)[np.arange(len(self.lengths)), self.lengths + offsets]
        return jnp.sum(jnp.cumsum(weights, axis=-1) <= at[:, None], axis=-1, dtype=jnp.int32)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("gamma", [0, 1, 2, 3])
def test_coupled_emits_what_plain_decoding_with_its_noise_emits(gamma, mixed):
    tables = Tables(gamma, 3, gamma, mixed)
    # Every value of the noise at the positions compared; later ones (looked at, not compared) stay at one half.
    grid = np.asarray(list(itertools.product(np.arange(8) / 8 + 1 / 16, repeat=EMITTED)))
    values = np.concatenate([grid, np.full((len(grid), gamma + 1), 0.5)], axis=1)
    pick = lambda probs, value: int((np.cumsum(probs) <= value).sum())
    plain = []
    for row in values:
        text = ()
        for value in row[:EMITTED]:
            text = (*text, pick(tables.target(text), value))
        plain.append(text)
    texts, total_accepted = [()] * len(values), 0
    while min(map(len, texts)) < EMITTED:
        lengths = np.asarray([len(text) for text in texts])
        live = lengths < EMITTED
        lengths = np.minimum(lengths, EMITTED - 1)
        drafts, counts, targets = [], [], []
        for row, text in zip(values, texts, strict=True):
            text, draft = text[: EMITTED - 1] if len(text) >= EMITTED else text, ()
            for _ in range(gamma):
                before = (*text, *draft)
                draft = (*draft, pick(tables.at(before)[1], row[len(before)]))
            drafts.append(draft)
            counts.append(tables.at(text)[3])
            targets.append([tables.target((*text, *draft[:i])) for i in range(gamma + 1)])
        proposal = Proposal(
            jnp.asarray(drafts, jnp.int32).reshape(len(values), gamma), None, jnp.asarray(counts, jnp.int32)
        )
        accepted, follows = Coupled()(PositionNoise(values, lengths), proposal, jnp.asarray(targets, jnp.float32), None)
        accepted, follows = np.asarray(accepted), np.asarray(follows)
        assert np.all(accepted <= np.asarray(counts))
        total_accepted += accepted[live].sum()
        texts = [
            (*text, *draft[:count], int(token)) if alive else text
            for text, draft, count, token, alive in zip(texts, drafts, accepted, follows, live, strict=True)
        ]
    assert [text[:EMITTED] for text in texts] == plain
    assert gamma == 0 or total_accepted > 0
    law = np.zeros((3,) * EMITTED)
    for text in texts:
        law[text[:EMITTED]] += 1 / len(texts)
    np.testing.assert_allclose(law, tables.target_distribution((), EMITTED), atol=1e-9)


def test_an_unknown_rule_is_named_with_its_nearest():
    with pytest.raises(UserError, match="lossles.*lossless"):
        rule_named("lossles")
