"""Every family computes what the reference computed, from the committed checkpoints of `tests/goldens/make.py`."""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from specjax.hub.load import FAMILIES, load
from specjax.models.language_model import consecutive

GOLDENS = sorted(path.parent for path in Path(__file__).parent.glob("goldens/*/config.json"))
LARGEST_DIFFERENCE = 1e-4  # of logits, times their standard deviation
# Compiling is what takes the time.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
BLOCK = 3
ADVANCE = (3, 2)  # by how much each row advances after a block: the second drops its last token, and feeds it again


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def logits_of(model, params, prompts, lengths, tokens, blocks, places):
    """Logits of one forward over whole rows, and of cached blocks `[steps, B, BLOCK]` at uneven places."""

    def step(cache, block):
        hidden, cache = model.extend(params, cache, *block)
        return cache, model.head(params, hidden)

    start = lambda capacity: model.start(params, prompts, lengths, capacity)
    _, decoded = jax.lax.scan(step, start(tokens.shape[1]), (blocks, places))
    return step(start(0), (tokens, consecutive(tokens)))[1], decoded


@pytest.mark.parametrize("golden", GOLDENS, ids=lambda path: path.name)
def test_forward_and_cached_decoding_give_the_logits_of_the_reference(golden):
    expected = np.load(golden / "expected.npz")
    tokens, reference = expected["tokens"], expected["logits"]
    # An encoder-decoder reads a prompt separately from the text.
    prompts = [expected[name] for name in ("prompts", "lengths") if name in expected]
    prompts = prompts or [tokens, np.full(len(tokens), tokens.shape[1], np.int32)]
    model, params = load(golden, compute_dtype="float32")
    rows = np.arange(len(tokens))[:, None]
    steps = tokens.shape[1] // BLOCK
    places = np.arange(steps)[:, None, None] * np.asarray(ADVANCE)[None, :, None] + np.arange(BLOCK)[None, None]
    places = places.astype(np.int32)
    forward, decoded = logits_of(model, params, *prompts, tokens, tokens[rows, places], places)
    allowed = LARGEST_DIFFERENCE * float(reference.std())
    assert np.abs(forward - reference).max() < allowed
    assert np.abs(decoded - reference[rows, places]).max() < allowed
    # A reference that hardly depends on the text would agree with much.
    assert np.ptp(reference, axis=1).min() > 100 * allowed


@pytest.mark.parametrize("golden", GOLDENS, ids=lambda path: path.name)
def test_what_we_would_write_names_the_tensors_of_the_reference_and_reads_back(golden):
    fields = json.loads((golden / "config.json").read_text(encoding="utf-8"))
    family, dtypes = FAMILIES[fields["model_type"]], {"param_dtype": "bfloat16", "compute_dtype": "float32"}
    config = family.read_config(fields, **dtypes)
    assert family.read_config(family.write_config(config), **dtypes) == config
    assert {tensor.name for tensor in family.tensors(config)} == set(load_file(golden / "model.safetensors"))


def test_every_family_has_a_golden():
    types = {json.loads((path / "config.json").read_text(encoding="utf-8"))["model_type"] for path in GOLDENS}
    assert set(FAMILIES) <= types
