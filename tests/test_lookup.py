"""Prompt lookup accepts at least as many tokens as the rules of transformers and vLLM, on text of this repository."""

import re
from pathlib import Path

import pytest
from lookup import compare, drafts_of, replay

from specjax.decoding.drafters.ngram import NGramDrafter

ROOT = Path(__file__).parents[1]
FILES = ("README.md", "specjax/decoding/loop.py", "specjax/decoding/rules.py", "LICENSE")
PROMPT, TOKENS = 160, 400


@pytest.fixture(scope="module")
def texts():
    """(ids, length of the prompt) of the beginning of each file; ids are those of words and signs."""
    ids, texts = {}, []
    for name in FILES:
        words = re.findall(r"\w+| +|[^\w ]", (ROOT / name).read_text(encoding="utf-8"))[:TOKENS]
        texts.append(([ids.setdefault(word, len(ids)) for word in words], PROMPT))
    return texts


@pytest.mark.parametrize("gamma", [4, 8])
def test_lookup_accepts_at_least_as_many_tokens_as_other_rules_at_equal_gamma(texts, gamma):
    rates = compare(texts, NGramDrafter(gamma, 1, 16), gamma)
    ours, _ = rates.pop("ours")
    assert ours >= max(tokens for tokens, _ in rates.values()), rates


@pytest.mark.parametrize("period", [3, 7, 20])
@pytest.mark.parametrize("gamma, least", [(4, 3.2), (8, 4.9)])
def test_a_text_of_one_period_is_drafted_to_the_last_token_of_each_block(period, gamma, least):
    """After 30 other tokens, one period, which repeats from there on."""
    text = [*range(100, 130), *(place % period for place in range(220))]
    start = 30 + period + 1
    drafts = drafts_of(NGramDrafter(gamma, 1, 16), text, start)
    tokens, blocks, _ = replay(text, start, drafts.__getitem__)
    assert tokens / blocks >= max(least, gamma + 0.5)


def test_most_of_the_longest_matches_decide_and_a_draft_without_its_support_ends():
    drafter = NGramDrafter(3, 1, 4, stops=True)
    text = [1, 2, 3, 9, 1, 2, 3, 8, 1, 2, 3, 9, 5, 1, 2, 3, 0]
    draft = lambda threshold: drafts_of(drafter, text, len(text) - 1, threshold)[len(text) - 1]
    assert draft(0.0) == [9, 5, 1]  # 9 followed twice, 8 once; of the two the latest continues
    # 9 has 128 of 192 votes and 16 for what no match knows; then 5 and 1 have equally many.
    assert draft(0.61) == [9] and draft(0.62) == []
