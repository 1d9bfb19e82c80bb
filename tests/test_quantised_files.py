"""FP8, GPTQ and AWQ checkpoints: values of slices, and files whose parts do not fit each other."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from specjax.hub import load as hub_load
from specjax.hub import quantised
from specjax.hub import save as hub_save
from specjax.hub.tokenizer import train_byte_bpe
from specjax.runtime.errors import UserError

NAME = "model.layers.0.mlp.up_proj"
INDICES = [(slice(0, 16), slice(0, 32)), (slice(3, 13), slice(5, 27)), (slice(8, 9), slice(31, 32))]
random = np.random.default_rng(0)
BLOCKS = {"quant_method": "fp8", "weight_block_size": [4, 16]}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 8}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 8, "version": "gemm"}


def stored(path, settings, tensors):
    """The weight of a checkpoint with these tensors."""
    (path / "config.json").write_text(json.dumps({"quantization_config": settings}))
    tensors = {NAME + ending: values for ending, values in tensors.items()}
    save_file(tensors | {"norm.weight": np.ones(3, np.float32)}, path / "model.safetensors")
    listed = quantised.stored_in(path)
    assert set(listed) == {NAME + ".weight", "norm.weight"}
    return listed[NAME + ".weight"]


def assert_slices(weight, expected):
    assert weight.shape == expected.shape
    for index in INDICES:
        np.testing.assert_allclose(weight.read(index), expected[index], rtol=1e-6)


def eight_bits():
    return random.standard_normal((16, 32)).astype(ml_dtypes.float8_e4m3fn)


def test_fp8_blocks_are_multiplied_by_their_scales(tmp_path):
    weight, scales = eight_bits(), random.uniform(0.5, 2, (4, 2)).astype(np.float32)
    expected = weight.astype(np.float32) * np.kron(scales, np.ones((4, 16), np.float32))
    assert_slices(stored(tmp_path, BLOCKS, {".weight": weight, ".weight_scale_inv": scales}), expected)


def test_fp8_has_one_scale_for_the_tensor_without_blocks_and_scales_may_be_powers_of_two(tmp_path):
    weight, scale = eight_bits(), np.asarray(0.25).astype(ml_dtypes.float8_e8m0fnu)
    settings = {"quant_method": "fp8", "weight_block_size": None}
    tensors = {".weight": weight, ".weight_scale_inv": scale, ".k_scale": np.ones((), np.float32)}
    assert_slices(stored(tmp_path, settings, tensors), weight.astype(np.float32) / 4)


@pytest.mark.parametrize("shape", [(1,), (16, 1), (4, 2)])
def test_compressed_tensors_have_a_scale_for_the_tensor_for_each_row_or_for_each_block(tmp_path, shape):
    weight, scales = eight_bits(), random.uniform(0.5, 2, shape).astype(ml_dtypes.bfloat16)
    tensors = {".weight": weight, ".weight_scale": scales, ".input_scale": np.ones(1, np.float32)}
    blocks = {"weights": {"strategy": "block", "block_structure": [4, 16]}} if shape == (4, 2) else {}
    settings = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": blocks}}
    spread = np.kron(scales.astype(np.float32), np.ones((4, 16), np.float32)) if blocks else scales.astype(np.float32)
    expected = weight.astype(np.float32) * spread
    assert_slices(stored(tmp_path, settings, tensors), expected)


def packed(numbers, order=range(8)):
    """Columns of 8 numbers as int32: place p, from the lowest bits, has number `order[p]`."""
    grouped = numbers.reshape(len(numbers), -1, 8).astype(np.uint32)
    return np.bitwise_or.reduce([grouped[..., n] << np.uint32(4 * p) for p, n in enumerate(order)], 0).view(np.int32)


def four_bits():
    """Numbers [I, O], zero points and scales of 4 groups [4, O], and float values [O, I] by the groups `which`."""
    numbers, zeros = random.integers(0, 16, (32, 16)), random.integers(0, 16, (4, 16))
    scales = random.uniform(0.01, 0.1, (4, 16)).astype(np.float16)
    values = lambda which: ((numbers - zeros[which]) * scales[which].astype(np.float32)).T.astype(np.float32)
    return numbers, zeros, scales, values


@pytest.mark.parametrize(
    "key, version", [("checkpoint_format", "gptq"), ("checkpoint_format", "gptq_v2"), ("format", "gptq_v2")]
)
def test_gptq_has_the_group_of_each_input_and_zero_points_less_one(tmp_path, key, version):
    numbers, zeros, scales, values = four_bits()
    which = random.permutation(np.arange(32) // 8).astype(np.int32)
    tensors = {
        ".qweight": np.ascontiguousarray(packed(numbers.T).T),
        ".qzeros": packed((zeros - 1) % 16 if version == "gptq" else zeros),
        ".scales": scales,
        ".g_idx": which,
    }
    assert_slices(stored(tmp_path, GPTQ | {key: version}, tensors), values(which))


def awq_tensors():
    numbers, zeros, scales, values = four_bits()
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    tensors = {".qweight": packed(numbers, order), ".qzeros": packed(zeros, order), ".scales": scales}
    return tensors, values(np.arange(32) // 8)


def test_awq_packs_the_even_outputs_first(tmp_path):
    tensors, values = awq_tensors()
    assert_slices(stored(tmp_path, AWQ, tensors), values)
    assert_slices(stored(tmp_path, AWQ | {"version": "GEMM"}, tensors), values)


@pytest.mark.parametrize(
    "settings, ending, sizes, message",
    [
        (BLOCKS, ".weight_scale_inv", (2, 2), r"\[2, 2\], but .*up_proj.weight of shape \[16, 32\] needs \[4, 2\]"),
        (BLOCKS | {"weight_block_size": [0, 1]}, "", (), r'"weight_block_size" is \[0, 1\]; it must be two positive'),
        (AWQ | {"group_size": 5}, "", (), '"group_size" is 5, which does not divide the 32 inputs'),
        (AWQ | {"bits": 3}, "", (), '"bits" is 3, which is not supported; take the checkpoint in 4 bits'),
        (AWQ | {"version": "gemv"}, "", (), "\"version\" is 'gemv', which is not supported"),
        (AWQ, ".scales", (2, 16), r"scales has shape \[2, 16\], but .*qweight in groups of 8 needs \[4, 16\]"),
        ({"quant_method": "hqq"}, "", (), "method 'hqq'.*not supported; .* or quantised by mxfp4, fp8"),
    ],
)
def test_parts_that_do_not_fit_are_refused_in_one_sentence(tmp_path, settings, ending, sizes, message):
    blocks = {".weight": eight_bits(), ".weight_scale_inv": np.ones((4, 2), np.float32)}
    tensors = awq_tensors()[0] if settings["quant_method"] == "awq" else blocks
    tensors = tensors | ({ending: np.ones(sizes, np.float16)} if ending else {})
    with pytest.raises(UserError, match=message):
        stored(tmp_path, settings, tensors)


def test_a_model_in_fp8_loads_as_floats_and_as_integers(tmp_path):
    model, params = tiny.decoder(0, vocab_size=512, width=32)
    directory = tmp_path / "model"
    hub_save.save(directory, model, params, train_byte_bpe(["some words, and some words again\n"] * 20, 270))
    tensors = {}
    for name, values in load_file(directory / "model.safetensors").items():
        if "proj" in name:
            tensors[name + "_scale_inv"] = np.full([-(-size // 16) for size in values.shape], 0.5, np.float32)
            values = (2 * values).astype(ml_dtypes.float8_e4m3fn)
        tensors[name] = values
    save_file(tensors, directory / "model.safetensors")
    fields = json.loads((directory / "config.json").read_text())
    fields["quantization_config"] = BLOCKS | {"weight_block_size": [16, 16]}
    (directory / "config.json").write_text(json.dumps(fields))
    decoder, read = hub_load.load(directory)
    assert decoder.config.param_dtype == "float32"  # auto, on CPU
    for ours, theirs in zip(jax.tree.leaves(read), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0.07, atol=2e-3)
    integers = hub_load.load(directory, param_dtype="int8")[1]
    up, floats = jax.tree.map(
        np.asarray, (integers["blocks"][0]["mlp"]["up"], read["blocks"][0]["mlp"]["up"]["kernel"])
    )
    assert np.all(np.abs(up["kernel"] * up["scales"] - floats) <= 0.5001 * up["scales"])
