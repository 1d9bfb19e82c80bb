"""Output distributions of rules by enumeration: every draft, acceptance and recovered token of small random models."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from specjax.decoding.drafters.base import Proposal
from specjax.decoding.sampling import Noise, Stream

EMITTED = 3  # tokens whose joint distribution is compared by default


class EnumeratedNoise(Noise):
    """Returns the uniforms passed in and records the weights of the next draw."""

    __setattr__ = object.__setattr__

    def __init__(self, uniforms):
        self.values = uniforms
        self.greedy = False
        self.weights = None

    def uniforms(self, count):
        assert count == self.values.shape[1]
        return self.values

    def choose(self, weights, offsets, stream):
        assert self.weights is None and stream == Stream.RECOVER
        self.weights, self.offsets = weights, offsets
        return jnp.zeros(weights.shape[:1], jnp.int32)


class Outcomes(Noise):
    """Enumerates whether each comparison `uniforms < threshold` holds, and records the thresholds: so no threshold has
    to lie on a grid."""

    __setattr__ = object.__setattr__

    def __init__(self, holds):
        self.values, self.greedy, self.weights = holds, False, None

    def uniforms(self, count):
        return self

    def __mul__(self, factor):
        self.factor = factor
        return self

    def __lt__(self, threshold):
        self.threshold = threshold / getattr(self, "factor", 1)
        return self.values > 0

    choose = EnumeratedNoise.choose


class Tables:
    """A random target and draft: one distribution for each context (a tuple of tokens).

    Targets are multiples of 1/8 and drafts powers of two, so that every acceptance threshold lies on the grid.
    """

    def __init__(self, seed: int, vocab: int, gamma: int, mixed: bool):
        self.random = np.random.default_rng(seed)
        self.vocab, self.gamma, self.mixed = vocab, gamma, mixed
        self.drawn = {}

    def _draw(self):
        eighths = self.random.multinomial(8, self.random.dirichlet(np.full(self.vocab, 0.7)))
        shapes = {3: [(4, 2, 2), (4, 4, 0)], 4: [(4, 2, 1, 1), (2, 2, 2, 2), (4, 4, 0, 0)]}[self.vocab]
        draft = self.random.permutation(shapes[self.random.integers(len(shapes))])
        # How many are drafted may depend on the context, never on the token it discards.
        count = self.random.integers(self.gamma + 1) if self.mixed else self.gamma
        return eighths / 8, draft / 8, int(self.random.integers(self.vocab)), int(count)

    def grid(self, one_hot: bool) -> np.ndarray:
        """Uniforms that represent [0, 1): thresholds are grid points, so exactly the right share lies below each."""
        count = 8 if one_hot or self.vocab == 4 else 4
        return np.arange(count) / count

    def at(self, context):
        if context not in self.drawn:
            self.drawn[context] = self._draw()
        return self.drawn[context]

    def target(self, context):
        return self.at(context)[0]

    def target_distribution(self, context, count):
        """The target's joint distribution of the next `count` tokens, `[V] * count`."""
        if count == 0:
            return np.ones(())
        return np.stack(
            [self.target(context)[t] * self.target_distribution((*context, t), count - 1) for t in range(self.vocab)]
        )

    def draft(self, context, one_hot: bool = False):
        _, draft, argmax, _ = self.at(context)
        return np.eye(self.vocab)[argmax] if one_hot else draft

    def num_drafted(self, context):
        return self.at(context)[3]

    def block_probs(self, context, tokens):
        """The draft's distributions `[gamma, V]` of the block that starts at a context, given its drafted tokens."""
        return [self.at((*context, *tokens[:i]))[1] for i in range(self.gamma)]

    def paths(self, context, one_hot: bool):
        """Every draft from here with its probability, and how many of its tokens count."""
        num_drafted = self.num_drafted(context)
        for draft in itertools.product(range(self.vocab), repeat=num_drafted):
            chance = 1.0
            for i, token in enumerate(draft):
                chance *= self.draft((*context, *draft[:i]), one_hot)[token]
            if chance > 0:
                yield draft, chance, num_drafted


@dataclasses.dataclass
class Paths:
    """One row of the batch for each (context, draft, uniforms)."""

    contexts: list
    chances: list
    tokens: list
    probs: list
    counts: list
    uniforms: list
    targets: list


def enumerate_paths(tables: Tables, one_hot: bool, depth: int, grid: list[float]) -> Paths:
    """Every block that starts at a context of fewer than `depth` tokens, with all uniforms on `grid`."""
    gamma, vocab = tables.gamma, tables.vocab
    rows = Paths([], [], [], [], [], [], [])
    for length in range(depth):
        for context in itertools.product(range(vocab), repeat=length):
            for draft, chance, count in tables.paths(context, one_hot):
                filler = (vocab - 1,) * (gamma - count)  # entries that must be ignored, with probabilities that tempt
                followed = (*draft, *filler)
                before = [(*context, *followed[:i]) for i in range(gamma + 1)]
                # Uniforms past `count` must not matter; enumerating them all would only be slow.
                for uniforms in itertools.product(grid, repeat=count):
                    rows.contexts.append(context)
                    rows.chances.append(chance / len(grid) ** count)
                    rows.tokens.append(followed)
                    rows.probs.append(tables.block_probs(context, followed))
                    rows.counts.append(count)
                    rows.uniforms.append([*uniforms, *[0.0] * (gamma - count)])
                    rows.targets.append([tables.target(c) for c in before])
    return rows


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _outcome(rule, vocabulary, thresholds, uniforms, tokens, probs, counts, targets, leeway):
    """Of each row: accepted tokens, the next token's weights and its offset, and with `thresholds` these."""
    noise = (Outcomes if thresholds else EnumeratedNoise)(uniforms)
    accepted, _ = rule(noise, Proposal(tokens, probs, counts, vocabulary=vocabulary), targets, leeway)
    return accepted, noise.weights, noise.offsets, noise.threshold if thresholds else None


def block_distribution(
    rule,
    tables: Tables,
    one_hot: bool,
    *,
    depth: int = EMITTED,
    leeway=None,
    jitted: bool = True,
    vocabulary=None,
    thresholds: bool = False,
):
    """Outcomes of one block under `rule`: {(context, accepted tokens): chance of them with each next token, `[V]`},
    for every context of fewer than `depth` tokens. With a draft vocabulary the rule sees only its columns. With
    `thresholds` uniforms are not on a grid, see `Outcomes`."""
    gamma, vocab = tables.gamma, tables.vocab
    grid = [0.0, 1.0] if thresholds else tables.grid(one_hot).tolist()
    rows = enumerate_paths(tables, one_hot, depth, grid)
    columns = slice(None) if vocabulary is None else vocabulary.ids
    batch = len(rows.contexts)
    padded = 2 ** max(batch - 1, 255).bit_length()  # few shapes, so that few programs are compiled
    pad = lambda x: np.pad(x, [(0, padded - batch)] + [(0, 0)] * (x.ndim - 1))
    shaped = lambda x, *shape: pad(np.asarray(x, np.float32).reshape(batch, *shape))
    accepted, weights, offsets, threshold = (_outcome if jitted else _outcome.__wrapped__)(
        rule,
        vocabulary,
        thresholds,
        jnp.asarray(shaped(rows.uniforms, gamma)),
        jnp.asarray(shaped(rows.tokens, gamma), jnp.int32),
        None if one_hot else jnp.asarray(shaped(rows.probs, gamma, vocab)[..., columns]),
        jnp.asarray(shaped(rows.counts), jnp.int32),
        jnp.asarray(shaped(rows.targets, gamma + 1, vocab)),
        leeway,
    )
    accepted, weights, offsets = np.asarray(accepted)[:batch], np.asarray(weights, np.float64)[:batch], offsets[:batch]
    np.testing.assert_array_equal(accepted, np.asarray(offsets))  # the draw is keyed to the position it fills
    chances = np.asarray(rows.chances)
    if thresholds:
        # 0 / 0: this many tokens are never all that is accepted, so any chance will do.
        chance = np.nan_to_num(np.clip(np.asarray(threshold, np.float64)[:batch], 0, 1), nan=0.5)
        holds, counted = np.asarray(rows.uniforms) > 0, np.arange(gamma)[None] < np.asarray(rows.counts)[:, None]
        chances = chances * np.prod(np.where(counted, 2 * np.where(holds, chance, 1 - chance), 1), axis=1)
    next_probs = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    grouped = {}
    for i, context in enumerate(rows.contexts):
        key = (context, rows.tokens[i][: accepted[i]])
        total = grouped.setdefault(key, np.zeros(vocab))
        total += chances[i] * next_probs[i]
    return grouped


def mean_accepted(grouped) -> float:
    """Mean number of accepted tokens in the first block."""
    return sum(len(accepted) * chances.sum() for (context, accepted), chances in grouped.items() if context == ())


def emitted_distribution(grouped, vocab: int, count: int = EMITTED):
    """The joint distribution of the next `count` tokens, `[V] * count`, over consecutive blocks."""

    def joint_of(context, count):
        if count == 0:
            return np.ones(())
        joint = np.zeros((vocab,) * count)
        for (start, accepted), chances in grouped.items():
            if start != context:
                continue
            if len(accepted) >= count:
                joint[accepted[:count]] += chances.sum()
                continue
            for token in range(vocab):
                rest = count - len(accepted) - 1
                joint[(*accepted, token)] += chances[token] * joint_of((*context, *accepted, token), rest)
        return joint

    return joint_of((), count)


def composed_distribution(tables, accepted, recovered, count: int = EMITTED, one_hot: bool = False):
    """The joint distribution of the next tokens from a rule's formulas for one position, without running the rule.

    Args:
      accepted: (target, draft) -> for each token the chance that it is drafted and accepted.
      recovered: (target, draft) -> the distribution of the token that follows a rejection.
    """

    def block(context, count):
        return walk(context, tables.num_drafted(context), count)

    def walk(context, drafts_left, count):
        if count == 0:
            return np.ones(())
        target, draft = tables.target(context), tables.draft(context, one_hot)
        if drafts_left == 0:
            return np.stack([chance * block((*context, token), count - 1) for token, chance in enumerate(target)])
        accepts, follows = accepted(target, draft), recovered(target, draft)
        rejected = 1 - accepts.sum()
        return np.stack(
            [
                accepts[token] * walk((*context, token), drafts_left - 1, count - 1)
                + rejected * follows[token] * block((*context, token), count - 1)
                for token in range(len(target))
            ]
        )

    return block((), count)
