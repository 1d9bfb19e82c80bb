"""Laws of rules by enumeration: every draft, every acceptance, every recovered token of small random models."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from specjax.decoding.drafters.base import Proposal
from specjax.decoding.sampling import Noise, Stream

EMITTED = 3  # the joint law of so many tokens is compared, where nothing else is said


class EnumeratedNoise(Noise):
    """Hands out given uniforms and keeps the weights of the draw that follows."""

    __setattr__ = object.__setattr__

    def __init__(self, uniforms):
        self.given = uniforms
        self.weights = None

    def uniforms(self, count):
        assert count == self.given.shape[1]
        return self.given

    def choose(self, weights, offsets, stream):
        assert self.weights is None and stream == Stream.RECOVER
        self.weights, self.offsets = weights, offsets
        return jnp.zeros(weights.shape[:1], jnp.int32)


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
        """Uniforms that stand for all: every threshold lies on the grid, so each has exactly its share below."""
        count = 8 if one_hot or self.vocab == 4 else 4
        return np.arange(count) / count

    def at(self, context):
        if context not in self.drawn:
            self.drawn[context] = self._draw()
        return self.drawn[context]

    def target(self, context):
        return self.at(context)[0]

    def target_law(self, context, count):
        """The target's own joint law of the next `count` tokens, `[V] * count`."""
        if count == 0:
            return np.ones(())
        return np.stack(
            [self.target(context)[t] * self.target_law((*context, t), count - 1) for t in range(self.vocab)]
        )

    def draft(self, context, one_hot: bool = False):
        _, draft, argmax, _ = self.at(context)
        return np.eye(self.vocab)[argmax] if one_hot else draft

    def num_drafted(self, context):
        return self.at(context)[3]

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


def enumerate_paths(tables: Tables, one_hot: bool, depth: int) -> Paths:
    """Every block that starts at a context of fewer than `depth` tokens."""
    gamma, vocab = tables.gamma, tables.vocab
    grid = tables.grid(one_hot).tolist()
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
                    rows.probs.append([tables.at(c)[1] for c in before[:gamma]])
                    rows.counts.append(count)
                    rows.uniforms.append([*uniforms, *[0.0] * (gamma - count)])
                    rows.targets.append([tables.target(c) for c in before])
    return rows


def block_law(rule, tables: Tables, one_hot: bool, *, depth: int = EMITTED, leeway=None, jitted: bool = True):
    """What a block does by `rule`: {(context, accepted tokens): chance of it with each next token, `[V]`}.

    Of every context of fewer than `depth` tokens.
    """
    gamma, vocab = tables.gamma, tables.vocab
    rows = enumerate_paths(tables, one_hot, depth)
    batch = len(rows.contexts)
    shaped = lambda x, *shape: np.asarray(x, np.float32).reshape(batch, *shape)

    def outcome(uniforms, tokens, probs, counts, targets):
        noise = EnumeratedNoise(uniforms)
        accepted, _ = rule(noise, Proposal(tokens, probs, counts), targets, leeway)
        return accepted, noise.weights, noise.offsets

    accepted, weights, offsets = (jax.jit(outcome) if jitted else outcome)(
        jnp.asarray(shaped(rows.uniforms, gamma)),
        jnp.asarray(shaped(rows.tokens, gamma), jnp.int32),
        None if one_hot else jnp.asarray(shaped(rows.probs, gamma, vocab)),
        jnp.asarray(rows.counts, jnp.int32),
        jnp.asarray(shaped(rows.targets, gamma + 1, vocab)),
    )
    accepted, weights = np.asarray(accepted), np.asarray(weights, np.float64)
    np.testing.assert_array_equal(accepted, np.asarray(offsets))  # the draw is keyed to the position it fills
    next_law = weights / weights.sum(-1, keepdims=True)
    grouped = {}
    for i, context in enumerate(rows.contexts):
        key = (context, rows.tokens[i][: accepted[i]])
        total = grouped.setdefault(key, np.zeros(vocab))
        total += rows.chances[i] * next_law[i]
    return grouped


def mean_accepted(grouped) -> float:
    """Of the first block."""
    return sum(len(stood) * chances.sum() for (context, stood), chances in grouped.items() if context == ())


def emitted_law(grouped, vocab: int, count: int = EMITTED):
    """The joint law of the next `count` tokens, `[V] * count`, of blocks that follow one another."""

    def law(context, count):
        if count == 0:
            return np.ones(())
        joint = np.zeros((vocab,) * count)
        for (start, stood), chances in grouped.items():
            if start != context:
                continue
            if len(stood) >= count:
                joint[stood[:count]] += chances.sum()
                continue
            for token in range(vocab):
                rest = count - len(stood) - 1
                joint[(*stood, token)] += chances[token] * law((*context, *stood, token), rest)
        return joint

    return law((), count)


def composed_law(tables, accepted, recovered, count: int = EMITTED, one_hot: bool = False):
    """The same law from a rule's law of one position, worked out without the rule.

    Args:
      accepted: (target, draft) -> for each token the chance that it is drafted and accepted.
      recovered: (target, draft) -> the law of the token that follows a refusal.
    """

    def block(context, count):
        return walk(context, tables.num_drafted(context), count)

    def walk(context, drafts_left, count):
        if count == 0:
            return np.ones(())
        target, draft = tables.target(context), tables.draft(context, one_hot)
        if drafts_left == 0:
            return np.stack([chance * block((*context, token), count - 1) for token, chance in enumerate(target)])
        stands, follows = accepted(target, draft), recovered(target, draft)
        refused = 1 - stands.sum()
        return np.stack(
            [
                stands[token] * walk((*context, token), drafts_left - 1, count - 1)
                + refused * follows[token] * block((*context, token), count - 1)
                for token in range(len(target))
            ]
        )

    return block((), count)
