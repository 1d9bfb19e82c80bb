"""Hugging Face transformers and specjax compute the same from what either of them exports."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax.hub.load import load
from specjax.hub.save import save
from specjax.hub.tokenizer import END, Tokenizer, train_byte_bpe
from specjax.models.config import DecoderConfig
from specjax.models.decoder import Decoder
from specjax.models.rotary import Rotary

pytestmark = pytest.mark.peers

BASE = DecoderConfig(
    vocab_size=300,
    width=64,
    layers=3,
    heads=4,
    kv_heads=2,
    head_size=16,
    mlp_width=96,
    max_positions=128,
    rotary=Rotary(1e4, 16),
    norm_epsilon=1e-6,
    tied_head=True,
    param_dtype="float32",
    compute_dtype="float32",
)
VARIANTS = {
    "tied, grouped": BASE,
    "untied, one key head": dataclasses.replace(BASE, tied_head=False, kv_heads=1),
    "all key heads, another base": dataclasses.replace(BASE, kv_heads=4, rotary=Rotary(5e5, 16), norm_epsilon=1e-5),
    "wide heads": dataclasses.replace(BASE, head_size=32, rotary=Rotary(1e4, 32), tied_head=False),
    "stored in bfloat16": dataclasses.replace(BASE, param_dtype="bfloat16"),
}
LARGEST_DIFFERENCE = 1e-4  # of logits, times their standard deviation
TIE = 1e-5  # where the two best logits are nearer than this, two correct programs may choose differently

TEXTS = [
    "def main(argv):\n    return 0\n",
    "naïve café 日本語 🙂 \u200b",
    "  leading,\ttabs \r\n trailing  ",
    "don't we'll I'm 12345 x=3.14",
    f"a text that says {END} itself",
    "",
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_byte_bpe(["def main(value):\n    return value + 1  # don't\n"] * 30, 290)


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda name: name.replace(", ", "-").replace(" ", "_"))
def export(request, tokenizer, tmp_path_factory):
    """An exported random model, with a gain that is not one, as trained models have."""
    directory = tmp_path_factory.mktemp("peer") / "export"
    decoder = Decoder(VARIANTS[request.param])
    params = decoder.init(jax.random.key(0))
    gains = np.random.default_rng(0).uniform(0.5, 1.5, decoder.config.width)
    params["norm"]["scale"] = jnp.asarray(gains, params["norm"]["scale"].dtype)
    save(directory, decoder, params, tokenizer)
    return directory


def theirs(directory):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def their_logits(model, tokens):
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.numpy()


def our_logits(decoder, params, tokens):
    tokens = jnp.asarray(tokens, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
    hidden, _ = jax.jit(decoder.extend)(params, None, tokens, positions)
    return np.asarray(decoder.head(params, hidden))


def assert_close(ours, theirs):
    assert np.abs(ours - theirs).max() < LARGEST_DIFFERENCE * theirs.std()


def our_greedy(decoder, params, prompt, count):
    """`count` greedy tokens through the cache, and the distance of the two best logits at each."""
    prompts = jnp.asarray(prompt, jnp.int32)[None]
    length = prompts.shape[1]
    cache = decoder.start(params, prompts, jnp.array([length], jnp.int32), length + count)
    positions = jnp.arange(length, dtype=jnp.int32)[None]

    @functools.partial(jax.jit, static_argnums=0)
    def step(decoder, params, cache, tokens, positions):
        hidden, cache = decoder.extend(params, cache, tokens, positions)
        return decoder.head(params, hidden)[0, -1], cache

    tokens, gaps, inputs = [], [], prompts
    for _ in range(count):
        logits, cache = step(decoder, params, cache, inputs, positions)
        second, best = np.sort(np.asarray(logits))[-2:]
        tokens.append(int(jnp.argmax(logits)))
        gaps.append(float(best - second))
        inputs = jnp.array([[tokens[-1]]], jnp.int32)
        positions = positions[:, -1:] + 1
    return tokens, gaps


def random_tokens(shape):
    # Not the last id, which ends nothing but could: 0 is the end token of these tokenizers.
    return np.random.default_rng(1).integers(1, BASE.vocab_size, shape)


def test_transformers_computes_the_logits_that_we_compute(export):
    decoder, params = load(export)
    tokens = random_tokens((3, 40))
    assert_close(our_logits(decoder, params, tokens), their_logits(theirs(export), tokens))


def test_greedy_tokens_agree(export):
    import torch

    decoder, params = load(export)
    model = theirs(export)
    count = 48
    for prompt in (random_tokens((1, 7)), random_tokens((1, 30))):
        output = model.generate(
            torch.from_numpy(prompt),
            attention_mask=torch.ones(prompt.shape, dtype=torch.long),
            do_sample=False,
            max_new_tokens=count,
            min_new_tokens=None,
            eos_token_id=None,
        )
        expected = output[0, prompt.shape[1] :].tolist()
        tokens, gaps = our_greedy(decoder, params, prompt[0], count)
        assert len(expected) == count
        # After a tie the two texts may part, so only the first difference says anything.
        first = next((i for i in range(count) if tokens[i] != expected[i]), None)
        assert first is None or gaps[first] < TIE, f"token {first} differs with a gap of {gaps[first]}"


def test_transformers_finds_the_end_token_and_no_other_special_meaning(export, tokenizer):
    model = theirs(export)
    (end,) = tokenizer.eos_ids
    assert model.generation_config.eos_token_id == end
    assert model.generation_config.pad_token_id == end
    assert model.config.bos_token_id is None
    assert model.config.tie_word_embeddings == json.loads((export / "config.json").read_text())["tie_word_embeddings"]


def test_the_exported_tokenizer_reads_and_writes_as_ours(export, tokenizer):
    from transformers import AutoTokenizer

    other = AutoTokenizer.from_pretrained(export)
    ours = Tokenizer.load(export)
    assert (other.eos_token, other.eos_token_id, other.pad_token_id) == (
        END,
        *tokenizer.eos_ids,
        tokenizer.pad_id,
    )
    for text in TEXTS:
        ids = other(text)["input_ids"]
        assert ids == ours.encode(text) == tokenizer.encode(text)
        assert other.decode([*ids, *ours.eos_ids], skip_special_tokens=True) == text
    assert len(other) == ours.vocab_size


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_size", ["50GB", "50KB"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_saved_by_transformers_loads_and_computes_the_same(tmp_path, tied, shard_size, dtype):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=200,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 2e4},
        tie_word_embeddings=tied,
        initializer_range=0.1,
    )
    model = LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size == "50KB")
    decoder, params = load(tmp_path)
    assert (decoder.config.rotary.theta, decoder.config.kv_heads, decoder.config.tied_head) == (2e4, 3, tied)
    tokens = random_tokens((2, 30)) % 200
    # Read back, not `model.float()`: turning a model to bfloat16 in memory also rounds its rotary frequencies, which
    # no file holds; that alone moves the logits by 1e-3.
    assert_close(our_logits(decoder, params, tokens), their_logits(theirs(tmp_path), tokens))
