"""Draft vocabularies: the ids that a draft with a reduced head can draft (FR-Spec, arXiv 2502.14856).

A target writes few of its ids most of the time. A head over these ids alone makes a draft step cheaper. Every other id
has draft probability 0, so exact rules stay exact; the target itself emits those tokens.
"""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from specjax.runtime.errors import UserError
from specjax.runtime.files import write_atomically

# The name of the file in a folder; it holds a JSON list of ids in ascending order.
FILE = "draft_vocabulary.json"


@dataclasses.dataclass(frozen=True)
class DraftVocabulary:
    """The ids of a reduced head in ascending order: column c of its logits belongs to id `ids[c]`.

    It is hashable, because it is part of a model's config, which is a static argument of compiled code.

    Attributes:
      packed: the ids as int32 bytes, whose hash Python computes only once.
    """

    packed: bytes

    @property
    def ids(self) -> Int[np.ndarray, "W"]:
        return np.frombuffer(self.packed, np.int32)

    def __len__(self) -> int:
        return len(self.packed) // 4

    def __repr__(self) -> str:
        return f"DraftVocabulary({len(self)} ids)"

    def including(self, ids: Iterable[int]) -> "DraftVocabulary":
        """This vocabulary with more ids. End-of-text ids must be in it, or no text could end by a drafted token."""
        return DraftVocabulary(np.union1d(self.ids, np.asarray(list(ids), np.int32)).astype(np.int32).tobytes())

    def check(self, vocab_size: int) -> None:
        """Raises UserError if it has an id that a target with `vocab_size` ids does not have."""
        if self.ids[-1] >= vocab_size:
            raise UserError(
                f"the draft vocabulary ({len(self)} ids) has id {self.ids[-1]}, and the target has only the ids 0 .. "
                f"{vocab_size - 1}; count the ids with this target's tokenizer"
            )

    def columns(self, tokens: Int[Array, "*X"]) -> tuple[Int[Array, "*X"], Bool[Array, "*X"]]:
        """The column of each token, and whether it has one; without one, the column is arbitrary."""
        ids = jnp.asarray(self.ids)
        columns = jnp.minimum(jnp.searchsorted(ids, tokens), len(self) - 1).astype(jnp.int32)
        return columns, ids[columns] == tokens

    def spread(self, rows: Float[Array, "*X W"], vocab_size: int, fill: float) -> Float[Array, "*X V"]:
        """Rows over all ids: each column goes to its id, and all other ids get `fill`."""
        wide = jnp.full((*rows.shape[:-1], vocab_size), fill, rows.dtype)
        return wide.at[..., self.ids].set(rows, indices_are_sorted=True, unique_indices=True)

    def save(self, path: Path) -> None:
        """Writes the file that `draft_vocabulary` reads."""
        write_atomically(path, json.dumps(self.ids.tolist()) + "\n")


def draft_vocabulary(value: Any) -> DraftVocabulary | None:
    """The draft vocabulary that a setting names; None for None, "" and ().

    Args:
      value: ids in ascending order; the path of a JSON file with a list of them; or a folder with `FILE`, which the
        design action "vocabulary" and the export of a reduced draft write.

    Raises:
      UserError: for a file that is missing or damaged, and for ids that are not integers, negative, unsorted or
        repeated.
    """
    if value is None or isinstance(value, DraftVocabulary):
        return value
    name = "the draft vocabulary"
    if isinstance(value, str | Path):
        if not str(value):
            return None
        path = Path(value) / FILE if Path(value).is_dir() else Path(value)
        name = f"the draft vocabulary in {path}"
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{name} cannot be read ({error.strerror}); name a JSON file with a list of ids") from None
        except ValueError as error:
            raise UserError(f"{name} is damaged ({error}); count its ids again") from None
    numbers = np.asarray(list(value) if isinstance(value, Iterable) else [None])
    if not numbers.size and name == "the draft vocabulary":
        return None
    if numbers.ndim != 1 or not np.issubdtype(numbers.dtype, np.integer):
        raise UserError(f"{name} must be a list of token ids; count them with the design action vocabulary")
    if numbers[0] < 0 or numbers[-1] >= 2**31:
        wrong = numbers[0] if numbers[0] < 0 else numbers[-1]
        raise UserError(f"{name} has id {wrong}, which no tokenizer has; count its ids again")
    steps = np.diff(numbers)
    if np.any(steps <= 0):
        place = int(np.argmax(steps <= 0))
        problem = "is repeated" if steps[place] == 0 else f"follows {numbers[place]}"
        raise UserError(
            f"{name} must hold each id once in ascending order, and {numbers[place + 1]} {problem}; sort it"
        )
    return DraftVocabulary(numbers.astype(np.int32).tobytes())


def most_written_ids(counts: Int[np.ndarray, "V"], size: int, keep: Iterable[int]) -> DraftVocabulary:
    """The `size` ids with the largest counts, among them all ids of `keep`.

    Args:
      counts: how often the target wrote each id. Of equally frequent ids, the lower ones are taken.
      keep: ids that are included whatever their counts: those that end a text.

    Raises:
      UserError: for a size that is above the target's vocabulary size, or too small for `keep`.
    """
    kept = np.unique(np.asarray(list(keep), np.int64))
    if not max(len(kept), 1) <= size <= len(counts):
        raise UserError(
            f"the size of a draft vocabulary is {size}; it must lie in {max(len(kept), 1)} .. {len(counts)}, from the "
            "number of ids that end a text to the size of the target's vocabulary"
        )
    order = np.argsort(-np.asarray(counts, np.int64), kind="stable")
    chosen = order[~np.isin(order, kept)][: size - len(kept)]
    return draft_vocabulary(np.sort(np.concatenate([kept, chosen])))
