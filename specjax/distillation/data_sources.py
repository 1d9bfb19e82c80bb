"""Sources of training text: the corpus, the draft (on-policy), the target, both decoding together, or a mixture.

As in DistillSpec (arXiv 2310.08461, algorithm 1 of its appendix), one source is drawn for each step. The draw and the
generated text are functions of (seed, step) and the parameters alone, so a resumed run repeats them.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key

from specjax.decoding import loop, sampling
from specjax.models.language_model import LanguageModel
from specjax.runtime.errors import UserError

FIXED, DRAFT, TARGET, ASSISTED = SOURCES = ("fixed", "draft", "target", "assisted")

# Separates these random numbers from others with the same seed.
_STREAM = 0x5EED


def fractions_of(config: Any) -> dict[str, float]:
    """The fraction of each source in a config's `data` section."""
    return {name: config[name] for name in SOURCES}


def check_fractions(fractions: Mapping[str, float], *, has_target: bool) -> None:
    """Raises UserError unless the fractions are >= 0 and sum to 1, and there is a target if its fraction is not 0."""
    stated = ", ".join(f"data.{name} {fractions[name]}" for name in SOURCES)
    if not all(fractions[name] >= 0 for name in SOURCES):
        raise UserError(f"the fractions of the data sources ({stated}) must not be negative")
    if abs(sum(fractions[name] for name in SOURCES) - 1) > 1e-6:
        raise UserError(f"the fractions of the data sources ({stated}) must sum to 1")
    for name in (TARGET, ASSISTED):
        if fractions[name] > 0 and not has_target:
            raise UserError(f"data.{name} is {fractions[name]} but there is no target: set `target`")


def source_of_step(fractions: Mapping[str, float], seed: int, step: int) -> str:
    """The source of this step's text, drawn with the probabilities `fractions` from (seed, step)."""
    weights = np.asarray([fractions[name] for name in SOURCES], np.float64)
    draw = np.random.default_rng([seed, _STREAM, step]).random()
    # A source of fraction 0 is never drawn, because its cumulative sum equals the preceding one.
    index = int(np.searchsorted(np.cumsum(weights) / weights.sum(), draw, side="right"))
    return SOURCES[index]


def prompt_width(prompt_lengths: Int[np.ndarray, "B"], narrow: int, wide: int) -> int:
    """The padded width of a batch of prompts: `narrow` times a power of 2, at most `wide`, so that few are compiled."""
    width = narrow
    while width < int(prompt_lengths.max()):
        width *= 2
    return min(width, wide)


def window(counted: int, columns: int) -> int:
    """How many columns of a row the heads run on, see `objective.Loss`; 0 for all.

    It is an eighth, a quarter or half of the row, or of a wide one three quarters, so that few programs are compiled.
    Rows are often cut at their longest text; the shares are of a multiple of 64, so that half of 253 columns holds 128.

    Args:
      counted: number of positions that the loss counts in the row with the most.
    """
    wide = columns > 64
    whole = -(-columns // 64) * 64 if wide else columns
    shares = [whole * eighths // 8 for eighths in (1, 2, 4, 6)[: 4 if wide else 3]]
    return next((share for share in shares if counted <= share), 0)


# Name of the array of a batch `[B]` with the step, so that a text that is seen again has other `drawn_positions`.
DRAWS = "draws"


def drawn_positions(
    tokens: Int[Array, "B T"], counts: Bool[Array, "B T"], number: int, draws: Int[Array, "B"] | None = None
) -> Int[Array, "B K"]:
    """Positions of each text in ascending order, as many as possible of those that count.

    They are drawn by a hash of the text and by `draws`, the step in training, so a resumed run draws the same ones, and
    a row does not depend on its batch.
    """
    hashes = jnp.sum(tokens * jnp.arange(1, tokens.shape[1] + 1, dtype=tokens.dtype)[None], axis=1)
    draws = jnp.zeros_like(hashes) if draws is None else draws

    def draw(row, step):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), row), step)
        return jax.random.uniform(key, tokens.shape[1:])

    scores = jnp.where(counts, jax.vmap(draw)(hashes, draws), -1.0)
    return jnp.sort(jax.lax.top_k(scores, number)[1], axis=1)


@dataclasses.dataclass(frozen=True)
class Generation:
    """Generates training text by continuing prompts with a model.

    Attributes:
      temperature: sampling temperature, unrelated to that of the loss; 0 is greedy.
      top_k: sample from the k most probable tokens; 0 is off.
      top_p: sample from the most probable tokens with this total probability; 1 is off.
      max_new_tokens: maximum number of new tokens per prompt.
      eos_ids: ids that end a row.
      seed: determines, with the step and the row, the row's random numbers.
    """

    temperature: float
    top_k: int
    top_p: float
    max_new_tokens: int
    eos_ids: Sequence[int]
    seed: int

    def __post_init__(self):
        sampling.Sampling.of(self.temperature, self.top_k, self.top_p)
        if self.max_new_tokens < 1:
            raise UserError(f"data.generation.max_new_tokens is {self.max_new_tokens}; there must be one to learn from")

    def __call__(
        self,
        params: dict,
        prompts: Int[Array, "B P"],
        lengths: Int[Array, "B"],
        step: Int[Array, ""],
        model: LanguageModel,
    ) -> dict[str, Int[Array, "..."]]:
        """Continues each prompt. Returns a batch (see `data.batches`) whose loss covers only the new tokens."""
        tokens, ends = loop.sample(
            model,
            params,
            prompts,
            lengths,
            self.row_keys(step, prompts.shape[0]),
            sampling=sampling.Sampling.of(self.temperature, self.top_k, self.top_p),
            greedy=self.temperature == 0,
            max_new_tokens=self.max_new_tokens,
            eos_ids=tuple(self.eos_ids),
        )
        texts, starts = model.start_texts(prompts, lengths)
        batch = {"tokens": tokens, "lengths": ends, "loss_start": starts, "prompt_lengths": lengths}
        return batch if texts is prompts else {**batch, "sources": prompts}

    def row_keys(self, step: Int[Array, ""], rows: int) -> Key[Array, "B"]:
        """The random keys of the rows of a step."""
        step_key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self.seed), _STREAM), step)
        return jax.vmap(jax.random.fold_in, (None, 0))(step_key, jnp.arange(rows))
