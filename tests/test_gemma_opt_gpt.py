"""Gemma, OPT, GPT-2 and GPT-NeoX: what their `config.json` says is read, written back the same, or refused by name."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from specjax.hub.load import FAMILIES, load
from specjax.hub.save import save
from specjax.hub.tokenizer import train_byte_bpe
from specjax.models.config import DecoderConfig
from specjax.models.decoder import Decoder
from specjax.models.rotary import Rotary
from specjax.runtime.errors import UserError

DTYPES = {"param_dtype": "float32", "compute_dtype": "float32"}
FULL, SLIDING = "full_attention", "sliding_attention"
SHAPE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
NEEDED = {
    "gemma": {**SHAPE, "intermediate_size": 40},
    "gemma2": {**SHAPE, "intermediate_size": 40},
    "gemma3_text": {**SHAPE, "intermediate_size": 40},
    "opt": {**SHAPE, "ffn_dim": 40},
    "gpt2": {"vocab_size": 64, "n_embd": 32, "n_layer": 4, "n_head": 4},
    "gpt_neox": {**SHAPE, "intermediate_size": 40},
}
GEMMAS = ("gemma", "gemma2", "gemma3_text")


def read(family, **fields) -> DecoderConfig:
    named = {"num_key_value_heads": 2} if family in GEMMAS else {}
    return FAMILIES[family].read_config({"model_type": family, **NEEDED[family], **named, **fields}, **DTYPES)


# --- reading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", NEEDED)
def test_absent_fields_have_the_values_of_the_family(family):
    heads = {"num_attention_heads": 16} if family in GEMMAS else {}
    config = FAMILIES[family].read_config({**NEEDED[family], **heads}, **DTYPES)
    described = (config.kv_heads, config.head_size, config.mlp_width, config.max_positions, config.norm_epsilon)
    assert (
        described
        == {
            "gemma": (16, 256, 40, 8192, 1e-6),
            "gemma2": (4, 256, 40, 8192, 1e-6),
            "gemma3_text": (4, 256, 40, 131072, 1e-6),
            "opt": (4, 8, 40, 2048, 1e-5),
            "gpt2": (4, 8, 128, 1024, 1e-5),
            "gpt_neox": (4, 8, 40, 2048, 1e-5),
        }[family]
    )
    assert config.tied_head == (family != "gpt_neox")
    assert (config.rotary, config.local_rotary) == {
        "gemma": (Rotary(1e4, 256), None),
        "gemma2": (Rotary(1e4, 256), None),
        "gemma3_text": (Rotary(1e6, 256), Rotary(1e4, 256)),
        "gpt_neox": (Rotary(1e4, 2), None),
    }.get(family, (None, None))
    assert (config.attention_softcap, config.final_softcap) == ((50, 30) if family == "gemma2" else (0, 0))
    assert config.learned_positions == {"opt": 2050, "gpt2": 1024}.get(family, 0)


def test_null_is_no_soft_cap():
    config = read("gemma2", attn_logit_softcapping=None, final_logit_softcapping=None)
    assert (config.attention_softcap, config.final_softcap) == (0, 0)
    assert read("gemma3_text", final_logit_softcapping=30).final_softcap == 30


def test_embeddings_are_scaled_by_the_root_of_the_width_and_queries_by_the_given_scalar():
    config = read("gemma2", head_dim=16, query_pre_attn_scalar=144)
    assert (config.embedding_scale, config.query_scale) == (32**0.5, 1 / 12)
    assert read("gemma2", head_dim=16, query_pre_attn_scalar=16).query_scale is None


@pytest.mark.parametrize(
    "family, fields, windows",
    [
        ("gemma2", {}, (4096, 0, 4096, 0)),
        ("gemma2", {"sliding_window": 7}, (7, 0, 7, 0)),
        ("gemma2", {"sliding_window": 7, "layer_types": [FULL, SLIDING, SLIDING, FULL]}, (0, 7, 7, 0)),
        ("gemma2", {"sliding_window": None, "layer_types": [FULL] * 4}, ()),
        ("gemma3_text", {"sliding_window": 7}, (7, 7, 7, 7)),
        ("gemma3_text", {"sliding_window": 7, "sliding_window_pattern": 3}, (7, 7, 0, 7)),
        ("gemma3_text", {"sliding_window_pattern": 3, "layer_types": [FULL] * 4}, ()),
    ],
)
def test_windows_are_read_for_each_layer(family, fields, windows):
    assert read(family, **fields).windows == windows


def test_gemma3_turns_local_layers_by_a_base_of_their_own_in_old_files_and_new():
    full, local = Rotary(5e5, 256, "linear", factor=8.0), Rotary(3e3, 256)
    scaling = {"rope_type": "linear", "factor": 8.0}
    old = read("gemma3_text", rope_theta=5e5, rope_scaling=scaling, rope_local_base_freq=3e3)
    both = {FULL: {**scaling, "rope_theta": 5e5}, SLIDING: {"rope_type": "default", "rope_theta": 3e3}}
    new = read("gemma3_text", rope_parameters=both)
    assert (old.rotary, old.local_rotary) == (new.rotary, new.local_rotary) == (full, local)


def test_the_first_gemma_files_say_gelu_and_mean_its_approximation():
    assert read("gemma", hidden_act="gelu").activation == read("gemma").activation == "gelu_tanh"


def test_opt_350m_projects_its_embeddings_and_norms_after_the_sublayers():
    config = read("opt", word_embed_proj_dim=20, do_layer_norm_before=False)
    assert (config.embedding_width, config.order, config.final_norm) == (20, "post", False)
    config = read("opt", word_embed_proj_dim=32)
    assert (config.embedding_width, config.order, config.final_norm) == (0, "pre", True)
    assert not read("opt", _remove_final_layer_norm=True).final_norm


def test_neox_finds_the_share_of_turned_channels_under_either_name():
    turned = lambda **fields: read("gpt_neox", **fields).rotary
    assert turned(rotary_pct=0.5, rotary_emb_base=5e4) == Rotary(5e4, 4)
    assert turned(rope_parameters={"partial_rotary_factor": 0.5, "rope_theta": 5e4}) == Rotary(5e4, 4)
    assert turned(rope_parameters={"rope_theta": 5e4}) == Rotary(5e4, 2)
    assert turned(rope_scaling={"type": "linear", "factor": 2.0}, rotary_pct=1.0).kind == "linear"


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, fields, named",
    [
        ("gemma", {"hidden_act": "silu"}, "hidden_act"),
        ("gemma", {"hidden_activation": "gelu"}, "hidden_activation"),
        ("gemma", {"sliding_window": 7}, "sliding_window"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma2", {"layer_types": [FULL]}, "layer_types"),
        ("gemma2", {"sliding_window": None}, "layer_types"),
        ("gemma2", {"attn_logit_softcapping": -1}, "attn_logit_softcapping"),
        ("gemma2", {"final_logit_softcapping": "30"}, "final_logit_softcapping"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
        ("gemma2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma3_text", {"rope_parameters": {"rope_theta": 1e6}}, "rope_parameters"),
        ("gemma3_text", {"sliding_window_pattern": 0}, "sliding_window_pattern"),
        ("gemma3_text", {"rope_local_base_freq": -1.0}, "rope_theta"),
        ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine"),
        ("opt", {"scale_embeddings": True}, "scale_embeddings"),
        ("opt", {"activation_function": "quick_gelu"}, "activation_function"),
        ("opt", {"num_attention_heads": 5}, "num_attention_heads"),
        ("opt", {"ffn_dim": None}, "ffn_dim"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
        ("gpt2", {"activation_function": "tanh"}, "activation_function"),
        ("gpt2", {"n_head": 5}, "n_head"),
        ("gpt_neox", {"rotary_pct": 0.5, "partial_rotary_factor": 0.25}, "rotary_pct"),
        ("gpt_neox", {"rotary_emb_base": 5e4, "rope_parameters": {"rope_theta": 1e4}}, "rope_theta"),
        ("gpt_neox", {"rotary_pct": "all"}, "rotary_pct"),
        ("gpt_neox", {"num_attention_heads": 5}, "num_attention_heads"),
        ("gpt_neox", {"hidden_act": "tanh"}, "hidden_act"),
    ],
)
def test_what_a_family_cannot_compute_is_refused_by_its_name(family, fields, named):
    with pytest.raises(UserError, match=f'"{named}"') as caught:
        read(family, **fields)
    assert "\n" not in str(caught.value)


def test_neox_that_turns_an_odd_number_of_channels_is_refused():
    with pytest.raises(UserError, match=r"rotary part \(7\) must be even"):
        read("gpt_neox", hidden_size=44, rotary_pct=0.7)


# --- writing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, fields",
    [
        ("gemma", {"head_dim": 10, "attention_bias": True, "tie_word_embeddings": False}),
        ("gemma", {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}),
        ("gemma2", {"sliding_window": 7, "query_pre_attn_scalar": 144}),
        ("gemma2", {"head_dim": 10, "query_pre_attn_scalar": 10, "attn_logit_softcapping": None}),
        ("gemma2", {"layer_types": [FULL] * 4, "final_logit_softcapping": None}),
        ("gemma3_text", {"sliding_window": 7, "sliding_window_pattern": 2, "final_logit_softcapping": 3.5}),
        ("gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_local_base_freq": 3e3}),
        ("opt", {"word_embed_proj_dim": 20, "do_layer_norm_before": False}),
        ("opt", {"_remove_final_layer_norm": True, "enable_bias": False, "activation_function": "gelu"}),
        ("opt", {"max_position_embeddings": 40, "tie_word_embeddings": False}),
        ("gpt2", {"n_positions": 40, "n_inner": 20, "tie_word_embeddings": False}),
        ("gpt2", {"activation_function": "relu", "layer_norm_epsilon": 1e-3}),
        ("gpt_neox", {"use_parallel_residual": False, "attention_bias": False, "tie_word_embeddings": True}),
        ("gpt_neox", {"rotary_pct": 1.0, "rotary_emb_base": 5e4, "rope_scaling": {"type": "linear", "factor": 2.0}}),
        ("gpt_neox", {"hidden_size": 176, "rotary_pct": 0.69, "hidden_act": "gelu_new"}),
    ],
)
def test_what_is_written_is_read_as_the_same_decoder(family, fields):
    config = read(family, **fields)
    assert config.family == family
    assert FAMILIES[family].read_config(FAMILIES[family].write_config(config), **DTYPES) == config


@pytest.fixture(scope="module")
def tokenizer():
    return train_byte_bpe(["some words\n"] * 9, 260)


def exported(family, directory, tokenizer, **fields):
    """Random parameters, the directory to which they are written, and its tensors."""
    decoder = Decoder(read(family, vocab_size=272, **fields))
    params = tiny.random_params(decoder)
    save(directory, decoder, params, tokenizer)
    return params, load_file(directory / "model.safetensors")


def test_gpt2_files_fuse_queries_keys_and_values_and_store_kernels_by_input(tokenizer, tmp_path):
    params, stored = exported("gpt2", tmp_path / "export", tokenizer)
    attention, mlp = params["blocks"][1]["attention"], params["blocks"][1]["mlp"]
    parts = [attention[name] for name in ("query", "key", "value")]
    for kind, ours in (("weight", "kernel"), ("bias", "bias")):
        joined = np.concatenate([np.asarray(part[ours]).T for part in parts], axis=-1)
        np.testing.assert_array_equal(stored[f"transformer.h.1.attn.c_attn.{kind}"], joined)
        np.testing.assert_array_equal(stored[f"transformer.h.1.mlp.c_proj.{kind}"], mlp["down"][ours].T)


def test_neox_files_hold_query_key_and_value_of_one_head_after_another(tokenizer, tmp_path):
    params, stored = exported("gpt_neox", tmp_path / "export", tokenizer)
    attention = params["blocks"][1]["attention"]
    for kind, ours in (("weight", "kernel"), ("bias", "bias")):
        parts = [np.asarray(attention[name][ours]) for name in ("query", "key", "value")]
        heads = [part[8 * head : 8 * head + 8] for head in range(4) for part in parts]
        fused = stored[f"gpt_neox.layers.1.attention.query_key_value.{kind}"]
        np.testing.assert_array_equal(fused, np.concatenate(heads))


@pytest.mark.parametrize(
    "family, left_out, masks",
    [("gpt2", "transformer.", "h.0.attn.bias"), ("opt", "model.", None), ("gpt_neox", "", "layers.0.attention.bias")],
)
def test_files_without_the_name_of_the_inner_model_and_with_old_masks_load_the_same(
    family, left_out, masks, tokenizer, tmp_path
):
    params, stored = exported(family, tmp_path / "export", tokenizer)
    short = {name.removeprefix(left_out): values for name, values in stored.items()}
    if masks:
        short[masks if left_out else f"gpt_neox.{masks}"] = np.ones((1, 1, 4, 4), np.uint8)
    save_file(short, tmp_path / "export" / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "export")[1], params)


@pytest.mark.parametrize("family", NEEDED)
def test_no_learned_bias_is_taken_for_a_mask(family):
    names = {tensor.name for tensor in FAMILIES[family].tensors(read(family))}
    assert [name for name in names if name.endswith(FAMILIES[family].ignored)] == []


def test_the_table_of_names_must_hold_every_parameter():
    with pytest.raises(ValueError, match="No tensor is named for"):
        dataclasses.replace(FAMILIES["opt"], names={}).tensors(read("opt"))


# --- arithmetic ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "drafter, options",
    [
        pytest.param("ngram", {"shortest": 1, "longest": 3}, marks=pytest.mark.slow),
        ("early_exit", {"exit_layer": 1}),
    ],
)
def test_drafts_beyond_the_last_learned_position_change_nothing_before_it(drafter, options):
    slots, max_new = 8, 12
    config = tiny.config(max_positions=slots + max_new)
    model = Decoder(dataclasses.replace(config, rotary=None, learned_positions=slots + max_new))
    params = model.init(jax.random.key(1))
    texts, lengths = tiny.prompts(2, 3, slots, config.vocab_size)

    def decoded(gamma):
        plan = tiny.plan(model, drafter, options, gamma=gamma, slots=slots, max_new=max_new, greedy=True)
        return tiny.texts_of(tiny.decode(plan, params, None, texts, lengths, max_new))

    plain = decoded(0)
    assert len(plain[-1]) == slots + max_new
    assert decoded(5) == plain
