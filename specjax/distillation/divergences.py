"""Divergences between the next-token distributions of target and draft, one function each.

Every function takes the target's and the draft's logits `[B, T, V]`, computes in float32, and returns one value for
each position, `[B, T]`; the objective masks and averages them. P are the target's probabilities and Q the draft's.
Sources: DistillSpec (arXiv 2310.08461) and GKD (arXiv 2306.13649) compare the first four; LK losses (arXiv 2602.23881)
introduce the last two. A probability that underflows adds 0 to the value, and the gradient stays finite.

A user's own divergence is a function of this signature, named "path/to/file.py:name" in a config. Its parameters are
keyword-only, as `beta` of `jsd` is.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from specjax.runtime.errors import UserError, nearest
from specjax.runtime.extensions import named

# Hard labels: the negative log-likelihood of the batch's own tokens. It needs no target, so it is not a divergence.
CROSS_ENTROPY = "cross_entropy"

Logits = Float[Array, "B T V"]


@dataclasses.dataclass(frozen=True)
class Divergence:
    """A divergence with its parameters: a function of (target_logits, draft_logits).

    Attributes:
      name: by which a config names it.
      function: takes the logits, and the parameters by keyword.
      parameters: pairs of name and value.
    """

    name: str
    function: Callable[..., Float[Array, "B T"]]
    parameters: tuple[tuple[str, Any], ...] = ()

    def __call__(self, target_logits: Logits, draft_logits: Logits) -> Float[Array, "B T"]:
        return self.function(target_logits, draft_logits, **dict(self.parameters))


def forward_kl(target_logits: Logits, draft_logits: Logits) -> Float[Array, "B T"]:
    """KL(P || Q) = sum_v P log(P / Q): covers the target's modes.

    Up to a constant it is the cross-entropy of soft labels.
    """
    return _kl(_log_probs(target_logits), _log_probs(draft_logits))


def reverse_kl(target_logits: Logits, draft_logits: Logits) -> Float[Array, "B T"]:
    """KL(Q || P) = sum_v Q log(Q / P): seeks the target's modes."""
    return _kl(_log_probs(draft_logits), _log_probs(target_logits))


def jsd(target_logits: Logits, draft_logits: Logits, *, beta: float) -> Float[Array, "B T"]:
    """beta KL(P || M) + (1 - beta) KL(Q || M) with M = beta P + (1 - beta) Q (generalised Jensen-Shannon).

    As beta goes to 0, `jsd / beta` goes to KL(P || Q); as it goes to 1, `jsd / (1 - beta)` goes to KL(Q || P). The
    value is at most the entropy of (beta, 1 - beta). The weights are GKD's; some libraries swap beta and 1 - beta.

    Raises:
      UserError: if beta is not strictly between 0 and 1.
    """
    if not 0 < beta < 1:
        raise UserError(
            f"jsd with beta {beta} is not defined or 0 everywhere; choose 0 < beta < 1, or the divergence "
            '"forward_kl" (its limit at beta 0) or "reverse_kl" (at beta 1)'
        )
    target_log_probs, draft_log_probs = _log_probs(target_logits), _log_probs(draft_logits)
    mixture = jnp.logaddexp(target_log_probs + jnp.log(beta), draft_log_probs + jnp.log1p(-beta))
    return beta * _kl(target_log_probs, mixture) + (1 - beta) * _kl(draft_log_probs, mixture)


def total_variation(target_logits: Logits, draft_logits: Logits) -> Float[Array, "B T"]:
    """1/2 sum_v |P - Q| = 1 - sum_v min(P, Q): the probability that lossless decoding rejects a drafted token.

    Source of the identity: Leviathan et al. (arXiv 2211.17192), section 3.
    """
    difference = jax.nn.softmax(_wide(target_logits)) - jax.nn.softmax(_wide(draft_logits))
    return 0.5 * jnp.sum(jnp.abs(difference), axis=-1)


def acceptance(target_logits: Logits, draft_logits: Logits) -> Float[Array, "B T"]:
    """sum_v min(P, Q): the probability that lossless decoding at temperature 1 accepts a drafted token."""
    target_probs, draft_probs = jax.nn.softmax(_wide(target_logits)), jax.nn.softmax(_wide(draft_logits))
    return jnp.sum(jnp.minimum(target_probs, draft_probs), axis=-1)


def negative_log_acceptance(target_logits: Logits, draft_logits: Logits) -> Float[Array, "B T"]:
    """-log sum_v min(P, Q). Its gradient is that of total variation / acceptance, so it stays large if P and Q differ.

    If the target gives all probability to one token, it equals the cross-entropy.
    """
    target_log_probs, draft_log_probs = _log_probs(target_logits), _log_probs(draft_logits)
    return -jax.nn.logsumexp(jnp.minimum(target_log_probs, draft_log_probs), axis=-1)


def lk_hybrid(target_logits: Logits, draft_logits: Logits, *, weight: float | None = None) -> Float[Array, "B T"]:
    """w KL(P || Q) + (1 - w) TV(P, Q) with w = exp(-3 sum_v min(P, Q)) at each position.

    It is nearly the KL at low acceptance, and mostly total variation at high acceptance. No gradient flows through w.
    The factor 3 is the paper's best setting.

    Args:
      weight: a fixed w in [0, 1] instead. DSpark trains block-parallel drafts with w = 0.1 and labels in place of P in
        the first term.

    Raises:
      UserError: for a weight out of range.
    """
    if weight is None:
        weight = jnp.exp(-_ETA * jax.lax.stop_gradient(acceptance(target_logits, draft_logits)))
    elif not 0 <= weight <= 1:
        raise UserError(f"the weight of lk_hybrid is {weight}; it must lie in [0, 1]")
    kl, distance = forward_kl(target_logits, draft_logits), total_variation(target_logits, draft_logits)
    return weight * kl + (1 - weight) * distance


_ETA = 3.0
_LOWEST = -1e30

# Divergences that are finite where the draft has probability 0 and the target does not; see `objective`.
FINITE = ("reverse_kl", "jsd", "total_variation", "negative_log_acceptance")

DIVERGENCES = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "total_variation": total_variation,
    "negative_log_acceptance": negative_log_acceptance,
    "lk_hybrid": lk_hybrid,
}


def divergence(name: str | Callable, **parameters: Any) -> Divergence | None:
    """The divergence called `name` with its parameters; None for "cross_entropy" (hard labels).

    Args:
      name: a key of `DIVERGENCES`, "cross_entropy", "path/to/file.py:name" of a user's own function, or the function.
      parameters: keyword-only parameters of the function, such as `beta` of "jsd".

    Raises:
      UserError: for an unknown name, an unknown or missing parameter, a parameter out of range, and a function that
        does not return one value for each position.
    """
    known = _parameters(name)
    for parameter in parameters:
        if parameter not in known:
            raise UserError(f'{parameter} is not a parameter of divergence "{name}"{nearest(parameter, known)}')
    for parameter, details in known.items():
        if parameter not in parameters and details.default is inspect.Parameter.empty:
            raise UserError(f'divergence "{name}" needs {parameter}; set loss.{parameter}')
    if name == CROSS_ENTROPY:
        return None
    bound = Divergence(str(name), _function(name), tuple(parameters.items()))
    logits = jax.ShapeDtypeStruct((2, 3, 5), jnp.float32)
    returned = jax.eval_shape(lambda *logits: bound.function(*logits, **parameters), logits, logits)
    if getattr(returned, "shape", None) != (2, 3):
        raise UserError(f'divergence "{name}" must return an array [B, T] for logits [B, T, V], not {returned}')
    return bound


# Keys of a config's `loss` section that are no parameters of a divergence.
_SETTINGS = ("divergence", "refused", "temperature", "chunk", "selected", "reference", "balance", "anchors")


def of_config(loss: Any, key: str = "divergence") -> Divergence | None:
    """The divergence that a key of a config's `loss` section names, with the section's other keys as its parameters.

    `beta`, which every config has, is ignored if the divergence does not have this parameter.

    Args:
      key: "divergence", or "refused", which ignores parameters of the former that it does not have.

    Raises:
      UserError: as `divergence` does.
    """
    values = {name: loss[name] for name in loss if name not in _SETTINGS}
    known = _parameters(loss[key])
    optional = ("beta",) if key == "divergence" else tuple(values)
    return divergence(loss[key], **{name: x for name, x in values.items() if name in known or name not in optional})


def _function(name: str | Callable) -> Callable:
    return name if callable(name) else named(name, {**DIVERGENCES, CROSS_ENTROPY: lambda *logits: None}, "divergence")


def _parameters(name: str | Callable) -> dict[str, inspect.Parameter]:
    """Keyword-only parameters by name."""
    parameters = inspect.signature(_function(name)).parameters.items()
    return {key: details for key, details in parameters if details.kind is inspect.Parameter.KEYWORD_ONLY}


def _wide(logits: Logits) -> Logits:
    return logits.astype(jnp.float32)


def _log_probs(logits: Logits) -> Logits:
    # Finite: a token with a logit of -inf in both distributions would give inf - inf. Its product with the weight of a
    # position is finite too, which the gradient multiplies by a probability of 0.
    return jnp.maximum(jax.nn.log_softmax(_wide(logits)), _LOWEST)


def _kl(log_probs: Logits, other: Logits) -> Float[Array, "B T"]:
    return jnp.sum(jnp.exp(log_probs) * (log_probs - other), axis=-1)
