"""MXFP4 weights: the values of hand-written bytes, slices of a weight, and files whose parts do not fit each other."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from specjax.hub import mxfp4, quantised
from specjax.runtime.errors import UserError

NAME = "model.layers.0.mlp.experts.down_proj"
WHOLE = (slice(0, 2), slice(0, 64), slice(0, 3))


def directory(path, method="mxfp4", **tensors):
    """A checkpoint with these tensors, whose names are endings of one weight's."""
    (path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": method}}))
    save_file({NAME + ending: values for ending, values in tensors.items()}, path / "model.safetensors")
    return path


def random_parts():
    """Blocks and scales of 2 experts with 3 outputs and 64 inputs."""
    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (2, 3, 2, 16)).astype(np.uint8)
    return {"_blocks": blocks, "_scales": random.integers(120, 135, (2, 3, 2)).astype(np.uint8)}


def test_the_values_of_hand_written_bytes():
    """The first number of a byte is in its lower half: 0x21 is 0.5, then 1."""
    blocks = np.frombuffer(bytes.fromhex("1032547698badcfe0107f20000000080"), np.uint8)[None]
    numbers = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6, 0.5, 0, 6, 0, 1, -6, *[0] * 9, -0.0]
    for scale, factor in ((127, 1.0), (128, 2.0), (117, 2.0**-10), (0, 2.0**-127), (254, 2.0**127)):
        with np.errstate(over="ignore"):
            expected = np.asarray(numbers, np.float32) * np.float32(factor)
            decoded = mxfp4.decode(blocks, np.asarray([scale], np.uint8))
        np.testing.assert_array_equal(decoded.view(np.uint32), expected.view(np.uint32))
    assert np.isnan(mxfp4.decode(blocks, np.asarray([255], np.uint8))).all()


def test_a_slice_of_a_weight_has_the_values_of_its_blocks(tmp_path):
    parts = random_parts()
    stored = quantised.stored_in(directory(tmp_path, **parts, _bias=np.zeros((2, 3), np.float32)))
    assert set(stored) == {NAME, NAME + "_bias"}
    weight = stored[NAME]
    assert (weight.shape, weight.dtype) == ((2, 64, 3), "BF16")
    whole = mxfp4.decode(parts["_blocks"], parts["_scales"]).swapaxes(1, 2)
    for index in (WHOLE, (slice(1, 2), slice(30, 35), slice(0, 3, 2)), (slice(0, 2), slice(32, 33), slice(1, 2))):
        np.testing.assert_array_equal(weight.read(index), whole[index])


@pytest.mark.parametrize(
    "change, says",
    [
        (
            {"_scales": np.zeros((2, 3, 3), np.uint8)},
            r"has shape \[2, 3, 3\], but .* needs \[2, 3, 2\]; copy both",
        ),
        ({"_scales": np.zeros((2, 3, 2), np.float32)}, "_scales is stored as F32, not as U8"),
        ({"_blocks": np.zeros((2, 3, 32), np.uint8)}, r"_blocks has shape \[2, 3, 32\], not \[experts, outputs"),
        ({"_scales": None}, r"down_proj in .* lacks its scales \(.*down_proj_scales\); copy"),
    ],
)
def test_parts_that_do_not_fit_each_other_are_refused_in_one_sentence(tmp_path, change, says):
    parts = {ending: values for ending, values in (random_parts() | change).items() if values is not None}
    with pytest.raises(UserError, match=says) as caught:
        quantised.stored_in(directory(tmp_path, **parts))
    assert "\n" not in str(caught.value)


def test_an_unknown_method_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(UserError, match=r"method 'hqq'\), which is not supported; take .* quantised by .*mxfp4"):
        quantised.stored_in(directory(tmp_path, "hqq", **random_parts()))
