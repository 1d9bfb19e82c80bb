"""A checkpoint in 8-bit floats has the weights that transformers reads from it."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from specjax.hub.load import load
from tests.peers.family_configs import LLAMA

pytestmark = pytest.mark.peers


@pytest.mark.parametrize("scale_dtype", [np.float32, ml_dtypes.float8_e8m0fnu])
@pytest.mark.parametrize("block", [[4, 16], None])
def test_weights_are_those_of_transformers(tmp_path, block, scale_dtype):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", **{**LLAMA, "intermediate_size": 48})
    ).save_pretrained(tmp_path)
    tensors = {}
    random = np.random.default_rng(0)
    for name, values in load_file(tmp_path / "model.safetensors").items():
        if "_proj" in name:
            sizes = () if block is None else [size // step for size, step in zip(values.shape, block, strict=True)]
            tensors[name + "_scale_inv"] = np.asarray(2.0 ** random.integers(-6, 0, sizes)).astype(scale_dtype)
            values = (32 * values).astype(ml_dtypes.float8_e4m3fn)
        tensors[name] = values
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    path = tmp_path / "config.json"
    settings = {"quant_method": "fp8", "weight_block_size": block, "activation_scheme": "dynamic"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": settings}))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    _, params = load(tmp_path)
    for number, layer in enumerate(theirs.model.layers):
        for name in ("gate", "up", "down"):
            expected = getattr(layer.mlp, f"{name}_proj").weight.detach().numpy()
            np.testing.assert_array_equal(params["blocks"][number]["mlp"][name]["kernel"], expected)
