"""Every family computes, decodes and exports what transformers does, on the tiny configs of `family_configs.py`."""

import copy
import dataclasses
import functools
import json
from typing import Any

import flags
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file

from specjax.decoding import batch, loop, rules
from specjax.decoding.plan import capacity_for
from specjax.decoding.sampling import Sampling, row_keys
from specjax.hub.load import FAMILIES, load
from specjax.hub.save import save
from specjax.hub.tokenizer import train_byte_bpe
from specjax.models.decoder import Decoder
from tests.peers.family_configs import CASES, VOCAB

pytestmark = pytest.mark.peers

LARGEST_DIFFERENCE = 1e-4  # of logits, times their standard deviation
TIE = 1e-5  # where the reference's two best logits are nearer than this, two correct programs may choose differently

LENGTHS = (40, 33, 17, 8)  # of the texts whose logits are compared
PREFILLED = (20, 9, 13, 1)
CACHE = 48
GAMMA = 3

PROMPT_LENGTHS = (1, 6, 13, 20, 31) * 4
SLOTS = 32
NEW_TOKENS = 20
DRAFTERS = (None, "ngram", "early_exit", "model")

# Compiling is most of the time here, and every config is compiled anew.
HASTE = {name: json.loads(value) for name, value in (flag[2:].split("=") for flag in flags.QUICK.split())}


@dataclasses.dataclass(frozen=True)
class Pair:
    """One model twice: transformers', saved in `directory`, and ours, read from there; its number in the family."""

    number: int
    theirs: Any
    directory: Any
    decoder: Decoder
    params: Any


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, fields = CASES[request.param]
    torch.manual_seed(list(CASES).index(request.param))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields)).float().eval()
    randomise(model)
    directory = tmp_path_factory.mktemp(request.param) / "theirs"
    model.save_pretrained(directory)
    return Pair(int(request.param.split("-")[-1]), model, directory, *load(directory))


@pytest.fixture(scope="module")
def tokenizer():
    return train_byte_bpe(["some words, and some words again\n"] * 20, VOCAB - 2)


def randomise(model):
    """Weights, gains and biases far enough from zeros and ones that a forgotten one shows."""
    import torch

    with torch.no_grad():
        for name, values in model.named_parameters():
            if values.ndim > 1 or name.endswith("bias"):
                values.normal_(0, 0.2)
            else:
                values.add_(torch.empty_like(values).uniform_(-0.5, 0.5))


def rotates_by_length(model):
    """Whether rotary frequencies depend on the length of the text; transformers then keeps them as a state."""
    return any(getattr(module, "rope_type", None) in ("dynamic", "longrope") for module in model.modules())


def their_logits(model, texts, length):
    """Of each text alone; frequencies that depend on the length of the text are those of `length`."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    model = copy.deepcopy(model)
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        if kind in ("dynamic", "longrope"):
            frequencies, module.attention_scaling = ROPE_INIT_FUNCTIONS[kind](module.config, None, seq_len=length)
            module.inv_freq.copy_(frequencies)
            module.rope_type = "frozen"
    with torch.no_grad():
        return [model(torch.tensor(text)[None]).logits[0].numpy() for text in texts]


def their_stepwise_logits(model, text, new_tokens=0, prefilled=None):
    """Logits `[T, V]` of the text, its first `prefilled` tokens at once and then each by itself, and of new ones.

    New tokens are the most probable ones. (`generate` of Phi-3 computes its cache anew with the long factors once the
    text grows longer than the original positions; a step of the model does not.)
    """
    import torch

    model, text = copy.deepcopy(model), list(text)
    logits, cache, end = [], None, prefilled or len(text)
    with torch.no_grad():
        while end <= len(text):
            fed = text[0 if cache is None else end - 1 : end]
            output = model(torch.tensor(fed)[None], cache=cache, use_cache=True)
            cache = output.cache
            logits.append(output.logits[0])
            if end == len(text) and new_tokens:
                text.append(int(logits[-1][-1].argmax()))
                new_tokens -= 1
            end += 1
    return torch.cat(logits).numpy(), text


def assert_alike(ours, theirs):
    """Lists of `[T, V]` logits, of which only the texts' own positions are compared."""
    spread = float(np.concatenate(theirs).std())
    differences = [float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True)]
    assert max(differences) < LARGEST_DIFFERENCE * spread, f"{differences} at a spread of {spread}"


def random_texts():
    random = np.random.default_rng(5)
    return [random.integers(0, VOCAB, length).tolist() for length in LENGTHS]


def padded(rows, width):
    return np.asarray([[*row, *[0] * (width - len(row))] for row in rows], np.int32)


def blocks_of(texts):
    """What is fed after the prefill: tokens and positions `[steps, B, gamma + 1]`, and which steps are the text.

    Rows start at uneven positions and go on by uneven numbers of tokens. Before each block of the text there is one
    whose tokens are junk but for the first, as if all drafted had been refused; so every slot is written wrongly
    before it is written right.
    """
    random = np.random.default_rng(6)
    ends = np.asarray(LENGTHS)
    at = np.minimum(np.asarray(PREFILLED), ends - GAMMA - 1)
    tokens, positions, real = [], [], []
    while True:
        places = at[:, None] + np.arange(GAMMA + 1)
        block = np.asarray([np.asarray(text)[row] for text, row in zip(texts, places, strict=True)], np.int32)
        junk = random.integers(0, VOCAB, block.shape).astype(np.int32)
        junk[:, 0] = block[:, 0]
        tokens += [junk, block]
        positions += [places, places]
        real += [False, True]
        last = ends - GAMMA - 1
        if (at == last).all():
            return np.stack(tokens), np.stack(positions).astype(np.int32), np.asarray(real)
        at = np.minimum(at + random.integers(1, GAMMA + 2, at.shape), last)


@functools.partial(jax.jit, static_argnums=0)
def our_logits(decoder, params, texts, prompts, tokens, positions):
    """Logits of the plain forward over `texts`, of the prefill of `prompts`, and of the blocks after it."""

    def logits_of(cache, tokens, positions):
        hidden, cache = decoder.extend(params, cache, tokens, positions)
        return cache, decoder.head(params, hidden)

    places = lambda rows: jnp.broadcast_to(jnp.arange(rows.shape[1], dtype=jnp.int32)[None], rows.shape)
    _, plain = logits_of(None, texts, places(texts))
    cache = decoder.start(params, prompts, jnp.asarray(PREFILLED, jnp.int32), CACHE)
    cache, prefilled = logits_of(cache, prompts, places(prompts))
    _, blocks = jax.lax.scan(lambda cache, step: logits_of(cache, *step), cache, (tokens, positions))
    return plain, prefilled, blocks


@pytest.fixture(scope="module")
def ours(pair):
    texts = random_texts()
    prompts = [text[:length] for text, length in zip(texts, PREFILLED, strict=True)]
    tokens, positions, _ = blocks_of(texts)
    arguments = pair.params, padded(texts, 40), padded(prompts, 20), tokens, positions
    compiled = our_logits.lower(pair.decoder, *arguments).compile(compiler_options=HASTE)
    return jax.device_get(compiled(*arguments))


def test_logits_of_uneven_texts_agree(pair, ours):
    texts = random_texts()
    theirs = their_logits(pair.theirs, texts, max(LENGTHS))
    assert_alike([row[: len(text)] for row, text in zip(ours[0], texts, strict=True)], theirs)


def test_logits_through_prefill_and_blocks_after_refused_ones_agree(pair, ours):
    texts = random_texts()
    if rotates_by_length(pair.theirs):
        steps = zip(texts, PREFILLED, strict=True)
        theirs = [their_stepwise_logits(pair.theirs, text, prefilled=length)[0] for text, length in steps]
    else:
        theirs = their_logits(pair.theirs, texts, CACHE)
    _, positions, real = blocks_of(texts)
    assert_alike(
        [row[:length] for row, length in zip(ours[1], PREFILLED, strict=True)],
        [row[:length] for row, length in zip(theirs, PREFILLED, strict=True)],
    )
    for row, reference in enumerate(theirs):
        seen = positions[real, row]
        assert_alike([ours[2][real, row].reshape(-1, VOCAB)], [reference[seen.reshape(-1)]])
        assert set(range(PREFILLED[row], LENGTHS[row])) <= set(seen.reshape(-1).tolist())


@pytest.fixture(scope="module")
def generated(pair):
    """Prompts and, of transformers, the greedy tokens and the top-2 gap of each; texts of one length go together."""
    import torch

    random = np.random.default_rng(7)
    prompts = [random.integers(0, VOCAB, length).tolist() for length in PROMPT_LENGTHS]
    if rotates_by_length(pair.theirs):
        outputs = [their_stepwise_logits(pair.theirs, prompt, NEW_TOKENS) for prompt in prompts]
        best = [np.sort(logits[-NEW_TOKENS - 1 : -1], axis=-1)[:, -2:] for logits, _ in outputs]
        return prompts, [text[-NEW_TOKENS:] for _, text in outputs], [(row[:, 1] - row[:, 0]).tolist() for row in best]
    tokens, gaps = {}, {}
    for length in sorted(set(PROMPT_LENGTHS)):
        rows = [row for row, prompt in enumerate(prompts) if len(prompt) == length]
        inputs = torch.tensor([prompts[row] for row in rows])
        with torch.no_grad():
            output = pair.theirs.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
                return_dict_in_generate=True,
                output_logits=True,
            )
        best = torch.stack(output.logits, 1).topk(2, dim=-1).values
        for number, row in enumerate(rows):
            tokens[row] = output.sequences[number, length:].tolist()
            gaps[row] = (best[number, :, 0] - best[number, :, 1]).tolist()
    return prompts, [tokens[row] for row in range(len(prompts))], [gaps[row] for row in range(len(prompts))]


@functools.partial(jax.jit, static_argnums=0)
def begin_and_run(plan, params, prompts, lengths, keys):
    """The target's parameters are also those of a draft that is a copy of it: all that it drafts is accepted."""
    limits = loop.Limits(jnp.full_like(lengths, NEW_TOKENS), jnp.asarray([-1], jnp.int32))
    state = loop.prefill(plan, params, params, prompts, lengths, keys)
    state = loop.run(plan, params, params, state, Sampling.of(0.0), limits)
    return state.tokens, state.lengths


def decode(pair, prompts, drafter):
    """Our greedy tokens, all prompts in one batch."""
    gamma = GAMMA if drafter else 0
    options = {"exit_layer": 1, "shortest": 1, "longest": 3, "model": pair.decoder}
    plan = loop.Plan(
        target=pair.decoder,
        drafter=tiny.make_drafter(drafter, pair.decoder, gamma, options) if drafter else None,
        rule=rules.rule_named("lossless"),
        gamma=gamma,
        capacity=capacity_for(SLOTS, NEW_TOKENS, GAMMA),
        greedy=True,
    )
    arguments = pair.params, *batch.pad(prompts, SLOTS), row_keys(0, np.arange(len(prompts), dtype=np.int32))
    compiled = begin_and_run.lower(plan, *arguments).compile(compiler_options=HASTE)
    tokens, ends = jax.device_get(compiled(*arguments))
    return [row[len(prompt) : end].tolist() for row, prompt, end in zip(tokens, prompts, ends, strict=True)]


def assert_same_tokens(pair, generated, drafter):
    prompts, expected, gaps = generated
    for row, (tokens, reference) in enumerate(zip(decode(pair, prompts, drafter), expected, strict=True)):
        assert len(tokens) == len(reference) == NEW_TOKENS
        # After a tie two texts may part, so only the first difference says anything.
        first = next((place for place in range(NEW_TOKENS) if tokens[place] != reference[place]), None)
        if first is not None:
            print(f"prompt {row} differs at token {first}, where the reference's gap is {gaps[row][first]:.1e}")
            assert gaps[row][first] < TIE


def test_greedy_tokens_of_uneven_prompts_agree_the_configs_taking_turns_at_the_drafters(pair, generated):
    assert_same_tokens(pair, generated, DRAFTERS[pair.number % len(DRAFTERS)])


@pytest.mark.slow
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_greedy_tokens_agree_with_every_drafter(pair, generated, drafter):
    assert_same_tokens(pair, generated, drafter)


def test_an_export_is_read_as_the_same_model(pair, tokenizer, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    save(tmp_path / "ours", pair.decoder, pair.params, tokenizer)
    original, exported = (load_file(place / "model.safetensors") for place in (pair.directory, tmp_path / "ours"))
    assert set(original) == set(exported)
    for name, values in original.items():
        np.testing.assert_array_equal(values, exported[name], err_msg=name)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32).eval()
    assert type(again) is type(pair.theirs)
    texts = random_texts()
    for mine, theirs in zip(their_logits(again, texts, CACHE), their_logits(pair.theirs, texts, CACHE), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-6)


def test_every_decoder_family_has_five_configs():
    decoders = set(FAMILIES) - {"t5"}
    counts = {family: sum(model_type == family for model_type, _ in CASES.values()) for family in decoders}
    assert min(counts.values()) >= 5, counts
