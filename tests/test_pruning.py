"""Structured pruning: what does nothing goes first and is not missed, what is left is a model of its family."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from specjax import api
from specjax.draft_design import pruning, shapes
from specjax.hub.tokenizer import train_byte_bpe
from specjax.models.decoder import Decoder
from specjax.runtime.errors import UserError


@pytest.fixture(scope="module")
def source():
    """Three layers, four query heads on two key heads, with parts that do nothing: layer 1; of layer 0 the second key
    head's group, of layer 2 the first; of each layer's MLP all odd units."""
    model, params = tiny.decoder(0, layers=3, heads=4, kv_heads=2, head_size=4)
    blocks = {layer: jax.tree.map(jnp.array, block) for layer, block in params["blocks"].items()}
    for layer, idle in ((0, slice(4, 8)), (2, slice(0, 4))):
        value = blocks[layer]["attention"]["value"]
        value["kernel"] = value["kernel"].at[idle].set(0)
    for block in blocks.values():
        block["mlp"]["up"]["kernel"] = block["mlp"]["up"]["kernel"].at[1::2].set(0)
    for part, name in (("attention", "output"), ("mlp", "down")):
        blocks[1][part][name]["kernel"] = jnp.zeros_like(blocks[1][part][name]["kernel"])
    return model, {**params, "blocks": blocks}


@pytest.fixture(scope="module")
def texts():
    tokens, lengths = tiny.prompts(0, 4, 12, 24)
    return [(np.asarray(tokens), np.asarray(lengths))]


@pytest.fixture(scope="module")
def matters(source, texts):
    return pruning.importance(*source, texts)


@pytest.fixture(scope="module")
def stated():
    """What matters, as if it had been measured."""
    random = np.random.default_rng(0)
    return pruning.Importance(*(random.random(shape) for shape in ((3,), (3, 4), (3, 32), (16,))))


@pytest.mark.slow
def test_what_does_nothing_matters_least(matters):
    assert np.argmin(matters.layers) == 1 and matters.layers[1] == pytest.approx(0, abs=1e-6)
    assert (matters.heads[0, 2:] == 0).all() and (matters.heads[0, :2] > 0).all()
    assert (matters.heads[2, :2] == 0).all() and (matters.heads[2, 2:] > 0).all()
    assert (matters.mlp[:, 1::2] == 0).all() and (matters.mlp[:, ::2] > 0).all()
    assert (matters.width > 0).all()


@pytest.mark.slow
def test_what_does_nothing_is_not_missed(source, texts, matters):
    model, params = source
    shape = shapes.reshaped(model.config, layers=2, heads=2, kv_heads=1, mlp_width=16)
    pruned, left = pruning.prune(model, params, shape, matters)
    assert jax.tree.map(jnp.shape, left) == jax.tree.map(jnp.shape, Decoder(shape).abstract_params())
    tokens = jnp.asarray(texts[0][0])
    logits = tiny.full_logits(model, params, tokens)
    np.testing.assert_allclose(tiny.full_logits(pruned, left, tokens), logits, atol=1e-4)


@pytest.mark.slow
def test_padding_does_not_count(source, texts, matters):
    tokens, lengths = texts[0]
    padded = np.where(np.arange(tokens.shape[1])[None] < lengths[:, None], tokens, 7)
    assert (padded != tokens).any()
    again = pruning.importance(*source, [(padded, lengths)])
    for field in dataclasses.fields(pruning.Importance):
        np.testing.assert_allclose(getattr(again, field.name), getattr(matters, field.name), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_the_same_channels_and_heads_within_groups_are_cut_everywhere(source, stated):
    model, params = source
    shape = shapes.reshaped(model.config, width=10, heads=2, kv_heads=2)
    pruned, left = pruning.prune(model, params, shape, stated)
    assert jax.tree.map(jnp.shape, left) == jax.tree.map(jnp.shape, pruned.abstract_params())
    channels = np.sort(np.argsort(-stated.width, kind="stable")[:10])
    np.testing.assert_array_equal(left["embedding"], np.asarray(params["embedding"])[:, channels])
    first = int(np.argmax(stated.heads[0, :2]))
    queries = np.asarray(params["blocks"][0]["attention"]["query"]["kernel"])[:, channels][4 * first : 4 * first + 4]
    np.testing.assert_array_equal(left["blocks"][0]["attention"]["query"]["kernel"][:4], queries)


def test_nothing_is_cut_where_nothing_is_asked_for(source, stated):
    model, params = source
    pruned, left = pruning.prune(model, params, model.config, stated)
    assert pruned == model
    jax.tree.map(np.testing.assert_array_equal, left, params)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3", "opt"])
def test_a_pruned_model_is_exported_in_its_familys_layout_and_read_back(family, tmp_path):
    tokenizer = train_byte_bpe(["some text to begin with\n" * 9], 260)
    others = {
        "llama": {},
        "qwen3": {"qk_norm": True},
        "opt": {
            "rotary": None,
            "norm": "layer",
            "activation": "relu",
            "gated_mlp": False,
            "learned_positions": 514,
            "position_offset": 2,
            "attention_bias": True,
            "output_bias": True,
            "mlp_bias": True,
            "kv_heads": 4,
        },
    }
    config = tiny.config(vocab_size=260, layers=3, heads=4, kv_heads=2, head_size=4)
    config = dataclasses.replace(config, family=family, **others[family])
    model = Decoder(config)
    params = model.init(jax.random.key(0))
    tokens = np.arange(24).reshape(2, 12)
    matters = pruning.importance(model, params, [(tokens, np.asarray([12, 9]))])
    narrow = {} if family == "opt" else {"width": 8, "heads": 2, "kv_heads": 1}
    pruned, left = pruning.prune(model, params, shapes.reshaped(config, layers=1, mlp_width=16, **narrow), matters)
    api.save(api.Model(pruned, left, tokenizer), tmp_path / "pruned")
    loaded = api.load(tmp_path / "pruned")
    expected = tiny.full_logits(pruned, left, jnp.asarray(tokens))
    np.testing.assert_allclose(loaded.logits(tokens), expected, atol=1e-5)


@pytest.mark.parametrize("joint", [False, True])
def test_gains_of_heads_are_cut_with_the_heads_that_they_are_of(stated, joint):
    """Of one head all channels have one gain; of heads that are normalised together each channel has its own."""
    model = Decoder(tiny.config(layers=3, heads=4, kv_heads=2, head_size=4, qk_norm=True, joint_qk_norm=joint))
    counted = lambda x: jnp.arange(x.size, dtype=x.dtype).reshape(x.shape)
    shape = dataclasses.replace(model.config, heads=2, kv_heads=1)
    pruned, params = pruning.prune(model, jax.tree.map(counted, model.abstract_params()), shape, stated)
    jax.tree.map(lambda x, expected: np.testing.assert_equal(x.shape, expected.shape), params, pruned.abstract_params())
    kept = int(np.argmax(stated.heads[0].reshape(2, 2).sum(1)))
    expected = 8 * kept + np.arange(8) if joint else np.arange(4)
    np.testing.assert_array_equal(params["blocks"][0]["attention"]["query_norm"]["scale"], expected)


def test_what_pruning_cannot_do_is_refused(source, stated):
    model, params = source
    cut = lambda **changes: pruning.prune(model, params, dataclasses.replace(model.config, **changes), stated)
    with pytest.raises(UserError, match="layers is 3, and pruning cannot increase it to 4"):
        cut(layers=4)
    with pytest.raises(UserError, match=r"4 heads on 1 key/value heads are larger groups .*\(4 on 2\)"):
        cut(kv_heads=1)
    with pytest.raises(UserError, match="pruning changes only layers, heads and widths"):
        cut(norm_epsilon=1e-3, layers=2)
    with pytest.raises(UserError, match="there is no calibration text"):
        pruning.importance(model, params, [])
    for changes in ({"attention_sinks": True}, {"experts": 4, "experts_per_token": 2, "expert_width": 8}):
        with pytest.raises(UserError, match="with experts or attention sinks cannot be pruned"):
            pruning.importance(Decoder(dataclasses.replace(model.config, **changes)), params, [])
