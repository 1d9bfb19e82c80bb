"""EAGLE-3 and DFlash drafts and the package `speculators`: each reads what the other writes, with the same logits.

The package needs an older transformers, so it runs in an environment of its own: `make speculators` installs it.
"""

import functools
import json
import os
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from specjax import api
from specjax.hub import adapter as hub_adapter
from specjax.hub.model import Model
from specjax.hub.tokenizer import train_byte_bpe
from specjax.models.attachment import AttachedDraft, runtime_params
from specjax.models.language_model import consecutive
from specjax.models.vocabulary import draft_vocabulary

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("SPECULATORS_PYTHON", ROOT / ".venv-speculators" / "bin" / "python"))
pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(not PYTHON.exists(), reason=f"{PYTHON} is missing; install the package: make speculators"),
]
VOCAB, LENGTH, STEPS, IDS, AFTER = 300, 12, 3, [0, 1, 4, 7, 9, 12, 20, 299], [2, 4, 5]
# The drafts that we write: options, layout.
OURS = {
    "plain": ({}, "speculators"),
    "vocabulary": ({"vocabulary": draft_vocabulary(IDS), "norm_before_residual": True}, "speculators"),
    "eagle31": ({"fc_norm": True, "norm_output": True, "states_after": (1, 8)}, "speculators"),
    "sglang": ({"vocabulary": draft_vocabulary(IDS)}, "sglang"),
    "sglang31": ({"norm_output": True, "states_after": (2, 3, 8)}, "sglang"),  # its converter drops fc_norm
}
_LLAMA = {"model_type": "llama", "vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 1, "head_dim": 8}
_LLAMA |= {"intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
_DEFAULTS = {"norm_before_residual": True, "norm_before_fc": True, "norm_output": True}
# The drafts that the package writes: its options.
THEIRS = {
    "defaults": {**_DEFAULTS, "layer": _LLAMA, "ids": IDS},
    "qwen3": {"layer": {**_LLAMA, "model_type": "qwen3", "attention_bias": True}, "ids": [], "fc_norm": True},
    "embedding": {"layer": {**_LLAMA, "rope_theta": 5e4}, "ids": IDS, "embed_requires_grad": True},
}
# The same for DFlash: options of the drafts that we write; of those that the package writes.
OUR_BLOCKS = {
    "plain": {"states_after": (2, 5, 7), "block_size": 4, "mask_id": 290},
    "layers": {"states_after": (1,), "block_size": 3, "layers": 3},
}
_QWEN = {**_LLAMA, "model_type": "qwen3", "num_hidden_layers": 2}
THEIR_BLOCKS = {
    "defaults": {"layer": _QWEN, "block_size": 4, "mask_token_id": 7},
    "sizes": {
        "layer": {**_QWEN, "attention_bias": True, "num_key_value_heads": 1, "rope_theta": 5e4, "rms_norm_eps": 1e-3},
        "block_size": 3,
        "mask_token_id": 0,
    },
}


@pytest.fixture(scope="module")
def target():
    decoder, params = tiny.decoder(1, layers=8, tied_head=False, vocab_size=VOCAB)
    return Model(decoder, params, train_byte_bpe(["def main(value):\n    return value + 1\n"] * 30, 290))


def run(folder, commands):
    (folder / "commands.json").write_text(json.dumps(commands))
    script = Path(__file__).with_name("speculators_side.py")
    done = subprocess.run([PYTHON, script, folder / "commands.json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _states(decoder, taps, params, tokens):
    states, hidden, first = [], tokens, 0
    for tap in taps:
        hidden, _ = decoder.extend(params, None, hidden, consecutive(tokens), layers=(first, tap))
        states.append(hidden)
        first = tap
    return tuple(states)


def with_random_gains(params, seed=3):
    keys = iter(jax.random.split(jax.random.key(seed), 40))
    gain = lambda x: x * jax.random.uniform(next(keys), x.shape, minval=0.5, maxval=2.0) if x.ndim == 1 else x
    return jax.tree.map(gain, params)


def text(target, network):
    """Tokens of a text, and the target's states that the draft reads."""
    tokens = jax.random.randint(jax.random.key(0), (1, LENGTH), 0, VOCAB)
    return tokens, _states(target.decoder, network.taps, target.params, tokens)


def unrolled(target, loaded):
    """Our logits `[T, predictions, W]`."""
    tokens, states = text(target, loaded.network)
    draft = AttachedDraft.of(loaded.network)
    params = runtime_params(draft, loaded.params, target.params)
    run = jax.jit(lambda params: draft.column_logits(params, draft.from_states(params, states, tokens))[0])
    return np.asarray(run(params)).reshape(LENGTH, len(loaded.network.predicts), -1)


def save_inputs(path, target, network):
    tokens, states = text(target, network)
    states = np.asarray(jnp.concatenate(states, axis=-1))[0, :-1]
    np.savez(path, tokens=np.asarray(tokens[0, 1:], np.int64), states=states, steps=STEPS)


@pytest.fixture(scope="module")
def exported(target, tmp_path_factory):
    """What we wrote, and the package's logits of it."""
    folder = tmp_path_factory.mktemp("ours")
    api.save(target, folder / "target")
    drafts, commands = {}, []
    for name, (options, layout) in OURS.items():
        network, own = tiny.eagle3(target.decoder, target.params, steps=STEPS, **{"states_after": AFTER, **options})
        drafts[name] = hub_adapter.LoadedAttachment(network, with_random_gains(own), target.fingerprint)
        place = folder / name
        how = {"target_name": str(folder / "target"), "embedding": target.params["embedding"]}
        api.save_for_engines(place, drafts[name], layout=layout, **how)
        save_inputs(folder / f"{name}.npz", target, network)
        if layout == "sglang":
            commands.append(["convert", str(place), str(folder / "target"), f"{place}_converted"])
            place = f"{place}_converted"
        commands.append(["logits", str(place), str(folder / f"{name}.npz"), str(folder / f"{name}_out.npz")])
    run(folder, commands)
    return {name: (loaded, np.load(folder / f"{name}_out.npz")["logits"]) for name, loaded in drafts.items()}


@pytest.mark.parametrize("name", OURS)
def test_the_package_computes_the_logits_of_what_we_write(target, exported, name):
    loaded, theirs = exported[name]
    compare(unrolled(target, loaded), theirs)


def compare(ours, theirs):
    """Row j of the package's step k is our row j + 1 + k."""
    assert theirs.shape[0] == STEPS
    for step in range(STEPS):
        rows = LENGTH - 1 - step
        np.testing.assert_allclose(ours[1 + step :, step], theirs[step, :rows], atol=1e-4)


@pytest.fixture(scope="module")
def written(target, tmp_path_factory):
    """The package's drafts as we load them, and its logits."""
    folder = tmp_path_factory.mktemp("theirs")
    api.save(target, folder / "target")
    common = {"target": str(folder / "target"), "eagle_aux_hidden_state_layer_ids": AFTER}
    run(folder, [["write", str(folder / name), {**common, **options}] for name, options in THEIRS.items()])
    drafts = {name: api.load_adapter(folder / name, target) for name in THEIRS}
    for name, loaded in drafts.items():
        save_inputs(folder / f"{name}.npz", target, loaded.network)
    outputs = {name: str(folder / f"{name}_out.npz") for name in THEIRS}
    run(folder, [["logits", str(folder / name), str(folder / f"{name}.npz"), outputs[name]] for name in THEIRS])
    return {name: (drafts[name], np.load(outputs[name])["logits"]) for name in THEIRS}


@pytest.mark.parametrize("name", THEIRS)
def test_a_draft_that_the_package_wrote_has_its_logits_here_and_drafts(target, written, name):
    loaded, theirs = written[name]
    assert loaded.network.taps == tuple(AFTER)
    assert loaded.network.config.own_embedding == (name == "embedding")
    compare(unrolled(target, loaded), theirs)
    generate = functools.partial(api.generate, target, [[5, 6, 7]], temperature=0.0, max_new_tokens=12, eos_ids=())
    assert generate(drafter=loaded).tokens == generate().tokens


def save_text(path, target, network):
    tokens, states = text(target, network)
    states = np.asarray(jnp.concatenate(states, axis=-1))[0]
    np.savez(path, tokens=np.asarray(tokens[0], np.int64), states=states)


def compare_blocks(target, loaded, path):
    """Every block's logits at its mask tokens; the package skips anchors whose block exceeds the text."""
    theirs = np.load(path)
    assert theirs["states_after"].tolist() == list(loaded.network.taps)
    np.testing.assert_array_equal(theirs["anchors"], np.arange(LENGTH - loaded.network.config.block_size))
    np.testing.assert_allclose(unrolled(target, loaded)[theirs["anchors"]], theirs["logits"], atol=1e-4)


@pytest.fixture(scope="module")
def exported_blocks(target, tmp_path_factory):
    folder = tmp_path_factory.mktemp("our_blocks")
    api.save(target, folder / "target")
    drafts, commands = {}, []
    for name, options in OUR_BLOCKS.items():
        network, own = tiny.block_parallel(target.decoder, target.params, **options)
        drafts[name] = hub_adapter.LoadedAttachment(network, with_random_gains(own), target.fingerprint)
        api.save_for_engines(folder / name, drafts[name])
        save_text(folder / f"{name}.npz", target, network)
        place = f"{folder / name}_converted"
        commands.append(["dflash_convert", str(folder / name), str(folder / "target"), place])
        commands.append(["dflash_logits", place, str(folder / f"{name}.npz"), str(folder / f"{name}_out.npz")])
    run(folder, commands)
    return {name: (loaded, folder / f"{name}_out.npz") for name, loaded in drafts.items()}


@pytest.mark.parametrize("name", OUR_BLOCKS)
def test_the_package_computes_the_logits_of_the_block_parallel_drafts_that_we_write(target, exported_blocks, name):
    """Through its converter of the authors' layout, which also says which of the target's states it takes."""
    compare_blocks(target, *exported_blocks[name])


@pytest.fixture(scope="module")
def written_blocks(target, tmp_path_factory):
    folder = tmp_path_factory.mktemp("their_blocks")
    api.save(target, folder / "target")
    common = {"target": str(folder / "target"), "aux_hidden_state_layer_ids": AFTER}
    places = {name: str(folder / name) for name in THEIR_BLOCKS}
    run(folder, [["dflash_write", places[name], {**common, **options}] for name, options in THEIR_BLOCKS.items()])
    drafts = {name: api.load_adapter(folder / name, target) for name in THEIR_BLOCKS}
    for name, loaded in drafts.items():
        save_text(folder / f"{name}.npz", target, loaded.network)
    run(folder, [["dflash_logits", place, f"{place}.npz", f"{place}_out.npz"] for place in places.values()])
    outputs = {name: folder / f"{name}_out.npz" for name in THEIR_BLOCKS}
    return {name: (drafts[name], outputs[name]) for name in THEIR_BLOCKS}


@pytest.mark.parametrize("name", THEIR_BLOCKS)
def test_a_dflash_draft_that_the_package_wrote_has_its_logits_here_and_drafts(target, written_blocks, name, tmp_path):
    """It is then exported in the authors' layout, and reads back."""
    loaded, path = written_blocks[name]
    compare_blocks(target, loaded, path)
    generate = functools.partial(api.generate, target, [[5, 6, 7]], temperature=0.0, max_new_tokens=12, eos_ids=())
    assert generate(drafter=loaded, gamma=2).tokens == generate().tokens
    api.save_for_engines(tmp_path / "draft", loaded)
    again = api.load_adapter(tmp_path / "draft", target)
    assert again.network == loaded.network
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)
