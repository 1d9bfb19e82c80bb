"""Prompt lookup on text of a real model: it accepts at least as many tokens as the rules of transformers and vLLM."""

import json
import os
from pathlib import Path

import pytest
from lookup import compare

from specjax import api
from specjax.decoding.drafters.ngram import NGramDrafter

pytestmark = pytest.mark.peers

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def texts():
    """(tokens, length of the prompt) of greedy answers of SmolLM2 to Spec-Bench's questions."""
    checkpoints = sorted(Path(os.environ.get("SPECJAX_CHECKPOINTS", ROOT / "checkpoints")).glob("smollm2*.gguf"))
    questions = os.environ.get("SPECJAX_QUESTIONS")
    if not checkpoints or not questions:
        pytest.skip("run `make checkpoint`, and name Spec-Bench's question.jsonl in SPECJAX_QUESTIONS")
    model = api.load(checkpoints[0])
    lines = [json.loads(line)["turns"][0] for line in Path(questions).read_text(encoding="utf-8").splitlines()]
    prompts = [list(model.tokenizer.apply_chat([{"role": "user", "content": line}])) for line in lines[::20]]
    answers = api.generate(model, prompts, temperature=0.0, max_new_tokens=128, batch_size=8)
    return [([*prompt, *answer], len(prompt) + 1) for prompt, answer in zip(prompts, answers.tokens, strict=True)]


@pytest.mark.parametrize("gamma", [4, 8])
def test_lookup_accepts_at_least_as_many_tokens_as_other_rules_at_equal_gamma(texts, gamma):
    rates = compare(texts, NGramDrafter(gamma, 1, 16), gamma, slots=2048)
    for name, (tokens, drafted) in rates.items():
        print(f"gamma {gamma}, {name}: {tokens:.3f} tokens and {drafted:.2f} drafted tokens per block")
    ours, _ = rates.pop("ours")
    assert ours >= max(tokens for tokens, _ in rates.values()), rates
