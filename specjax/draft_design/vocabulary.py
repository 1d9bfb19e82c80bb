"""Counts the ids that a target writes, to choose the vocabulary of a draft (FR-Spec, arXiv 2502.14856)."""

from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Int

from specjax.models.vocabulary import most_written_ids


def count_ids(texts: Iterable[Sequence[int]], vocab_size: int) -> Int[np.ndarray, "V"]:
    """How often each of the ids 0 .. vocab_size - 1 occurs in the texts, which are token ids without prompts."""
    counts = np.zeros(vocab_size, np.int64)
    for text in texts:
        counts += np.bincount(np.asarray(text, np.int64), minlength=vocab_size)
    return counts


def coverage(texts: Sequence[Sequence[int]], vocab_size: int, keep: Iterable[int]) -> list[tuple[int, float]]:
    """(size, share of written tokens whose id is among the `size` most written ones), for sizes that are powers of two.

    The ids are chosen on nine of ten texts, and the share is that of the tokens of every tenth text.
    """
    keep = tuple(keep)
    chosen = count_ids((text for number, text in enumerate(texts) if number % 10), vocab_size)
    held_out = count_ids(texts[::10], vocab_size)
    sizes = [2**power for power in range(8, vocab_size.bit_length()) if len(keep) <= 2**power < vocab_size]
    share = lambda size: held_out[most_written_ids(chosen, size, keep).ids].sum() / max(held_out.sum(), 1)
    return [(size, float(share(size))) for size in sizes]
