"""MXFP4 numbers are those of transformers, and a gpt-oss checkpoint in MXFP4 computes what it does there."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from specjax.hub import mxfp4
from specjax.hub.load import load
from specjax.models.language_model import consecutive
from tests.peers.family_configs import FAMILIES, VOCAB

pytestmark = pytest.mark.peers


def random_parts(experts, outputs, inputs):
    random = np.random.default_rng(experts)
    blocks = random.integers(0, 256, (experts, outputs, inputs // 32, 16)).astype(np.uint8)
    return blocks, random.integers(118, 128, blocks.shape[:-1]).astype(np.uint8)


def test_decoded_numbers_are_those_of_transformers():
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, _ = random_parts(3, 5, 64)
    scales = np.random.default_rng(1).integers(1, 252, blocks.shape[:-1]).astype(np.uint8)
    theirs = convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales), dtype=torch.float32).numpy()
    np.testing.assert_array_equal(mxfp4.decode(blocks, scales).swapaxes(1, 2), theirs)


def test_a_checkpoint_computes_what_it_does_in_transformers(tmp_path):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, Mxfp4Config

    torch.manual_seed(0)
    fields = {**FAMILIES["gpt_oss"][0], "hidden_size": 64, "intermediate_size": 32}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_oss", **fields)).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    for name in [name for name in stored if name.endswith(("gate_up_proj", "experts.down_proj"))]:
        count, inputs, outputs = stored.pop(name).shape
        stored[f"{name}_blocks"], stored[f"{name}_scales"] = random_parts(count, outputs, inputs)
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": "mxfp4"}}))
    quantization = Mxfp4Config(dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantization, dtype=torch.float32)
    tokens = np.random.default_rng(2).integers(0, VOCAB, (2, 30))
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor(tokens)).logits.float().numpy()
    decoder, params = load(tmp_path, compute_dtype="float32")
    tokens = jnp.asarray(tokens, jnp.int32)

    @jax.jit
    def logits(params):
        return decoder.head(params, decoder.extend(params, None, tokens, consecutive(tokens))[0])

    assert np.abs(np.asarray(logits(params)) - expected).max() < 1e-4 * float(expected.std())
