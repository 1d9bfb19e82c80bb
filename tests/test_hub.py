"""Exports lose no bit, and a directory that is not what we can compute is refused by name."""

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import toy_tokenizers
from helpers import bits, change_tensors
from safetensors.numpy import load_file, save_file
from tiny import random_params

from specjax.hub import adapter as hub_adapter
from specjax.hub import load as hub_load
from specjax.hub.load import load
from specjax.hub.model import Model, check_pair
from specjax.hub.save import FILES, save
from specjax.hub.tokenizer import Tokenizer, check_same_tokens, train_byte_bpe
from specjax.models.config import DecoderConfig
from specjax.models.decoder import Decoder
from specjax.models.rotary import Rotary
from specjax.runtime.errors import UserError

BASE = DecoderConfig(
    vocab_size=272,
    width=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_size=8,
    mlp_width=40,
    max_positions=96,
    rotary=Rotary(5e4, 8),
    norm_epsilon=1e-5,
    tied_head=True,
    param_dtype="float32",
    compute_dtype="float32",
)


@pytest.fixture(scope="module")
def tokenizer():
    return train_byte_bpe(["some words, and some words again\n"] * 20, 270)


@pytest.fixture(scope="module")
def exported(tokenizer, tmp_path_factory):
    directory = tmp_path_factory.mktemp("hub") / "export"
    decoder = Decoder(dataclasses.replace(BASE, tied_head=False))
    save(directory, decoder, random_params(decoder, 0), tokenizer)
    return directory


@pytest.fixture
def copy(exported, tmp_path):
    """A private copy of the export, to be damaged."""
    directory = tmp_path / "copy"
    directory.mkdir()
    for path in exported.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    return directory


def change_config(directory, **fields):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def drop_config(directory, *names):
    path = directory / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k not in names}))


@pytest.mark.parametrize(
    "tied, kv_heads, dtype",
    [
        (True, 1, "float32"),
        (False, 2, "float32"),
        (True, 4, "bfloat16"),
        (False, 1, "bfloat16"),
        (True, 2, "float16"),
        (False, 4, "float16"),
    ],
)
def test_a_round_trip_keeps_every_bit(tokenizer, tmp_path, tied, kv_heads, dtype):
    decoder = Decoder(dataclasses.replace(BASE, tied_head=tied, kv_heads=kv_heads, param_dtype=dtype))
    params = random_params(decoder, 1)
    save(tmp_path / "export", decoder, params, tokenizer)
    loaded, read = load(tmp_path / "export", param_dtype=dtype, compute_dtype="float32")
    assert loaded == decoder
    assert bits(read) == bits(params)
    assert Tokenizer.load(tmp_path / "export").fingerprint() == tokenizer.fingerprint()
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


@pytest.mark.parametrize("kind", ["byte_bpe", "llama_with_added_tokens"])
def test_an_export_keeps_a_tokenizer_from_elsewhere_whole(tmp_path, kind):
    toy_tokenizers.KINDS[kind](tmp_path / "source")
    tokenizer = Tokenizer.load(tmp_path / "source")
    decoder = Decoder(dataclasses.replace(BASE, vocab_size=512))
    save(tmp_path / "export", decoder, random_params(decoder, 1), tokenizer)
    again = Tokenizer.load(tmp_path / "export")
    assert again.fingerprint() == tokenizer.fingerprint()
    assert (again.eos_ids, again.bos_id, again.pad_id) == (tokenizer.eos_ids, tokenizer.bos_id, tokenizer.pad_id)
    messages = toy_tokenizers.MESSAGES
    assert again.apply_chat(messages) == tokenizer.apply_chat(messages)
    ends = json.loads((tmp_path / "export" / "generation_config.json").read_text())["eos_token_id"]
    assert ends == (list(tokenizer.eos_ids) if kind == "byte_bpe" else 2)


def test_a_pair_may_pad_its_vocabulary_to_different_sizes_but_not_differ_in_its_tokenizer(tokenizer):
    def model(size, tokenizer):
        decoder = Decoder(dataclasses.replace(BASE, vocab_size=size))
        return Model(decoder, random_params(decoder, 1), tokenizer)

    check_pair(model(272, tokenizer), model(288, tokenizer))
    with pytest.raises(UserError, match="different tokenizers"):
        check_pair(model(272, tokenizer), model(272, train_byte_bpe(["other words\n"] * 20, 262)))


def test_tokenizers_that_agree_on_every_id_make_a_pair_and_what_differs_is_logged(tmp_path, caplog):
    def variant(name, change):
        toy_tokenizers.llama_as_json(tmp_path / name)
        fields = json.loads((tmp_path / name / "tokenizer.json").read_text())
        change(fields)
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(fields))
        return Tokenizer.load(tmp_path / name)

    def add(content, special=True):
        def change(fields):
            index = len(fields["model"]["vocab"]) + len(fields["added_tokens"]) - 3
            flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
            fields["added_tokens"].append({"id": index, "content": content, "special": special, **flags})

        return change

    def swap(fields):
        vocabulary = fields["model"]["vocab"]
        vocabulary["▁t"], vocabulary["▁s"] = vocabulary["▁s"], vocabulary["▁t"]

    plain = variant("plain", lambda fields: None)
    toy_tokenizers.llama(tmp_path / "model")
    check_same_tokens(plain, variant("same", lambda fields: fields.update(truncation=None)))
    assert not caplog.records
    for other, note in (
        (variant("pad", add("<pad>")), "only the draft has '<pad>' (1 tokens)"),
        (
            variant("normal", lambda fields: fields.update(normalizer={"type": "NFC"})),
            "normalised or split differently",
        ),
        (Tokenizer.load(tmp_path / "model"), "normalised or split differently"),
    ):
        caplog.clear()
        check_same_tokens(plain, other)
        check_same_tokens(plain, other)  # remembered
        assert [note in record.getMessage() for record in caplog.records] == [True]
    reserved = variant("reserved", add("<|reserved_special_token_0|>"))
    check_same_tokens(reserved, variant("used", add("<|image|>")))
    for one, other in ((plain, variant("swap", swap)), (variant("a", add("<a>")), variant("b", add("<b>")))):
        with pytest.raises(UserError, match="different tokenizers; take .*id .* means .* and "):
            check_same_tokens(one, other)


def test_code_of_the_checkpoint_is_ignored_with_a_line(copy, caplog):
    change_config(copy, auto_map={"AutoModel": "modeling.Own"})
    load(copy)
    assert '"auto_map" is ignored' in caplog.text


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_a_tied_embedding_stored_as_the_head_alone_is_loaded(copy, prefix):
    def rename(tensors):
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
        for name in [name for name in tensors if name.startswith("model.")]:
            tensors[prefix + name.removeprefix("model.")] = tensors.pop(name)

    change_config(copy, tie_word_embeddings=True)
    change_tensors(copy, rename)
    decoder, params = load(copy)
    assert decoder.config.tied_head
    np.testing.assert_array_equal(params["embedding"], load_file(copy / "model.safetensors")["lm_head.weight"])


def test_every_parameter_lies_under_its_name_kernels_as_they_are(exported):
    stored = load_file(exported / "model.safetensors")
    _, params = load(exported)
    expected = {
        "model.embed_tokens.weight": params["embedding"],
        "model.norm.weight": params["norm"]["scale"],
        "lm_head.weight": params["unembedding"]["kernel"],
    }
    for layer, block in params["blocks"].items():
        attention, mlp = block["attention"], block["mlp"]
        named = {
            "input_layernorm": block["attention_norm"]["scale"],
            "self_attn.q_proj": attention["query"]["kernel"],
            "self_attn.k_proj": attention["key"]["kernel"],
            "self_attn.v_proj": attention["value"]["kernel"],
            "self_attn.o_proj": attention["output"]["kernel"],
            "post_attention_layernorm": block["mlp_norm"]["scale"],
            "mlp.gate_proj": mlp["gate"]["kernel"],
            "mlp.up_proj": mlp["up"]["kernel"],
            "mlp.down_proj": mlp["down"]["kernel"],
        }
        expected.update({f"model.layers.{layer}.{name}.weight": leaf for name, leaf in named.items()})
    assert set(stored) == set(expected)
    for name, leaf in expected.items():
        np.testing.assert_array_equal(stored[name], leaf, err_msg=name)
    assert stored["model.layers.0.self_attn.k_proj.weight"].shape == (16, 32)


def test_parameters_are_converted_to_the_asked_dtype(exported):
    _, wide = load(exported)
    decoder, narrow = load(exported, param_dtype="bfloat16")
    assert decoder.config.param_dtype == "bfloat16"
    assert bits(narrow) == bits(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), wide))


def test_shardings_are_obeyed_and_change_no_value(exported):
    count = 1 << min(3, len(jax.devices()).bit_length() - 1)  # a power of two, which divides every axis
    mesh = jax.sharding.Mesh(jax.devices()[:count], ("tensor",))
    axes = lambda leaf: jax.sharding.PartitionSpec(*([None] * (leaf.ndim - 1) + ["tensor"]))
    decoder, plain = load(exported)
    shardings = jax.tree.map(lambda leaf: jax.sharding.NamedSharding(mesh, axes(leaf)), decoder.abstract_params())
    _, sharded = load(exported, shardings=shardings)
    assert bits(sharded) == bits(plain)
    assert jax.tree.all(jax.tree.map(lambda leaf, wanted: leaf.sharding == wanted, sharded, shardings))


def test_an_export_replaces_an_earlier_one_as_a_whole(tokenizer, tmp_path):
    decoder = Decoder(BASE)
    save(tmp_path / "export", decoder, random_params(decoder, 1), tokenizer)
    params = random_params(decoder, 2)
    save(tmp_path / "export", decoder, params, tokenizer)
    assert bits(load(tmp_path / "export")[1]) == bits(params)
    written = {path.name for path in (tmp_path / "export").iterdir()}
    assert written <= set(FILES) and {"config.json", "model.safetensors", "tokenizer.json"} <= written
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_a_failing_export_leaves_the_earlier_one_alone(tokenizer, tmp_path, monkeypatch):
    decoder = Decoder(BASE)
    params = random_params(decoder, 1)
    save(tmp_path / "export", decoder, params, tokenizer)

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(UserError, match="export cannot be written .*No space left.*make room"):
        save(tmp_path / "export", decoder, random_params(decoder, 2), tokenizer)
    assert bits(load(tmp_path / "export")[1]) == bits(params)
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_an_earlier_export_comes_back_if_the_new_one_cannot_take_its_place(tokenizer, tmp_path, monkeypatch):
    decoder = Decoder(BASE)
    params = random_params(decoder, 1)
    save(tmp_path / "export", decoder, params, tokenizer)
    honest = os.rename

    def refuse_the_new(source, destination):
        if source.name == "new":
            raise PermissionError(13, "Permission denied")
        honest(source, destination)

    monkeypatch.setattr("os.rename", refuse_the_new)
    with pytest.raises(UserError, match="export cannot be written .*Permission denied"):
        save(tmp_path / "export", decoder, random_params(decoder, 2), tokenizer)
    assert bits(load(tmp_path / "export")[1]) == bits(params)
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_a_file_that_reads_back_differently_is_never_put_in_place(tokenizer, tmp_path, monkeypatch):
    import safetensors.numpy

    honest = safetensors.numpy.save_file

    def bend(tensors, path, metadata):
        honest({**tensors, "model.norm.weight": tensors["model.norm.weight"] * 2}, path, metadata=metadata)

    monkeypatch.setattr("safetensors.numpy.save_file", bend)
    decoder = Decoder(BASE)
    with pytest.raises(RuntimeError, match=r"model\.norm\.weight does not read back"):
        save(tmp_path / "export", decoder, random_params(decoder, 1), tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_with_other_files_is_not_exported_to(tokenizer, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    decoder = Decoder(BASE)
    params = random_params(decoder, 1)
    with pytest.raises(UserError, match=r"holds files of another kind \(thesis.tex\)"):
        save(tmp_path, decoder, params, tokenizer)
    with pytest.raises(UserError, match="is a file"):
        save(tmp_path / "thesis.tex", decoder, params, tokenizer)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_parameters_or_a_tokenizer_of_another_model_are_not_saved(tokenizer, tmp_path):
    decoder = Decoder(BASE)
    params = random_params(decoder, 1)
    other = random_params(Decoder(dataclasses.replace(BASE, mlp_width=48)), 1)
    with pytest.raises(UserError, match=r"\['mlp'\]\['down'\].*not what the config describes"):
        save(tmp_path / "export", decoder, other, tokenizer)
    with pytest.raises(UserError, match="not what the config describes"):
        save(tmp_path / "export", decoder, {**params, "extra": params["embedding"]}, tokenizer)
    small = Decoder(dataclasses.replace(BASE, vocab_size=260))
    with pytest.raises(UserError, match="tokenizer has 270 ids and the model only 260"):
        save(tmp_path / "export", small, random_params(small, 1), tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_old_and_new_ways_to_write_the_rotary_base_are_read(copy):
    drop_config(copy, "rope_theta")
    assert load(copy)[0].config.rotary.theta == 5e4
    drop_config(copy, "rope_parameters")
    assert load(copy)[0].config.rotary.theta == 1e4
    change_config(copy, rope_theta=7e4, rope_scaling=None)
    assert load(copy)[0].config.rotary.theta == 7e4
    change_config(copy, rope_parameters={"rope_type": "default", "rope_theta": 6e4})
    with pytest.raises(UserError, match='"rope_theta" is given twice and differently'):
        load(copy)


def test_absent_optional_fields_have_the_values_of_the_format(copy):
    optional = "num_key_value_heads head_dim max_position_embeddings rms_norm_eps attention_bias mlp_bias hidden_act"
    drop_config(copy, *optional.split())
    family, config = hub_load.read_config(copy, param_dtype="float32", compute_dtype="float32")
    assert family.model_type == "llama"
    assert (config.kv_heads, config.head_size, config.max_positions, config.norm_epsilon) == (
        4,
        8,
        2048,
        1e-6,
    )


@pytest.mark.parametrize(
    "field, value",
    [
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
        ("rope_scaling", {"type": "linear"}),
        ("rope_scaling", {"type": "linear", "factor": 2.0, "beta_fast": 2.0}),
        ("rope_scaling", {"type": "ntk"}),
        ("rope_scaling", 3),
        ("partial_rotary_factor", 0.5),
        ("attention_bias", 1),
        ("mlp_bias", "yes"),
        ("hidden_act", "gelu"),
        ("sliding_window", 4096),
        ("quantization_config", {"quant_method": "bitsandbytes"}),
        ("architectures", ["LlamaForSequenceClassification"]),
        ("hidden_size", "32"),
        ("num_hidden_layers", 0),
        ("rms_norm_eps", True),
        ("vocab_size", None),
        ("tie_word_embeddings", 1),
    ],
)
def test_a_config_that_asks_for_other_arithmetic_is_refused_by_the_field(copy, field, value):
    change_config(copy, **{field: value})
    with pytest.raises(UserError, match=f'config.json: .*"{field}"') as caught:
        load(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"head_dim": None, "hidden_size": 30}, '"hidden_size" 30 is no multiple of "num_attention_heads" 4'),
        ({"num_key_value_heads": 3}, r"heads \(4\) must be a multiple of kv_heads \(3\)"),
        ({"head_dim": 7}, r"rotary part \(7\) must be even"),
        ({"model_type": "mamba2"}, r"'mamba2' are not supported; the supported are llama, mistral"),
    ],
)
def test_an_impossible_or_unknown_model_is_refused(copy, fields, message):
    change_config(copy, **fields)
    with pytest.raises(UserError, match=message):
        load(copy)


def test_missing_and_unexpected_tensors_are_listed(copy):
    def swap(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.norm.weight"]

    change_tensors(copy, swap)
    with pytest.raises(UserError, match=r"lack model\.layers\.1\.mlp\.up_proj\.weight, model\.norm\.weight;"):
        load(copy)


def test_an_unexpected_tensor_is_named_and_a_frequency_table_is_not_minded(copy):
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    change_tensors(copy, lambda tensors: tensors.update(frequencies))
    load(copy)
    bias = {"model.layers.0.self_attn.q_proj.bias": np.ones(32, np.float32)}
    change_tensors(copy, lambda tensors: tensors.update(bias))
    with pytest.raises(UserError, match=r"hold model\.layers\.0\.self_attn\.q_proj\.bias, unknown"):
        load(copy)


def test_a_tied_head_may_be_stored_if_it_is_the_embedding(copy):
    head = lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]})
    untied = load(copy)[1]
    change_config(copy, tie_word_embeddings=True)
    with pytest.raises(UserError, match=r"lm_head\.weight .*differs from the embedding"):
        load(copy)
    change_tensors(copy, head)
    decoder, params = load(copy)
    assert decoder.config.tied_head
    assert "unembedding" not in params
    np.testing.assert_array_equal(params["embedding"], untied["embedding"])


def test_an_absent_head_is_answered_with_the_field_that_ties_it(copy):
    change_tensors(copy, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(UserError, match=r'lack lm_head\.weight; .*"tie_word_embeddings": true'):
        load(copy)


def test_a_tensor_of_the_wrong_shape_or_kind_is_named(copy):
    name = "model.layers.0.self_attn.v_proj.weight"
    change_tensors(copy, lambda tensors: tensors.update({name: np.ones((32, 16), np.float32)}))
    with pytest.raises(UserError, match=r"v_proj\.weight has shape \[32, 16\] where config.json describes \[16, 32\]"):
        load(copy)
    change_tensors(copy, lambda tensors: tensors.update({name: np.ones((16, 32), np.int8)}))
    with pytest.raises(UserError, match=r"v_proj\.weight is stored as I8; quantised weights"):
        load(copy)


@pytest.mark.parametrize("kept", [0, 7, 300, -1])
def test_a_truncated_weights_file_is_refused(copy, kept):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged or cut short"):
        load(copy)


def test_missing_files_are_named_with_what_to_do(copy, tmp_path):
    with pytest.raises(UserError, match=r"there is no .*nowhere/config\.json; name the directory"):
        load(tmp_path / "nowhere")
    (copy / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        load(copy)


@pytest.mark.parametrize("content", ["{", "[]", b"\xff\xfe\x00"])
def test_a_config_that_is_no_json_object_is_refused(copy, content):
    (copy / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=r"config\.json (cannot be read|holds no JSON object)"):
        load(copy)


def test_unknown_dtypes_are_refused(copy):
    with pytest.raises(UserError, match='float23.*did you mean "float32"'):
        load(copy, param_dtype="float23")
    with pytest.raises(UserError, match='there is no dtype "int9"'):
        load(copy, compute_dtype="int9")


def test_shards_named_by_an_index_are_read_together(copy, exported):
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    weight_map = {}
    for number in range(3):
        part = f"model-0000{number + 1}-of-00003.safetensors"
        names = sorted(tensors)[number::3]
        save_file({name: tensors[name] for name in names}, copy / part, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, part))
    index = copy / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert bits(load(copy)[1]) == bits(load(exported)[1])
    (copy / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00003\.safetensors is missing; copy it"):
        load(copy)
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "../elsewhere"}}))
    with pytest.raises(UserError, match='has no "weight_map" from tensors to files in its folder'):
        load(copy)


def test_fingerprints_stay_when_configs_get_new_fields():
    """Adapters and stored texts name their target by it: by some values of each parameter, and its config."""
    target = Decoder(tiny.config())
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), target.abstract_params())
    assert hub_adapter.fingerprint(target, zeros) == "ea8810df8d1fb5b363fe3772ebfeb81d"
    other = dataclasses.replace(target, config=dataclasses.replace(target.config, residual_scale=0.5))
    assert hub_adapter.fingerprint(other, zeros) != hub_adapter.fingerprint(target, zeros)
