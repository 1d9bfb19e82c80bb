"""What drafters share that wrap another one and do not run it in every block."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from specjax.decoding.drafters.base import Chunk, Drafter
from specjax.runtime.mesh import axes

_NOTHING = 2**31 - 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Missing:
    """Which committed tokens the inner drafter's own cache lacks.

    Attributes:
      first: position of each row's first one; a number beyond all positions if at most the last two tokens are missing,
        which a drafter always runs on.
    """

    first: Int[Array, "B"] = axes("batch")

    @classmethod
    def nothing(cls, batch: int) -> "Missing":
        return cls(jnp.full((batch,), _NOTHING, jnp.int32))

    def at(self, lengths: Int[Array, "B"]) -> Int[Array, "B"]:
        """`Context.first_missing` of texts of these lengths."""
        return jnp.minimum(self.first, lengths - 2)

    def after_chunk(self, chunk: Chunk) -> "Missing":
        """After prefill of a chunk; the chunks that follow it reach up to the end of the text.

        What the inner drafter lacks before the chunk stays missing, unless the chunk begins there.
        """
        starts, ends = chunk.positions[:, 0], jnp.minimum(chunk.positions[:, -1] + 1, chunk.lengths - 1)
        return Missing(jnp.where(starts <= self.first, ends, self.first))

    def after_block(self, drafts: Bool[Array, "B"], lengths: Int[Array, "B"]) -> "Missing":
        """After a block in which the inner drafter proposed tokens in the rows `drafts`, at these lengths.

        If it ran for other rows, a row that it did not draft for has keys of tokens that were not committed.
        """
        return Missing(jnp.where(drafts, _NOTHING, self.at(lengths)))


@dataclasses.dataclass(frozen=True)
class Wrapping(Drafter):
    """Base class of drafters that wrap another one, and read of the target what that one reads.

    Attributes:
      inner: the drafter that is wrapped.
    """

    inner: Drafter
    gamma: int

    @classmethod
    def of(cls, inner: Drafter, *arguments) -> "Wrapping":
        """The wrapped drafter; `arguments` are the fields after `inner`."""
        return cls(inner, *arguments, greedy=inner.greedy, leaves_unsure=inner.leaves_unsure)

    @property
    def idles(self):
        return self.inner.idles

    @property
    def taps(self):
        return self.inner.taps

    @property
    def lag(self):
        return self.inner.lag
