"""gpt-oss: its `config.json`, its files with all experts in one tensor, in bfloat16 and in MXFP4, and its exactness."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import tiny
import tokenizers
from lossless import COUPLED, EOS, GREEDY, MAX_NEW, Pair, assert_same_tokens, compare_with_plain
from safetensors.numpy import load_file, save_file

from specjax.decoding.sampling import Sampling
from specjax.hub import mxfp4
from specjax.hub.load import FAMILIES, load
from specjax.hub.save import save
from specjax.hub.tokenizer import Tokenizer, train_byte_bpe
from specjax.models import attention
from specjax.models.decoder import Decoder
from specjax.models.rotary import Rotary
from specjax.runtime import mesh as meshes
from specjax.runtime.errors import UserError

FULL, SLIDING = "full_attention", "sliding_attention"
FIELDS = {
    "model_type": "gpt_oss",
    "vocab_size": 272,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
DTYPES = {"param_dtype": "float32", "compute_dtype": "float32"}


def read(**fields):
    return FAMILIES["gpt_oss"].read_config({**FIELDS, **fields}, **DTYPES)


# --- the config ----------------------------------------------------------------------------------------------------


def test_absent_fields_have_the_values_of_the_family():
    named = {name: size for name, size in FIELDS.items() if name not in ("num_key_value_heads", "head_dim")}
    config = FAMILIES["gpt_oss"].read_config(named | {"num_attention_heads": 8}, **DTYPES)
    assert (config.kv_heads, config.head_size, config.max_positions, config.norm_epsilon) == (8, 64, 131072, 1e-5)
    yarn = {"factor": 32.0, "original_positions": 4096, "truncate": False}
    assert config.rotary == Rotary(150000.0, 64, "yarn", **yarn)
    assert (config.windows, config.swiglu_limit, config.swiglu_alpha) == ((128, 0), 7.0, 1.702)
    assert (config.attention_bias, config.output_bias, config.mlp_bias, config.attention_sinks) == (True,) * 4
    assert (config.experts, config.experts_per_token, config.expert_width) == (4, 2, 32)
    assert config.normalised_experts and not config.tied_head


def test_null_heads_follow_from_the_width_as_in_transformers():
    config = read(num_key_value_heads=None, head_dim=None)
    assert (config.kv_heads, config.head_size) == (2, 32)


def test_rotary_positions_that_the_file_states_are_not_replaced_by_the_familys():
    assert read(rope_parameters={"rope_type": "default", "rope_theta": 5e4}).rotary == Rotary(5e4, 8)
    assert read(rope_scaling={"rope_type": "linear", "factor": 2.0}).rotary == Rotary(1.5e5, 8, "linear", factor=2.0)


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"num_local_experts": None}, "num_local_experts"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok"),
        ({"swiglu_limit": -1}, "swiglu_limit"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"norm_topk_prob": False}, "norm_topk_prob"),
        ({"scoring_func": "sigmoid"}, "scoring_func"),
        ({"n_shared_experts": 1}, "n_shared_experts"),
        ({"sliding_window": None}, "layer_types"),
        ({"layer_types": ["chunked_attention"] * 2}, "layer_types"),
        ({"attn_logit_softcapping": 30.0}, "attn_logit_softcapping"),
    ],
)
def test_what_the_family_cannot_compute_is_refused_by_its_name(fields, named):
    with pytest.raises(UserError, match=f'"{named}"') as caught:
        read(**fields)
    assert "\n" not in str(caught.value)


def test_a_token_cannot_use_more_experts_than_there_are():
    with pytest.raises(UserError, match=r"experts_per_token \(5\) must be at most experts \(4\)"):
        read(num_experts_per_tok=5)


# --- files ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(directory, decoder, parameters) of an export with random values."""
    decoder = Decoder(read(sliding_window=5, num_hidden_layers=1))
    params = tiny.random_params(decoder)
    directory = tmp_path_factory.mktemp("gpt_oss") / "export"
    save(directory, decoder, params, train_byte_bpe(["some words\n"] * 9, 260))
    return directory, decoder, params


def test_an_export_has_gate_and_up_of_all_experts_in_turn_in_one_tensor(exported):
    directory, decoder, params = exported
    stored, mlp = load_file(directory / "model.safetensors"), params["blocks"][0]["mlp"]["experts"]
    prefix = "model.layers.0.mlp.experts."
    both = stored[prefix + "gate_up_proj"]
    assert both.shape == (4, 64, 64)
    np.testing.assert_array_equal(both[..., ::2], np.swapaxes(mlp["gate"]["kernel"], 1, 2))
    np.testing.assert_array_equal(both[..., 1::2], np.swapaxes(mlp["up"]["kernel"], 1, 2))
    np.testing.assert_array_equal(stored[prefix + "gate_up_proj_bias"][:, 1::2], mlp["up"]["bias"])
    np.testing.assert_array_equal(stored[prefix + "down_proj"], np.swapaxes(mlp["down"]["kernel"], 1, 2))
    assert "quantization_config" not in json.loads((directory / "config.json").read_text())
    again, loaded = load(directory)
    assert again == decoder
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


@pytest.fixture(scope="module")
def quantised(exported, tmp_path_factory):
    """The export with random MXFP4 kernels, and the same with the values of these in float32."""
    home, random = tmp_path_factory.mktemp("mxfp4"), np.random.default_rng(1)
    stored = load_file(exported[0] / "model.safetensors")
    kernels = [name for name in stored if name.endswith("_proj") and "experts" in name]
    assert len(kernels) == 2
    parts = {}
    for name in kernels:
        count, inputs, outputs = stored[name].shape
        blocks = random.integers(0, 256, (count, outputs, inputs // 32, 16)).astype(np.uint8)
        scales = random.integers(118, 128, blocks.shape[:-1]).astype(np.uint8)
        parts |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        stored[name] = np.ascontiguousarray(mxfp4.decode(blocks, scales).swapaxes(1, 2))
    for place, tensors in {
        "plain": stored,
        "quantised": {name: values for name, values in stored.items() if name not in kernels} | parts,
    }.items():
        shutil.copytree(exported[0], home / place)
        save_file(tensors, home / place / "model.safetensors")
    path = home / "quantised" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": "mxfp4"}}))
    return home


def test_an_mxfp4_checkpoint_is_the_model_with_the_values_of_its_numbers(quantised):
    (decoder, params), (plain, expected) = (load(quantised / place) for place in ("quantised", "plain"))
    assert decoder == plain
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_devices_dequantise_their_own_parts_of_an_mxfp4_checkpoint(quantised):
    _, expected = load(quantised / "plain")
    decoder, _ = load(quantised / "plain")
    mesh = meshes.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    _, params = load(quantised / "quantised", shardings=decoder.shardings(mesh))
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    kernel = params["blocks"][0]["mlp"]["experts"]["gate"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 32, 32)


# --- exactness -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair():
    """A target with windows, sinks and experts, whose draft is the same with noise."""
    options = {
        "windows": (5, 0),
        "attention_sinks": True,
        "attention_bias": True,
        "mlp_bias": True,
        "experts": 4,
        "experts_per_token": 2,
        "expert_width": 16,
        "swiglu_limit": 1.0,
        "swiglu_alpha": 1.702,
    }
    target, params = tiny.decoder(1, sharpness=2.0, **options)
    random = np.random.default_rng(5)
    normal = lambda x: np.float32(random.standard_normal(x.shape))
    noise = lambda path, x: 0.5 * normal(x) if path[-1].key in ("bias", "sinks") else 0
    stretch = lambda x: 3 * x if x.ndim == 3 else x
    params = jax.tree_util.tree_map_with_path(lambda path, x: stretch(x) + noise(path, x), params)
    blur = lambda x: x + 0.05 * x.std() * normal(x)
    return Pair(target, params, jax.tree.map(blur, params), *tiny.prompts(0, 256, 12, 24))


SLOW = pytest.mark.slow


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["lossless", pytest.param("coupled", marks=SLOW)])
@pytest.mark.parametrize("kind", ["model", pytest.param("ngram", marks=SLOW), pytest.param("early_exit", marks=SLOW)])
def test_speculative_decoding_gives_the_tokens_of_plain_decoding(pair, kind, rule):
    greedy = rule == "lossless"
    draft = (pair.plan(kind, 3, rule, greedy), pair.draft_params if kind == "model" else None, {})
    list(compare_with_plain(pair, GREEDY if greedy else COUPLED[:1], [draft], rule))


@dataclasses.dataclass(frozen=True)
class WithoutSinks(Decoder):
    """A Decoder of another class, so that it is compiled separately from the sound one."""


@SLOW
@pytest.mark.usefixtures("layers_by_themselves")
def test_equality_catches_sinks_that_verification_forgets(pair, monkeypatch):
    run = lambda plan: tiny.decode(plan, pair.params, pair.params, pair.texts, pair.lengths, MAX_NEW, eos=EOS)
    reference = run(pair.plan("ngram", 0, "lossless", True))
    sound = attention.attend_to_prefix

    def forgets(queries, *others, sinks=None, **how):
        return sound(queries, *others, sinks=None if queries.shape[2] == 4 else sinks, **how)

    monkeypatch.setattr(attention, "attend_to_prefix", forgets)
    faulty = dataclasses.replace(pair, target=WithoutSinks(pair.target.config))
    state = run(faulty.plan("ngram", 3, "lossless", True))
    with pytest.raises(AssertionError, match="row"):
        assert_same_tokens(pair, state, reference, Sampling.of(0.0), True)


# --- the tokenizer -------------------------------------------------------------------------------------------------

NAMES = ("endoftext", "return", "constrain", "channel", "start", "end", "message", "call")
HARMONY = tuple(f"<|{name}|>" for name in NAMES)
# Words, numbers of up to three digits, punctuation and spaces, as in the published file but for its letter classes.
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)


@pytest.fixture(scope="module")
def harmony(tmp_path_factory):
    """A byte-level BPE with the special tokens of the harmony format after its vocabulary."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(SPLIT), "isolated")
    to_bytes = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, to_bytes])
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["the channel of a message, and the analysis of 1234 words\n"] * 9, trainer)
    backend.add_special_tokens(list(HARMONY))
    directory = tmp_path_factory.mktemp("harmony")
    backend.save(str(directory / "tokenizer.json"))
    settings = {"eos_token": "<|return|>", "pad_token": "<|endoftext|>", "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    ends = [backend.token_to_id(token) for token in ("<|return|>", "<|endoftext|>", "<|call|>")]
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return Tokenizer.load(directory), {token: backend.token_to_id(token) for token in HARMONY}, ends


def test_special_tokens_of_harmony_survive_encoding_decoding_and_saving(harmony, tmp_path):
    tokenizer, ids, ends = harmony
    text = "<|start|>assistant<|channel|>analysis<|message|>It's 1234 words, naïve 日本.<|end|>"
    encoded = tokenizer.encode(text)
    special = [token for token in encoded if token in ids.values()]
    assert special == [ids[f"<|{name}|>"] for name in ("start", "channel", "message", "end")]
    assert tokenizer.decode(encoded) == "assistantanalysisIt's 1234 words, naïve 日本."
    assert list(tokenizer.eos_ids) == ends
    tokenizer.save(tmp_path)
    assert Tokenizer.load(tmp_path).encode(text) == encoded


def test_a_conversation_in_harmony_is_written_with_its_special_tokens(harmony):
    tokenizer, ids, _ = harmony
    written = tokenizer.apply_chat([{"role": "user", "content": "the <|end|> of 12"}])
    expected = tokenizer.encode("<|start|>user<|message|>the <|end|> of 12<|end|><|start|>assistant")
    assert written == expected and written[-len(tokenizer.encode("assistant")) - 1] == ids["<|start|>"]
