"""Endless shuffled batches, of which each process of a run makes its own rows, and the place among them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

Batch = dict[str, Int32[np.ndarray, "..."]]


@dataclasses.dataclass(frozen=True)
class Parts:
    """Random access to batches of rows, in the order of all epochs.

    Attributes:
      rows: by index a row's arrays; `numbers(indices)` are the arrays `[B]` of rows that are not made.
      order: the index of the row at each place.
      batch_size: rows of a whole batch.
      own: places in a batch of the rows that are made.
    """

    rows: Any
    order: Any
    batch_size: int
    own: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.order) // self.batch_size

    def __getitem__(self, number: int) -> Batch:
        chosen = [int(self.order[number * self.batch_size + place]) for place in range(self.batch_size)]
        made = [self.rows[chosen[place]] for place in self.own]
        batch = {name: np.stack([row[name] for row in made]) for name in made[0]}
        return batch if len(made) == len(chosen) else {**batch, **self.rows.numbers(chosen)}


class Batches:
    """Batch after batch, and the place among them; `get_state` counts rows of whole batches."""

    def __init__(self, stream: Any, batch_size: int):
        self._stream, self._size = stream, batch_size

    @classmethod
    def of(cls, rows: Any, batch_size: int, seed: int, own: Sequence[int]) -> "Batches":
        """Batches of `rows` (see `Parts`), shuffled anew in every epoch; of each the rows at the places `own`."""
        import grain

        order = grain.MapDataset.range(len(rows)).seed(seed).shuffle().repeat()
        parts = grain.MapDataset.source(Parts(rows, order, batch_size, tuple(own)))
        # Rows lie in memory, so threads that read ahead would only cost time.
        return cls(iter(parts.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))), batch_size)

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        return next(self._stream)

    def get_state(self) -> dict[str, int]:
        return {"next_index": self._stream.get_state()["next_index"] * self._size}

    def set_state(self, state: dict[str, int]) -> None:
        self._stream.set_state({"next_index": state["next_index"] // self._size})
