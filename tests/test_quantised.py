"""Kernels kept in int8 and int4: their numbers and products, models that load and decode with them, and refusals."""

import dataclasses
import functools

import gguf_files
import jax
import jax.numpy as jnp
import lossless
import numpy as np
import pytest
import tiny

from specjax import api
from specjax.decoding.sampling import Sampling
from specjax.hub import load as hub_load
from specjax.hub import save as hub_save
from specjax.hub.tokenizer import train_byte_bpe
from specjax.models import experts, layers
from specjax.models.decoder import Decoder
from specjax.models.quantised import Quantised, quantise
from specjax.runtime import mesh as meshes
from specjax.runtime.errors import UserError

DTYPES = pytest.mark.parametrize("dtype", ("int8", "int4"))


def kernel(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# Each in one program: of its operations alone every shape would compile dozens.
@jax.jit
def floats_of(kernel):
    """The numbers that the integers and scales stand for; every byte of int4 holds two that follow in their group."""
    integers = kernel.values.reshape(*kernel.shape[:-1], -1, kernel.scales.shape[-1]).astype(jnp.int32)
    if kernel.values.dtype == jnp.uint8:
        pairs = jnp.stack([integers & 15, integers >> 4], -2) - 8
        integers = pairs.reshape(*kernel.shape[:-1], -1, kernel.scales.shape[-1])
    return (integers.astype(jnp.float32) * kernel.scales[..., None, :]).reshape(kernel.shape)


product = jax.jit(lambda rows, integers: layers.product(rows, integers, jnp.float32))
# What accelerators compute.
on_accelerators = jax.jit(lambda rows, integers: layers._summed(rows[None], integers, jnp.float32)[0])


def quantised_like(shapes, params, dtype):
    """Float parameters as integers and scales, where `shapes`, the parameters of a quantised model, have them."""
    if isinstance(params, dict):
        result = {}
        for name, value in params.items():
            if name == "kernel" and "scales" in shapes:
                result["kernel"], result["scales"] = quantise(value, dtype)
            else:
                result[name] = quantised_like(shapes[name], value, dtype)
        return result
    return params


def quantised_model(dtype, model, params):
    """The model and its parameters in this dtype."""
    model = Decoder(dataclasses.replace(model.config, param_dtype=dtype))
    return model, quantised_like(model.abstract_params(), params, dtype)


def float_like(params):
    """The inverse of `quantised_like`."""
    if not isinstance(params, dict):
        return params
    result = {name: float_like(value) for name, value in params.items() if name != "scales" or "kernel" not in params}
    if "scales" in params and "kernel" in params:
        result["kernel"] = floats_of(Quantised(params["kernel"], params["scales"]))
    return result


# --- numbers and products --------------------------------------------------------------------------------------------


def test_int8_has_a_scale_per_output_and_int4_one_per_group_of_inputs_at_equal_distances():
    eight = quantise(np.asarray([[1.27, -0.5, 0, 0.004], [0, 0, 0, 0]], np.float32), "int8")
    np.testing.assert_array_equal(eight.values, [[127, -50, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_allclose(eight.scales, [[0.01], [0]], rtol=1e-6)
    inputs = np.arange(512).reshape(1, 16, 32) % 7 - 3.0  # 16 groups of 32 inputs, which are the columns
    rows = np.ascontiguousarray(inputs.swapaxes(1, 2)).reshape(1, 512).astype(np.float32)
    rows[0, 5] = -16
    four = quantise(rows, "int4")
    assert (four.values.shape, four.values.dtype, four.scales.shape) == ((1, 256), np.uint8, (1, 16))
    assert four.scales[0, 5] == 2  # -16 / -8
    assert four.shape == (1, 512)
    values = np.asarray(floats_of(tiny.on_device(four)))
    assert values[0, 5] == -16 and set(values[0, 5::16] % 2) == {0}


@DTYPES
@pytest.mark.parametrize("inputs", [6, 64, 576, 896])
def test_every_number_is_the_nearest_multiple_of_its_scale(dtype, inputs):
    original = kernel(5, inputs)
    integers = quantise(original, dtype)
    values = np.asarray(floats_of(tiny.on_device(integers)))
    steps = np.abs(np.tile(integers.scales, inputs // integers.scales.shape[1]))
    # The largest code of int4 is 7, so a number near 8 is further away.
    assert np.all(np.abs(values - original) <= steps * (0.5001 if dtype == "int8" else 1.0001))
    if dtype == "int4" and inputs > 6:
        assert np.mean(np.abs(values - original) <= steps * 0.5001) > 0.95


@DTYPES
@pytest.mark.parametrize("inputs", [16, 576, 1792])
def test_products_of_any_number_of_rows_equal_those_with_the_dequantised_kernel(dtype, inputs):
    integers = tiny.on_device(quantise(kernel(24, inputs), dtype))
    exact = np.asarray(floats_of(integers), np.float64)
    rows = jnp.asarray(kernel(70, inputs, seed=1))
    for count in (1, 3, 9, 70):
        products = product(rows[None, :count], integers)[0]
        np.testing.assert_allclose(products, rows[:count] @ exact.T, atol=2e-5 * inputs**0.5)
    np.testing.assert_allclose(on_accelerators(rows, integers), rows @ exact.T, atol=2e-5 * inputs**0.5)


def test_a_loop_does_not_unpack_an_int4_kernel_to_four_bytes_a_number():
    kernel = quantise(jax.random.normal(jax.random.key(0), (1024, 1024)), "int4")

    def decode(inputs, kernel):
        body = lambda _, x: jnp.tanh(layers.product(x, kernel, jnp.float32))
        return jax.lax.fori_loop(0, 3, body, inputs)

    compiled = jax.jit(decode).lower(jnp.ones((1, 1, 1024)), kernel).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * 1024 * 1024


@DTYPES
@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_experts_have_quantised_kernels_too(dtype, platform, monkeypatch):
    config = tiny.config(experts=4, experts_per_token=2, expert_width=16, param_dtype=dtype)
    shapes = {"gate": (4, 16, 16), "up": (4, 16, 16), "down": (4, 16, 16)}
    stacked = {
        name: {"kernel": tiny.on_device(quantise(kernel(*shape, seed=len(name)), dtype))}
        for name, shape in shapes.items()
    }
    floats = {name: {"kernel": floats_of(kernels["kernel"])} for name, kernels in stacked.items()}
    inputs = jnp.asarray(kernel(2, 3, 16))
    choice = experts.choose(jnp.asarray(kernel(6, 4, seed=2)), config)
    choice = experts.Choice(*(x.reshape(2, 3, 2) for x in choice))
    mix = lambda kernels: jax.jit(lambda *arrays: experts.mix(config, *arrays))(inputs, choice, kernels)
    expected = mix(floats)
    monkeypatch.setattr(meshes, "platform", lambda: platform)
    np.testing.assert_allclose(mix(stacked), expected, rtol=1e-4, atol=1e-4)


# --- decoding --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@DTYPES
def test_the_loop_samples_the_distribution_of_a_quantised_target_with_the_unquantised_one_as_draft(dtype):
    target, params = lossless.small_target()
    small, integers = quantised_model(dtype, target, params)
    options = tiny.drafter_options("model", small, target)
    plan = lossless.small_plan(small, "model", options)
    assert lossless.p_value(plan, integers, params, Sampling.of(0.9), seed=1) > 1e-4


KINDS = ("model", "ngram", "early_exit")


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings, rule, kinds",
    [
        (lossless.GREEDY, "lossless", KINDS[:1]),
        pytest.param(lossless.GREEDY, "lossless", KINDS[1:], marks=pytest.mark.slow),
        pytest.param(lossless.COUPLED[:1], "coupled", KINDS, marks=pytest.mark.slow),
    ],
)
def test_speculation_with_quantised_models_keeps_every_token(settings, rule, kinds):
    target, params = tiny.decoder(0, sharpness=2.0)
    small, integers = quantised_model("int8", target, params)
    noisy = quantised_like(small.abstract_params(), tiny.with_noise(params, 0.1), "int8")
    pair = lossless.Pair(small, integers, noisy, *tiny.prompts(0, lossless.BATCH, lossless.SLOTS, lossless.VOCAB))
    drafts = [(pair.plan(kind, 3, rule, rule != "coupled"), noisy, {}) for kind in kinds]
    for _ in lossless.compare_with_plain(pair, settings, drafts, rule):
        pass


# --- loading ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A directory with a model in float32, and its parameters."""
    model, params = tiny.decoder(0, vocab_size=512, width=64, heads=8, head_size=8, kv_heads=4, mlp_width=128)
    directory = tmp_path_factory.mktemp("quantised") / "model"
    hub_save.save(directory, model, params, train_byte_bpe(["some words, and some words again\n"] * 20, 270))
    return directory, model, params


load = functools.partial(hub_load.load, compute_dtype="float32")


def assert_equal(read, expected):
    assert jax.tree.structure(read) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(read), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
@DTYPES
def test_a_checkpoint_is_quantised_while_it_is_loaded_piece_by_piece(dtype, exported, monkeypatch):
    directory, model, params = exported
    monkeypatch.setattr(hub_load, "_QUANTISED_BYTES", 4 * 64 * 5)
    decoder, read = load(directory, param_dtype=dtype)
    expected = quantised_like(decoder.abstract_params(), jax.tree.map(np.asarray, params), dtype)
    assert_equal(read, expected)
    assert decoder.num_params == model.num_params and decoder.num_step_params == model.num_step_params
    assert read["embedding"].dtype == jnp.float32
    difference = tiny.full_logits(decoder, read, jnp.ones((1, 4), jnp.int32))
    difference -= tiny.full_logits(model, float_like(read), jnp.ones((1, 4), jnp.int32))
    assert np.abs(difference).max() < 1e-3


@DTYPES
def test_every_device_has_its_part_of_integers_and_scales(dtype, exported):
    directory = exported[0]
    _, whole = load(directory, param_dtype=dtype)
    mesh = meshes.make_mesh({"data": 1, "fsdp": 2, "tensor": 4})
    placed = hub_load.describe(directory, param_dtype=dtype, compute_dtype="float32").shardings(mesh)
    _, parts = load(directory, param_dtype=dtype, shardings=placed)
    assert_equal(parts, whole)
    assert parts["blocks"][0]["mlp"]["up"]["kernel"].sharding.shard_shape((128, 32)) != (128, 32)


def test_a_gguf_file_is_quantised_again(exported, tmp_path):
    gguf_files.convert(exported[0], tmp_path / "model.gguf", kind="Q8_0")
    decoder, read = load(tmp_path / "model.gguf", param_dtype="int8")
    _, floats = load(tmp_path / "model.gguf", param_dtype="float32")
    floats = jax.tree.map(np.asarray, floats)
    assert_equal(read, quantised_like(decoder.abstract_params(), floats, "int8"))


@pytest.mark.slow
def test_a_quantised_copy_of_the_target_drafts_for_it(exported):
    directory = exported[0]
    target = api.load(directory, param_dtype="float32")
    draft = api.load(directory, param_dtype="int8")
    run = functools.partial(
        api.generate, target, ["some words", "and some"], temperature=0.0, max_new_tokens=20, eos_ids=()
    )
    plain, speculative = run(), run(drafter=draft, gamma=3)
    assert speculative.tokens == plain.tokens
    assert speculative.stats.block_efficiency > 2


# --- refusals --------------------------------------------------------------------------------------------------------


def test_integers_are_neither_saved_nor_made_of_values_that_are_not_finite(exported, tmp_path):
    model = api.load(exported[0], param_dtype="int8")
    with pytest.raises(UserError, match="quantised weights can only be decoded with; choose float32"):
        api.save(model, tmp_path / "copy")
    decoder, params = exported[1:]
    up = params["blocks"][0]["mlp"]["up"]
    broken = jax.tree.map(lambda x: x.at[0, 0].set(jnp.nan) if x is up["kernel"] else x, params)
    hub_save.save(tmp_path / "broken", decoder, broken, model.tokenizer)
    with pytest.raises(UserError, match="blocks.0.mlp.up.kernel has values that are not finite"):
        load(tmp_path / "broken", param_dtype="int8")


def test_int4_needs_an_even_number_of_inputs():
    with pytest.raises(UserError, match="int4 needs an even number of inputs, and a kernel has 3; choose int8"):
        quantise(kernel(2, 3), "int4")


def test_an_unknown_dtype_is_named_with_the_nearest(exported):
    with pytest.raises(UserError, match='there is no dtype "int9"; did you mean "int8"'):
        load(exported[0], param_dtype="int9")
