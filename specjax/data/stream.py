"""Endless shuffled batches, of which each process of a run makes only its own rows."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

Batch = dict[str, Int32[np.ndarray, "..."]]


def stack(rows: Sequence[dict[str, np.ndarray]]) -> Batch:
    """Stacks the arrays of several rows by name."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


class Batches:
    """An endless iterator over batches of rows, reshuffled in every epoch; its position can be saved and restored."""

    def __init__(self, rows: Any, batch_size: int, seed: int, own_rows: Sequence[int]):
        """Starts at the first batch.

        Args:
          rows: `rows[index]` is a dict of one row's arrays; `rows.numbers(indices)` are the arrays `[B]` of several
            rows without their tokens.
          batch_size: rows of a batch over all processes.
          own_rows: indices in a batch of the rows that this process makes.
        """
        import grain

        self._order = grain.MapDataset.range(len(rows)).seed(seed).shuffle().repeat()
        self._rows, self._size, self._own_rows = rows, batch_size, own_rows
        self._next = 0

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        indices = [int(self._order[self._next + place]) for place in range(self._size)]
        self._next += self._size
        batch = stack([self._rows[indices[place]] for place in self._own_rows])
        return batch if len(self._own_rows) == self._size else {**batch, **self._rows.numbers(indices)}

    def get_state(self) -> dict[str, int]:
        """The position: the number of rows in the batches so far, over all processes."""
        return {"next_index": self._next}

    def set_state(self, state: dict[str, int]) -> None:
        """Continues from a position that `get_state` returned, in any process."""
        self._next = state["next_index"]
