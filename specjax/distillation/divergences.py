"""How far the draft's next-token law is from the target's: one function per divergence, per position.

Every function takes logits `[B, T, V]`, works in float32, and returns `[B, T]`, unreduced: masking and
averaging are the objective's. P are the target's probabilities and Q the draft's (the papers' p and q).
Sources: DistillSpec (arXiv 2310.08461) and GKD (arXiv 2306.13649), which compare the first four; LK losses
(arXiv 2602.23881) for the last two. A probability that underflows contributes 0 to the value, and nothing that is not
finite to the gradient.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from specjax.runtime.errors import UserError, nearest

Logits = Float[Array, "B T V"]
Divergence = Callable[[Logits, Logits], Float[Array, "B T"]]


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

    It goes to 0 at both ends, there `jsd / beta` to KL(P || Q) and `jsd / (1 - beta)` to KL(Q || P), and is
    bounded by the entropy of (beta, 1 - beta). The weights are GKD's; some libraries turn beta round.

    Raises:
      UserError: where beta is not strictly between 0 and 1.
    """
    _check_beta(beta)
    target_log_probs, draft_log_probs = _log_probs(target_logits), _log_probs(draft_logits)
    mixture = jnp.logaddexp(target_log_probs + jnp.log(beta), draft_log_probs + jnp.log1p(-beta))
    return beta * _kl(target_log_probs, mixture) + (1 - beta) * _kl(draft_log_probs, mixture)


def total_variation(target_logits: Logits, draft_logits: Logits) -> Float[Array, "B T"]:
    """1/2 sum_v |P - Q| = 1 - sum_v min(P, Q): how likely lossless decoding is to reject a drafted token.

    Source of the identity: Leviathan et al. (arXiv 2211.17192), section 3.
    """
    difference = jax.nn.softmax(_wide(target_logits)) - jax.nn.softmax(_wide(draft_logits))
    return 0.5 * jnp.sum(jnp.abs(difference), axis=-1)


def acceptance(target_logits: Logits, draft_logits: Logits) -> Float[Array, "B T"]:
    """sum_v min(P, Q): the probability that lossless decoding at temperature 1 accepts a drafted token."""
    target_probs, draft_probs = jax.nn.softmax(_wide(target_logits)), jax.nn.softmax(_wide(draft_logits))
    return jnp.sum(jnp.minimum(target_probs, draft_probs), axis=-1)


def negative_log_acceptance(target_logits: Logits, draft_logits: Logits) -> Float[Array, "B T"]:
    """-log sum_v min(P, Q): total variation's gradient over the acceptance, so that it does not vanish from afar.

    Against a target that is sure of one token it is the cross-entropy.
    """
    target_log_probs, draft_log_probs = _log_probs(target_logits), _log_probs(draft_logits)
    return -jax.nn.logsumexp(jnp.minimum(target_log_probs, draft_log_probs), axis=-1)


def lk_hybrid(target_logits: Logits, draft_logits: Logits) -> Float[Array, "B T"]:
    """w KL(P || Q) + (1 - w) TV(P, Q) with w = exp(-3 sum_v min(P, Q)), position by position.

    Far from the target it is nearly the KL, near it mostly total variation. No gradient flows through w; the 3 is the
    paper's best setting.
    """
    weight = jnp.exp(-_ETA * jax.lax.stop_gradient(acceptance(target_logits, draft_logits)))
    kl, distance = forward_kl(target_logits, draft_logits), total_variation(target_logits, draft_logits)
    return weight * kl + (1 - weight) * distance


_ETA = 3.0

DIVERGENCES = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "total_variation": total_variation,
    "negative_log_acceptance": negative_log_acceptance,
    "lk_hybrid": lk_hybrid,
}


def divergence(name: str, beta: float) -> Divergence:
    """The divergence called `name`; `beta` is read by `jsd` alone.

    Raises:
      UserError: for a name that is none, and for a degenerate beta of `jsd`.
    """
    if name not in DIVERGENCES:
        raise UserError(f'unknown divergence "{name}"{nearest(name, [*DIVERGENCES, "cross_entropy"])}')
    if name != "jsd":
        return DIVERGENCES[name]
    _check_beta(beta)
    return functools.partial(jsd, beta=beta)


def _check_beta(beta: float) -> None:
    if not 0 < beta < 1:
        raise UserError(
            f"jsd with beta {beta} is not defined or 0 everywhere; choose 0 < beta < 1, or the divergence "
            '"forward_kl" (its limit at beta 0) or "reverse_kl" (at beta 1)'
        )


def _wide(logits: Logits) -> Logits:
    return logits.astype(jnp.float32)


def _log_probs(logits: Logits) -> Logits:
    # Finite, so that a token which neither law has (a logit of -inf in both) gives no inf - inf.
    return jnp.maximum(jax.nn.log_softmax(_wide(logits)), jnp.finfo(jnp.float32).min)


def _kl(log_probs: Logits, other: Logits) -> Float[Array, "B T"]:
    return jnp.sum(jnp.exp(log_probs) * (log_probs - other), axis=-1)
