"""Least squares from sums over texts, so that an attachment can start from a linear fit to the target's states."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# The penalty on a squared weight, as a fraction of its input's mean square.
_RIDGE = 1e-3


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments:
    """Weighted sums over positions of inputs x and goals y, in float32.

    Attributes:
      gram: sum of x x^T, `[F, F]`.
      cross: sum of x y^T, `[F, D]`.
      total: sum of x, `[F]`.
      count: sum of the weights, a scalar.
    """

    gram: Any
    cross: Any
    total: Any
    count: Any

    @classmethod
    def of(cls, inputs: Float[Array, "B T F"], goals: Float[Array, "B T D"], weights: Float[Array, "B T"]) -> "Moments":
        """The sums over texts; positions with weight 0 do not count, whatever their inputs are."""
        inputs, goals = (jnp.where(weights[..., None] > 0, x.astype(jnp.float32), 0) for x in (inputs, goals))
        product = functools.partial(jnp.einsum, "BTF,BTG->FG", precision="highest")
        weighted = inputs * weights[..., None]
        return cls(product(weighted, inputs), product(weighted, goals), jnp.sum(weighted, (0, 1)), jnp.sum(weights))

    def __add__(self, other: "Moments") -> "Moments":
        return jax.tree.map(jnp.add, self, other)

    def means(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`gram`, `cross` and `total` for each unit of weight, in float64."""
        count = max(float(self.count), 1.0)
        return tuple(np.asarray(each, np.float64) / count for each in (self.gram, self.cross, self.total))


def ridge(
    gram: Float[np.ndarray, "F F"], cross: Float[np.ndarray, "F D"], widths: tuple[int, ...]
) -> Float[np.ndarray, "F D"]:
    """The matrix W that minimises the mean of |x W - y|^2 with a small penalty on its entries.

    Args:
      gram: mean of x x^T.
      cross: mean of x y^T.
      widths: x consists of parts with these numbers of entries; the penalty is relative to the mean square of a part,
        so that the scale of a part does not matter.
    """
    penalties, first = [], 0
    for width in widths:
        square = np.trace(gram[first : first + width, first : first + width]) / width
        penalties.append(np.full(width, _RIDGE * square + np.finfo(np.float32).tiny))
        first += width
    return np.linalg.solve(gram + np.diag(np.concatenate(penalties)), cross)


def low_rank(
    matrix: Float[np.ndarray, "F D"], gram: Float[np.ndarray, "F F"], rank: int
) -> tuple[Float[np.ndarray, "F R"], Float[np.ndarray, "R D"]]:
    """Two factors of rank R whose product gives nearly `x @ matrix` for inputs x with this mean of x x^T."""
    values, vectors = np.linalg.eigh(gram)
    roots = np.sqrt(np.maximum(values, values[-1] * 1e-9))
    left, sizes, right = np.linalg.svd((vectors * roots).T @ matrix, full_matrices=False)
    scales = np.sqrt(sizes[:rank])
    return (vectors / roots) @ left[:, :rank] * scales, scales[:, None] * right[:rank]
