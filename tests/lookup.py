"""Prompt lookup of transformers and vLLM in plain Python, and replays of texts that count what a rule accepts."""

import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np

from specjax.decoding.drafters.base import Context, Drafter
from specjax.decoding.sampling import Noise, Sampling


def transformers_lookup(text, gamma, longest=2):
    """`PromptLookupCandidateGenerator`: the first occurrence of the last 2 tokens, else of the last one."""
    for size in range(min(longest, len(text) - 1), 0, -1):
        for start in range(len(text) - size):
            if text[start : start + size] == text[-size:]:
                return text[start + size :][:gamma]
    return []


def _match_lengths(text, longest):
    """For each position but the last, how many tokens up to it equal the last ones of the text."""
    lengths = []
    for end in range(len(text) - 1):
        size = 0
        while size < min(longest, end + 1) and text[end - size] == text[-1 - size]:
            size += 1
        lengths.append(size)
    return lengths


def vllm_ngram(text, gamma, shortest=1, longest=4):
    """vLLM's `ngram`: the longest match between `prompt_lookup_min` and `_max`, the first of equally long ones."""
    lengths = _match_lengths(text, longest)
    if max(lengths, default=0) < shortest:
        return []
    return text[lengths.index(max(lengths)) + 1 :][:gamma]


def vllm_suffix(text, gamma, factor=1.0, smallest=0.1, depth=24):
    """vLLM's `suffix` (arXiv 2411.04975) in one request: of all suffixes the one whose most frequent continuation has
    the largest sum of estimated probabilities; at most `factor` tokens per matching token."""
    lengths, best, best_score = _match_lengths(text, depth - 1), [], 0.0
    for size in range(1, max(lengths, default=0) + 1):
        ends = [end for end, length in enumerate(lengths) if length >= size]
        draft, chance, score, count = [], 1.0, 0.0, len(ends) + 1
        while len(draft) < min(gamma, int(size * factor), depth - size):
            nexts = Counter(text[end + 1] for end in ends if end + 1 < len(text))
            if not nexts:
                break
            token, times = nexts.most_common(1)[0]
            chance *= times / count
            if chance < smallest:
                break
            ends = [end + 1 for end in ends if end + 1 < len(text) and text[end + 1] == token]
            draft, score, count = [*draft, token], score + chance, times
        if score >= best_score:
            best, best_score = draft, score
    return best


OTHERS = {
    "transformers": transformers_lookup,
    "vllm ngram": vllm_ngram,
    "vllm ngram 2..5": functools.partial(vllm_ngram, shortest=2, longest=5),
    "vllm suffix": vllm_suffix,
    "vllm suffix, any length": functools.partial(vllm_suffix, factor=100.0, smallest=0.0),
}


@functools.partial(jax.jit, static_argnums=0)
def _proposals(drafter: Drafter, tokens, lengths, threshold):
    sampling = Sampling.of(0.0)
    noise = Noise(jnp.broadcast_to(jax.random.key(0), lengths.shape), lengths, True, False)
    last_two, live = jnp.zeros((lengths.shape[0], 2), jnp.int32), jnp.ones(lengths.shape, bool)
    sampling = Sampling(**{**vars(sampling), "threshold": threshold})
    context = Context(last_two, lengths, live, noise, sampling, tokens=tokens)
    proposal, _, _ = drafter.propose(None, None, (), None, context)
    return proposal.tokens, proposal.num_drafted


def drafts_of(drafter: Drafter, text, start, threshold=0.0, slots=None):
    """The drafter's draft after the first `length` tokens of the text, for every length from `start` on, by length."""
    tokens = np.zeros((1, slots or len(text)), np.int32)
    tokens[0, : len(text)] = text
    lengths = np.arange(start, len(text), dtype=np.int32)
    tokens = jnp.asarray(np.broadcast_to(tokens, (len(lengths), tokens.shape[1])))
    drafts, counts = map(np.asarray, _proposals(drafter, tokens, jnp.asarray(lengths), jnp.float32(threshold)))
    return {int(n): row[:count].tolist() for n, row, count in zip(lengths, drafts, counts, strict=True)}


def replay(text, start, draft_after) -> tuple[int, int, int]:
    """(tokens, blocks, drafted tokens) of greedy decoding of `text` from `start` on; `draft_after(length)` drafts."""
    length, blocks, drafted = start, 0, 0
    while length < len(text):
        draft = draft_after(length)
        accepted = 0
        while accepted < len(draft) and length + accepted < len(text) and draft[accepted] == text[length + accepted]:
            accepted += 1
        length, blocks, drafted = min(length + accepted + 1, len(text)), blocks + 1, drafted + len(draft)
    return len(text) - start, blocks, drafted


def compare(texts, drafter: Drafter, gamma: int, slots=None) -> dict[str, tuple[float, float]]:
    """Of each rule and of `drafter`, called "ours": tokens per block and drafted tokens per block.

    Args:
      texts: (tokens, number of tokens of the prompt) of each.
    """
    totals = {name: np.zeros(3) for name in ("ours", *OTHERS)}
    for text, start in texts:
        drafts = drafts_of(drafter, text, start, slots=slots)
        totals["ours"] += replay(text, start, drafts.__getitem__)
        for name, rule in OTHERS.items():
            totals[name] += replay(text, start, lambda length, rule=rule, text=text: rule(text[:length], gamma))
    return {name: (tokens / blocks, drafted / blocks) for name, (tokens, blocks, drafted) in totals.items()}
