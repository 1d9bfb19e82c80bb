"""Counts of decoding, kept on the device."""

import dataclasses

import jax
import numpy as np
from jaxtyping import Array, Bool, Int

from specjax.runtime.mesh import axes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Statistics:
    """Counts of each row up to its end; tokens after EOS or the limit are not counted.

    Arrays are on the device during decoding, and numpy arrays once fetched.

    Attributes:
      target_calls: number of verifications.
      drafted: number of drafted tokens.
      drafted_at: number of blocks that drafted position i and accepted all positions before it.
      accepted_at: number of blocks that accepted and emitted the token at position i.
      emitted_more_than: at index w - 1 the number of blocks that emitted more than w tokens, w = 1 .. gamma.
      failed_drafts: number of blocks whose draft ended because its logits were not finite.
      failed: whether the target's logits were not finite, which ends the row.
    """

    target_calls: Int[Array | np.ndarray, "B"] = axes("batch")
    drafted: Int[Array | np.ndarray, "B"] = axes("batch")
    drafted_at: Int[Array | np.ndarray, "B gamma"] = axes("batch", None)
    accepted_at: Int[Array | np.ndarray, "B gamma"] = axes("batch", None)
    emitted_more_than: Int[Array | np.ndarray, "B gamma"] = axes("batch", None)
    failed_drafts: Int[Array | np.ndarray, "B"] = axes("batch")
    failed: Bool[Array | np.ndarray, "B"] = axes("batch")

    @classmethod
    def zeros(cls, batch: int, gamma: int) -> "Statistics":
        row, wide = np.zeros((batch,), np.int32), np.zeros((batch, gamma), np.int32)
        return cls(row, row, wide, wide, wide, row, row.astype(bool))

    def after(
        self,
        num_accepted: Int[Array | np.ndarray, "B"],
        num_emitted: Int[Array | np.ndarray, "B"],
        num_drafted: Int[Array | np.ndarray, "B"],
        draft_failed: Bool[Array, "B"] | None = None,
        failed: Bool[Array, "B"] | bool = False,
    ) -> "Statistics":
        """The counts after a block, traced or in numpy.

        `num_accepted` may include tokens that were then cut, the other numbers do not.
        """
        index = np.arange(self.drafted_at.shape[1], dtype=np.int32)[None]
        accepted = (index < num_emitted[:, None]) & (index < num_accepted[:, None])
        reached = (index <= num_emitted[:, None]) & (index <= num_accepted[:, None])
        ones = lambda happened: happened.astype(np.int32)
        return Statistics(
            target_calls=self.target_calls + ones(num_emitted > 0),
            drafted=self.drafted + num_drafted,
            drafted_at=self.drafted_at + ones((index < num_drafted[:, None]) & reached),
            accepted_at=self.accepted_at + ones(accepted),
            emitted_more_than=self.emitted_more_than + ones(num_emitted[:, None] > index + 1),
            failed_drafts=self.failed_drafts + (0 if draft_failed is None else ones(draft_failed)),
            failed=self.failed | failed,
        )
