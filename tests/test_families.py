"""Families in Llama's manner: what their `config.json` says is read, written back the same, or refused by its name."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file

from specjax.hub.families import rotary_fields
from specjax.hub.load import FAMILIES, load
from specjax.hub.save import save
from specjax.hub.tokenizer import train_byte_bpe
from specjax.models.config import DecoderConfig
from specjax.models.decoder import Decoder
from specjax.models.rotary import Rotary
from specjax.runtime.errors import UserError

DTYPES = {"param_dtype": "float32", "compute_dtype": "float32"}

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
}
FULL, SLIDING = "full_attention", "sliding_attention"
LONG = {"type": "longrope", "short_factor": [1, 1.5, 2, 2.5], "long_factor": [2, 3, 4, 5]}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24}


def read(family, **fields) -> DecoderConfig:
    return FAMILIES[family].read_config({"model_type": family, **SHAPE, **fields}, **DTYPES)


# --- reading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3", "olmo2", "granite"])
def test_absent_fields_have_the_values_of_the_family(family):
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    fields = {name: SHAPE[name] for name in needed} | {"hidden_size": 64, "num_attention_heads": 32}
    config = FAMILIES[family].read_config(fields, **DTYPES)
    described = (config.kv_heads, config.head_size, config.max_positions, config.norm_epsilon, config.rotary.theta)
    assert (
        described
        == {
            "llama": (32, 2, 2048, 1e-6, 1e4),
            "mistral": (8, 2, 131072, 1e-6, 1e4),
            "qwen2": (32, 2, 32768, 1e-6, 1e4),
            "qwen3": (32, 128, 32768, 1e-6, 1e4),
            "phi3": (32, 2, 4096, 1e-5, 1e4),
            "smollm3": (4, 2, 32768, 1e-6, 2e6),
            "olmo2": (32, 2, 2048, 1e-5, 1e4),
            "granite": (32, 2, 2048, 1e-6, 1e4),
        }[family]
    )
    assert config.windows == {"mistral": (4096,) * 4}.get(family, ())
    assert config.tied_head == (family == "smollm3")
    assert config.rotary_layers == ((True, True, True, False) if family == "smollm3" else ())


def test_biases_and_head_norms_are_those_of_the_family():
    described = lambda c: (c.attention_bias, c.output_bias, c.mlp_bias, c.qk_norm)
    assert described(read("llama", attention_bias=True)) == (True, True, False, False)
    assert described(read("llama", mlp_bias=True)) == (False, False, True, False)
    assert described(read("mistral")) == (False, False, False, False)
    assert described(read("qwen2")) == (True, False, False, False)
    assert described(read("qwen3")) == (False, False, False, True)
    assert described(read("qwen3", attention_bias=True)) == (True, True, False, True)
    assert described(read("phi3")) == (False, False, False, False)
    assert described(read("olmo2", attention_bias=True)) == (True, True, False, True)
    assert described(read("granite", mlp_bias=True)) == (False, False, True, False)


def test_granite_reads_its_four_factors_which_other_families_refuse():
    factors = {"embedding_multiplier": 12, "attention_multiplier": 0.25, "residual_multiplier": 0.5}
    config = read("granite", **factors, logits_scaling=8)
    described = (config.embedding_scale, config.query_scale, config.residual_scale, config.logit_divisor)
    assert described == (12, 0.25, 0.5, 8)
    assert read("granite").query_scale == 1
    for name, factor in (factors | {"logits_scaling": 8}).items():
        with pytest.raises(UserError, match=f'"{name}"'):
            read("olmo2", **{name: factor})


@pytest.mark.parametrize(
    "family, fields, windows",
    [
        ("mistral", {"sliding_window": 7}, (7, 7, 7, 7)),
        ("mistral", {"sliding_window": None}, ()),
        ("phi3", {"sliding_window": 7}, (7, 7, 7, 7)),
        ("phi3", {"sliding_window": None}, ()),
        ("qwen2", {"sliding_window": 7, "max_window_layers": 1}, ()),
        ("qwen2", {"sliding_window": 7, "max_window_layers": 1, "use_sliding_window": True}, (0, 7, 7, 7)),
        ("qwen2", {"sliding_window": 7, "max_window_layers": 28, "use_sliding_window": True}, ()),
        ("qwen2", {"sliding_window": None, "max_window_layers": 0, "use_sliding_window": True}, ()),
        (
            "qwen3",
            {
                "sliding_window": 7,
                "max_window_layers": 0,
                "use_sliding_window": True,
                "layer_types": [SLIDING, FULL, FULL, SLIDING],
            },
            (7, 0, 0, 7),
        ),
        ("qwen3", {"layer_types": [FULL] * 4}, ()),
        (
            "smollm3",
            {"sliding_window": 7, "use_sliding_window": True, "no_rope_layers": [1, 0, 1, 0]},
            (0, 7, 0, 7),
        ),
    ],
)
def test_windows_are_read_for_each_layer(family, fields, windows):
    assert read(family, **fields).windows == windows


def test_no_rope_layers_names_the_layers_that_turn():
    assert read("smollm3", no_rope_layers=[1, 0, 1, 1, 0]).rotary_layers == (True, False, True, True)
    assert read("smollm3", no_rope_layer_interval=2).rotary_layers == (True, False, True, False)
    assert read("smollm3", no_rope_layers=[1, 1, 1, 1]).rotary_layers == ()


def test_phi3_reads_the_original_length_next_to_the_scaling():
    rotary = read("phi3", rope_scaling=LONG, original_max_position_embeddings=24).rotary
    assert (rotary.kind, rotary.original_positions, rotary.factor, rotary.magnitude) == ("longrope", 24, 4.0, None)
    old = read("phi3", rope_scaling={**LONG, "type": "su"}, original_max_position_embeddings=24)
    assert old.rotary == rotary
    half = {**LONG, "short_factor": [1, 2], "long_factor": [3, 4]}
    assert read("phi3", rope_scaling=half, partial_rotary_factor=0.5).rotary.size == 4


def test_code_that_checkpoints_bring_is_ignored():
    own = {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
    assert read("phi3", auto_map=own) == read("phi3")
    assert read("llama", auto_map=own) == read("llama")


def test_yarn_magnitudes_follow_the_fields_that_state_them():
    magnitude = lambda **fields: read("llama", rope_scaling={**YARN, **fields}).rotary.scale
    grown = 0.1 * np.log(4.0)
    assert magnitude() == pytest.approx(grown + 1)
    assert magnitude(attention_factor=1.3, mscale=2.0, mscale_all_dim=0.5) == 1.3
    assert magnitude(mscale=2.0) == pytest.approx(grown + 1)
    assert magnitude(mscale=2.0, mscale_all_dim=0.5) == pytest.approx((2 * grown + 1) / (0.5 * grown + 1))


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, fields, named",
    [
        ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("qwen3", {"head_dim": 8, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("mistral", {"attention_bias": True}, "attention_bias"),
        ("mistral", {"layer_types": [FULL] * 4}, "layer_types"),
        ("mistral", {"sliding_window": 0}, "sliding_window"),
        ("mistral", {"hidden_act": "relu"}, "hidden_act"),
        ("qwen2", {"use_mrope": True}, "use_mrope"),
        ("qwen2", {"mlp_bias": True}, "mlp_bias"),
        ("qwen2", {"layer_types": [FULL]}, "layer_types"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 4}, "layer_types"),
        ("qwen2", {"layer_types": [SLIDING] * 4, "sliding_window": 7}, "use_sliding_window"),
        ("qwen2", {"max_window_layers": "all"}, "max_window_layers"),
        ("qwen3", {"attention_bias": 1}, "attention_bias"),
        ("olmo2", {"clip_qkv": 8.0}, "clip_qkv"),
        ("olmo2", {"mlp_bias": True}, "mlp_bias"),
        ("granite", {"residual_multiplier": 0}, "residual_multiplier"),
        ("granite", {"logits_scaling": "8"}, "logits_scaling"),
        ("phi3", {"lm_head_bias": True}, "lm_head_bias"),
        ("phi3", {"rope_scaling": YARN, "original_max_position_embeddings": 24}, "rope_scaling"),
        (
            "phi3",
            {
                "rope_scaling": {**LONG, "original_max_position_embeddings": 24},
                "original_max_position_embeddings": 48,
            },
            "original_max_position_embeddings",
        ),
        ("phi3", {"rope_scaling": {**LONG, "long_factor": 3}}, "long_factor"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers"),
        ("smollm3", {"no_rope_layers": [1, 0, 2, 0]}, "no_rope_layers"),
        (
            "llama",
            {"rope_scaling": {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 48}},
            "original_max_position_embeddings",
        ),
        ("llama", {"rope_scaling": YARN, "original_max_position_embeddings": 48}, "original_max_position_embeddings"),
    ],
)
def test_what_a_family_cannot_compute_is_refused_by_its_name(family, fields, named):
    with pytest.raises(UserError, match=f'"{named}"') as caught:
        read(family, **{"head_dim": 8, **fields})
    assert "\n" not in str(caught.value)


def test_longrope_factors_of_the_wrong_number_are_refused():
    with pytest.raises(UserError, match="longrope has 4 factors for 3 pairs"):
        read("phi3", rope_scaling=LONG, partial_rotary_factor=0.75)


# --- writing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, fields",
    [
        ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.5}, "rope_theta": 5e5}),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.5}}),
        ("llama", {"rope_scaling": {**YARN, "truncate": False, "beta_fast": 16, "mscale": 2, "mscale_all_dim": 0.5}}),
        ("llama", {"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}}),
        ("mistral", {"sliding_window": 7, "head_dim": 10}),
        ("mistral", {"sliding_window": None, "num_key_value_heads": 4}),
        ("qwen2", {"rope_parameters": YARN}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 7, "layer_types": [SLIDING, FULL, SLIDING, FULL]}),
        ("qwen3", {"attention_bias": True, "head_dim": 20}),
        ("olmo2", {"attention_bias": True, "rope_scaling": YARN}),
        ("granite", {"embedding_multiplier": 12, "attention_multiplier": 0.3, "logits_scaling": 3, "mlp_bias": True}),
        ("phi3", {"sliding_window": 7}),
        ("phi3", {"head_dim": 44, "partial_rotary_factor": 0.69}),
        ("phi3", {"rope_scaling": LONG, "original_max_position_embeddings": 24}),
        ("phi3", {"rope_scaling": {**LONG, "factor": 7.0}, "original_max_position_embeddings": 24}),
        ("phi3", {"rope_scaling": {**LONG, "attention_factor": 1.5}, "original_max_position_embeddings": 24}),
        ("smollm3", {"no_rope_layers": [0, 1, 0, 1], "attention_bias": True, "tie_word_embeddings": False}),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 7, "no_rope_layer_interval": 2}),
    ],
)
def test_what_is_written_is_read_as_the_same_decoder(family, fields):
    config = read(family, **fields)
    assert config.family == family
    written = FAMILIES[family].write_config(config)
    assert FAMILIES[family].read_config(written, **DTYPES) == config


def test_every_partial_rotary_size_survives_being_a_fraction():
    for head_size in range(40, 60):
        for size in range(2, head_size, 2):
            written = rotary_fields.written_rotary(Rotary(1e4, size), head_size)
            assert rotary_fields.rotary_of(written, head_size, 64).size == size


def test_old_readers_of_phi3_find_the_three_fields_that_they_demand():
    config = read("phi3", rope_scaling=LONG, original_max_position_embeddings=24)
    written = FAMILIES["phi3"].write_config(config)
    assert set(written["rope_scaling"]) == {"type", "short_factor", "long_factor"}
    assert written["original_max_position_embeddings"] == 24


def test_phi3_files_fuse_queries_keys_and_values_and_gate_and_up(tmp_path):
    decoder = Decoder(read("phi3", vocab_size=272, num_hidden_layers=1))
    params = tiny.random_params(decoder)
    save(tmp_path / "export", decoder, params, train_byte_bpe(["some words\n"] * 9, 260))
    stored = load_file(tmp_path / "export" / "model.safetensors")
    attention, mlp = params["blocks"][0]["attention"], params["blocks"][0]["mlp"]
    joined = lambda parts: np.concatenate([np.asarray(part["kernel"]) for part in parts])
    np.testing.assert_array_equal(
        stored["model.layers.0.self_attn.qkv_proj.weight"],
        joined([attention["query"], attention["key"], attention["value"]]),
    )
    np.testing.assert_array_equal(stored["model.layers.0.mlp.gate_up_proj.weight"], joined([mlp["gate"], mlp["up"]]))
    again, loaded = load(tmp_path / "export")
    assert again == decoder
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


# --- arithmetic ----------------------------------------------------------------------------------------------------


def plain(rotary):
    return rotary.theta ** (-np.arange(0, rotary.size, 2) / rotary.size)


def test_dynamic_positions_are_plain_until_the_text_outgrows_the_original_length():
    rotary = Rotary(1e4, 8, "dynamic", factor=2.0, original_positions=16)
    np.testing.assert_allclose(rotary.frequencies(jnp.asarray(16)), plain(rotary), rtol=1e-6)
    # At 48 tokens the base is multiplied by (2 * 48 / 16 - 1) ** (8 / 6).
    stretched = dataclasses.replace(rotary, theta=1e4 * 5 ** (4 / 3))
    np.testing.assert_allclose(rotary.frequencies(jnp.asarray(48)), plain(stretched), rtol=1e-5)


def test_longrope_takes_the_factors_of_the_length_of_the_text():
    rotary = read("phi3", rope_scaling=LONG, original_max_position_embeddings=24).rotary
    short, long = rotary.frequencies(jnp.asarray([24, 25]))
    np.testing.assert_allclose(short, plain(rotary) / np.asarray([1, 1.5, 2, 2.5]), rtol=1e-6)
    np.testing.assert_allclose(long, plain(rotary) / np.asarray([2, 3, 4, 5]), rtol=1e-6)
    assert rotary.scale == pytest.approx((1 + np.log(4) / np.log(24)) ** 0.5)


@pytest.mark.parametrize(
    "rotary",
    [
        Rotary(1e4, 32, "yarn", factor=4.0, original_positions=2048),
        Rotary(1e4, 32, "llama3", factor=4.0, original_positions=2048),
    ],
)
def test_fast_channels_are_left_alone_slow_ones_stretched_whole_and_the_rest_between(rotary):
    ratio = rotary.frequencies(jnp.asarray(0)) / plain(rotary)
    np.testing.assert_allclose(ratio[:4], 1, rtol=1e-5)
    np.testing.assert_allclose(ratio[-3:], 1 / 4, rtol=1e-5)
    assert (np.diff(ratio) <= 1e-6).all()
    assert ((ratio > 0.26) & (ratio < 0.99)).any()


def test_a_layer_that_does_not_turn_is_blind_to_the_order_of_what_it_reads():
    tokens = jnp.asarray([[3, 5, 7, 11]])
    swapped = jnp.asarray([[7, 3, 5, 11]])
    model, params = tiny.decoder(layers=1, rotary_layers=(False,))
    last = lambda model, tokens: np.asarray(tiny.full_logits(model, params, tokens))[0, -1]
    np.testing.assert_allclose(last(model, tokens), last(model, swapped), atol=1e-5)
    turning = Decoder(dataclasses.replace(model.config, rotary_layers=()))
    assert np.abs(last(turning, tokens) - last(turning, swapped)).max() > 1e-2


def test_layers_that_turn_are_counted():
    with pytest.raises(ValueError, match="rotary_layers has 1 entries for 2 layers"):
        tiny.config(rotary_layers=(True,))
