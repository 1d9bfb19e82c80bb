"""Endless shuffled batches, of which each process of a run makes only its own rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32

Batch = dict[str, Int32[np.ndarray, "..."]]


@dataclass(frozen=True)
class Rows:
    """The rows of a split, from which batches are made (their arrays are described in `data.batches`).

    Attributes:
      tokens: the ids of each row, without padding.
      loss_start: position of the first token that the loss includes, of each row.
      prompt_lengths: number of tokens of each row's prompt.
      sequence_length: length of the padded rows.
      start_token: start token of an encoder-decoder, whose rows are split into prompt and text; None for decoder-only.
    """

    tokens: Int32[np.ndarray, "rows T"] | list[np.ndarray]
    loss_start: Int32[np.ndarray, " rows"]
    prompt_lengths: Int32[np.ndarray, " rows"]
    sequence_length: int
    pad_id: int
    start_token: int | None

    def batch(self, indices: Sequence[int], own_rows: Sequence[int]) -> Batch:
        """The batch of these rows; `tokens` and `sources` have only those at the places `own_rows` in it."""
        rows = [self.tokens[i] for i in indices]
        starts, prompts = self.loss_start[indices], self.prompt_lengths[indices]
        sources = {}
        if self.start_token is not None:
            sources = {"sources": self._padded([rows[i][: prompts[i]] for i in own_rows])}
            start = np.asarray([self.start_token], np.int32)
            rows = [np.concatenate([start, row[prompt:]]) for row, prompt in zip(rows, prompts, strict=True)]
            starts = np.ones_like(starts)
        lengths = np.asarray([len(row) for row in rows], np.int32)
        numbers = {"lengths": lengths, "loss_start": starts, "prompt_lengths": prompts}
        return {"tokens": self._padded([rows[i] for i in own_rows]), **numbers, **sources}

    def _padded(self, rows: Sequence[np.ndarray]) -> Int32[np.ndarray, "B T"]:
        padded = np.full((len(rows), self.sequence_length), self.pad_id, np.int32)
        for row, tokens in zip(padded, rows, strict=True):
            row[: len(tokens)] = tokens
        return padded


class Batches:
    """An endless iterator over batches of rows, reshuffled in every epoch; its position can be saved and restored."""

    def __init__(self, rows: Rows, batch_size: int, seed: int, own_rows: Sequence[int]):
        """Starts at the first batch.

        Args:
          batch_size: rows of a batch over all processes.
          own_rows: indices in a batch of the rows that this process makes.
        """
        import grain

        self._order = grain.MapDataset.range(len(rows.tokens)).seed(seed).shuffle().repeat()
        self._rows, self._size, self._own_rows = rows, batch_size, own_rows
        self._next = 0

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        indices = [int(self._order[self._next + place]) for place in range(self._size)]
        self._next += self._size
        return self._rows.batch(indices, self._own_rows)

    def get_state(self) -> dict[str, int]:
        """The position: the number of rows in the batches so far, over all processes."""
        return {"next_index": self._next}

    def set_state(self, state: dict[str, int]) -> None:
        """Continues from a position that `get_state` returned, in any process."""
        self._next = state["next_index"]
