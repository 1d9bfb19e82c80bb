"""How many experts the tokens of a block use: the cost of a sparse target's verification depends on it.

A sparse model with E experts, of which a token uses k, reads only those that the tokens of a call choose. A plain step
reads k in each layer; a verification of gamma + 1 tokens reads up to k * (gamma + 1). So unlike with a dense target, it
costs more than a plain step even where memory bandwidth is the limit, and the best gamma is smaller.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from specjax.decoding import batch
from specjax.models.language_model import LanguageModel, Params


@dataclasses.dataclass(frozen=True)
class ExpertUse:
    """The distribution of a model's routers.

    Attributes:
      shares: of each sparse layer, the probability that a token uses each expert; a layer's sum is k.
    """

    shares: tuple[tuple[float, ...], ...]

    def touched(self, tokens: int | float) -> float:
        """Expected number of distinct experts in a layer that `tokens` tokens use, if they choose independently.

        The mean over layers of the sum over experts of 1 - (1 - share) ** tokens.
        """
        return float(np.mean(np.sum(1 - (1 - np.asarray(self.shares)) ** tokens, axis=-1)))


def uniform(model: LanguageModel) -> ExpertUse | None:
    """The use of a router that chooses all experts equally often; None for a dense model."""
    if not model.is_sparse:
        return None
    experts, per_token = model.config.experts, model.config.experts_per_token
    return ExpertUse(((per_token / experts,) * experts,))


def measured(model: LanguageModel, params: Params, texts: Sequence[Sequence[int]]) -> ExpertUse | None:
    """The use of experts in these texts; None for a dense model."""
    if not model.is_sparse:
        return None
    tokens, lengths = batch.pad(texts, max(map(len, texts)))

    @jax.jit
    def shares(params, tokens, lengths):
        mask = (jnp.arange(tokens.shape[1])[None] < lengths[:, None]).astype(jnp.float32)[..., None]
        _, logits = model.routed(params, tokens)
        chosen = [jax.lax.top_k(each, model.config.experts_per_token)[1] for each in logits]
        count = lambda each: jnp.sum(jax.nn.one_hot(each, model.config.experts).sum(-2) * mask, axis=(0, 1))
        return jnp.stack([count(each) for each in chosen]) / mask.sum()

    return ExpertUse(tuple(map(tuple, np.asarray(shares(params, tokens, lengths)).tolist())))
