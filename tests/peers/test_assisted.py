"""An exported draft in transformers' assisted generation: accepted at the length that we measure."""

import os
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from specjax import api
from specjax.hub.tokenizer import train_byte_bpe

pytestmark = pytest.mark.peers

QUICKSTART = "runs/quickstart/target/export:runs/quickstart/distilled/export"
NEW, PROMPTS, WITHIN = 40, 10, 0.03


def related_pair(directory):
    """A random target, and as its draft the target with a little noise on its weights."""
    tokenizer = train_byte_bpe([Path(__file__).read_text()], 300)
    shape = dict(vocab_size=tokenizer.vocab_size, width=48, heads=4, kv_heads=2, head_size=12, mlp_width=64)
    decoder, params = tiny.decoder(0, **shape)
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(params))))
    noisy = jax.tree.map(lambda x: x + 0.04 * x.std() * jax.random.normal(next(keys), x.shape), params)
    for name, values in (("target", params), ("draft", noisy)):
        api.save(api.Model(decoder, values, tokenizer), directory / name)
    return directory / "target", directory / "draft"


@pytest.fixture(scope="module", params=["a target with noise", "the quickstart's"])
def pair(request, tmp_path_factory):
    if request.param == "a target with noise":
        return related_pair(tmp_path_factory.mktemp("pair"))
    paths = [Path(path) for path in os.environ.get("SPECJAX_PAIR", QUICKSTART).split(":")]
    if not all((path / "config.json").exists() for path in paths):
        pytest.skip("make quickstart has not been run here")
    return paths


def assisted(target, draft, prompts, gamma):
    """(texts, target calls) of transformers: gamma drafted tokens a block, whatever the draft's confidence."""
    import torch
    from transformers import AutoModelForCausalLM

    target, draft = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (target, draft))
    settings = draft.generation_config
    settings.num_assistant_tokens, settings.num_assistant_tokens_schedule = gamma, "constant"
    settings.assistant_confidence_threshold = 0.0
    calls = []
    target.register_forward_pre_hook(lambda *_: calls.append(1))
    texts = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = target.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=NEW,
                assistant_model=draft,
            )
        texts.append(out[0, len(prompt) :].tolist())
    return texts, len(calls)


@pytest.mark.parametrize("gamma", [2, 5])
def test_an_exported_draft_is_accepted_at_the_same_length(pair, gamma):
    target, draft = map(api.load, pair)
    vocab = target.tokenizer.vocab_size
    lengths = np.random.default_rng(0).integers(2, 30, PROMPTS)
    prompts = [np.random.default_rng(i + 1).integers(1, vocab, n).tolist() for i, n in enumerate(lengths)]
    ours = api.generate(target, prompts, drafter=draft, gamma=gamma, temperature=0.0, max_new_tokens=NEW)
    texts, calls = assisted(*pair, prompts, gamma)
    theirs = sum(map(len, texts)) / calls
    assert 1.2 < theirs < gamma + 1
    assert ours.stats.block_efficiency == pytest.approx(theirs, rel=WITHIN)
    assert sum(text == tokens for text, tokens in zip(texts, ours.tokens, strict=True)) >= PROMPTS - 1
