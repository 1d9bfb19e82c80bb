"""DFlash drafts in their published layout: what is written, what is read, and what is refused."""

import dataclasses
import json
import logging

import jax
import numpy as np
import pytest
import tiny
from helpers import bits
from ml_collections import ConfigDict
from safetensors.numpy import load_file, save_file

from specjax import api
from specjax.decoding.drafters.table import build_drafter
from specjax.evaluation import cases
from specjax.hub import adapter as hub_adapter
from specjax.hub import dflash_config, draft_files
from specjax.hub.adapter import LoadedAttachment
from specjax.hub.tokenizer import train_byte_bpe
from specjax.models.block_parallel import BlockParallel, BlockParallelConfig
from specjax.models.decoder import Decoder
from specjax.models.rotary import Rotary
from specjax.models.vocabulary import draft_vocabulary
from specjax.runtime.errors import UserError

LAYERS, TENSORS = 8, "model.safetensors"
FILES = {"config.json", TENSORS, "speculative_config.json"}


@pytest.fixture(scope="module")
def target():
    return tiny.decoder(1, layers=LAYERS)


@pytest.fixture(scope="module")
def draft(target):
    network, own = tiny.block_parallel(*target, block_size=4, states_after=(2, 4, 7))
    return LoadedAttachment(network, own, "fingerprint")


@pytest.fixture
def published(draft, tmp_path):
    """A function that writes a draft as other tools do, with changes to the config and to the tensors."""

    def write(*, tensors=None, dflash=None, **changes):
        directory = tmp_path / "published"
        hub_adapter.save(directory, draft)
        path = directory / "config.json"
        fields = json.loads(path.read_text()) | changes
        if dflash is not None:
            fields["dflash_config"] |= dflash
        del fields["specjax"]
        path.write_text(json.dumps(fields))
        if tensors:
            save_file(tensors(load_file(directory / TENSORS)), directory / TENSORS)
        return directory

    return write


def test_a_draft_reads_back_with_and_without_our_key(target, draft, published, tmp_path):
    """The mask is written as an id, so -1 comes back as the target's last."""
    expected = dataclasses.replace(draft.network.config, mask_id=23)
    hub_adapter.save(tmp_path / "ours", draft)
    for directory, fingerprint in ((tmp_path / "ours", "fingerprint"), (published(), "")):
        loaded = hub_adapter.load(directory, target[0], target[1])
        assert (loaded.network.config, loaded.target) == (expected, fingerprint)
        assert bits(loaded.params) == bits(draft.params)


def test_the_files_have_the_published_names(draft, tmp_path):
    hub_adapter.save(tmp_path / "draft", draft)
    assert {path.name for path in (tmp_path / "draft").iterdir()} == FILES
    fields = json.loads((tmp_path / "draft" / "config.json").read_text())
    assert (fields["architectures"], fields["model_type"]) == (["DFlashDraftModel"], "qwen3")
    assert (fields["block_size"], fields["num_target_layers"], fields["num_hidden_layers"]) == (4, LAYERS, 2)
    assert fields["dflash_config"] == {"mask_token_id": 23, "target_layer_ids": [1, 3, 6]}
    tensors = load_file(tmp_path / "draft" / TENSORS)
    attention = [f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")]
    others = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm"]
    layers = {f"layers.{layer}.{name}.weight" for layer in range(2) for name in attention + others}
    assert set(tensors) == layers | {"fc.weight", "hidden_norm.weight", "norm.weight"}
    assert tensors["fc.weight"].shape == (16, 48)


def test_the_published_description_of_a_draft_for_qwen3_8b_is_read():
    """Sizes, states and mask token are those that its authors publish; all other fields leave the draft as it is."""
    sizes = {"vocab_size": 151936, "width": 4096, "heads": 32, "kv_heads": 8, "mlp_width": 12288, "qk_norm": True}
    target = tiny.config(layers=36, rope_theta=1e6, **sizes)
    target = dataclasses.replace(target, head_size=128, rotary=Rotary(1e6, 128), max_positions=40960, norm_epsilon=1e-6)
    fields = {
        "architectures": ["DFlashDraftModel"],
        "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "dtype": "bfloat16",
        "block_size": 16,
        "dflash_config": {"mask_token_id": 151669, "target_layer_ids": [1, 9, 17, 25, 33]},
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "layer_types": ["full_attention"] * 5,
        "max_position_embeddings": 40960,
        "max_window_layers": 5,
        "model_type": "qwen3",
        "num_attention_heads": 32,
        "num_hidden_layers": 5,
        "num_key_value_heads": 8,
        "num_target_layers": 36,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    }
    assert draft_files.described_format(fields) == (dflash_config.FORMAT, "z-lab")
    config = dflash_config.read(fields, "z-lab", target)
    assert config == BlockParallelConfig(target, layers=5, block_size=16, mask_id=151669)  # layers follow the target
    assert config.states_after == (2, 10, 18, 26, 34)


def test_vllm_is_told_the_draft_and_the_tokens_after_the_anchor(draft, tmp_path):
    hub_adapter.save(tmp_path / "draft", draft)
    engine = json.loads((tmp_path / "draft" / "speculative_config.json").read_text())
    assert engine == {"method": "dflash", "model": str(tmp_path / "draft"), "num_speculative_tokens": 3}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 32}, "reads hidden states of size 16, this target's have 32; load the target that it was trained"),
        ({"vocab_size": 30}, "for a tokenizer of 24 ids, and this target has 30; load the target"),
        ({"layers": 12}, "for a target of 8 layers, and this one has 12; load the target"),
        ({"embedding_scale": 4.0}, "programs do not agree whether its embeddings and logits are scaled"),
    ],
)
def test_a_draft_of_another_target_is_refused_by_what_differs(published, changes, message):
    other = Decoder(tiny.config(**{"layers": LAYERS, **changes}))
    with pytest.raises(UserError, match=message):
        hub_adapter.load(published(), other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dflash": {"target_layer_ids": [1, 8]}}, "reads the state after layer 9 of 8; load the target"),
        ({"dflash": {"target_layer_ids": [1, 7]}}, "the target's last, and programs do not agree whether that state"),
        ({"dflash": {"target_layer_ids": [3, 1]}}, r"states_after is \(4, 2\); give numbers of layers in ascending"),
        ({"dflash": {"target_layer_ids": [-1, 3]}}, r"states_after is \(0, 4\); give numbers of layers in ascending"),
        ({"dflash": {"target_layer_ids": "1, 3"}}, "\"target_layer_ids\" must be a list of layers, not '1, 3'"),
        ({"dflash": {"mask_token_id": 24}}, r"\"mask_token_id\" is 24, and the target has the ids 0 \.\. 23; load"),
        ({"dflash": {"mask_token_id": None}}, '"mask_token_id" is None, and the target has the ids'),
        ({"dflash": {"block_size": 8}}, '"block_size" is 4 and 8; one of them is wrong'),
        ({"dflash": {"selector_rank": 2}}, '"dflash_config" has "selector_rank": 2, which is not supported'),
        ({"dflash": {"sample_from_anchor": True}}, '"sample_from_anchor": True, which is not supported'),
        ({"dflash_config": None}, '"dflash_config" must be an object, not None'),
        ({"block_size": None}, '"block_size" is missing'),
        ({"model_type": "llama", "layer_types": None}, "with a window or without norms of queries and keys"),
        (
            {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["sliding_attention"] * 2},
            "has layers with a window",
        ),
        ({"draft_vocab_size": 12}, "has a reduced vocabulary, which is not supported; DFlash shares the target's head"),
        ({"architectures": ["DFlash2DraftModel"]}, r"\['DFlash2DraftModel'\] are unknown; the known ones are"),
    ],
)
def test_a_description_that_is_not_supported_is_refused(target, published, changes, message):
    directory = published(**changes)
    with pytest.raises(UserError, match=message) as error:
        hub_adapter.load(directory, target[0])
    assert str(error.value).startswith(f"{directory}/config.json: ") and "\n" not in str(error.value)


def test_an_embedding_is_not_exported(target, draft, tmp_path):
    with pytest.raises(UserError, match="the layout of DFlash holds no embedding; leave embedding out"):
        api.save_for_engines(tmp_path / "draft", draft, embedding=target[1]["embedding"])


def test_layers_of_the_users_own_choice_must_be_those_of_the_files(target, published):
    assert hub_adapter.load(published(), target[0], states_after=(2, 4, 7)).network.taps == (2, 4, 7)
    with pytest.raises(UserError, match=r"states_after is \(1, 3, 6\), and the draft's files say \(2, 4, 7\); leave"):
        hub_adapter.load(published(), target[0], states_after=(1, 3, 6))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors | {"lm_head.weight": tensors["fc.weight"]}, "also hold lm_head.weight; take the comp"),
        (
            lambda tensors: tensors | {"embed_tokens.weight": tensors["fc.weight"]},
            "another embedding than the target's",
        ),
        (lambda tensors: {k: v for k, v in tensors.items() if k != "hidden_norm.weight"}, "lack hidden_norm.weight"),
        (lambda tensors: tensors | {"norm.weight": tensors["norm.weight"][:8]}, r"norm\.weight in .* has shape \[8\]"),
    ],
)
def test_other_tensors_than_the_config_describes_are_refused(target, published, change, message):
    with pytest.raises(UserError, match=message):
        hub_adapter.load(published(tensors=change), *target)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        (
            {},
            {"vocabulary": draft_vocabulary([1, 2, 5])},
            "it has a reduced vocabulary, and the layout has none",
        ),
        ({}, {"confidence": True}, "it has a confidence head, and the layout has none; train without"),
        ({}, {"states_after": (4, 8)}, "reads the state after layer 8, the target's last"),
        ({"embedding_scale": 4.0}, {}, "programs do not agree whether its embeddings and logits are scaled"),
        ({"final_softcap": 30.0}, {}, "programs do not agree whether its embeddings and logits are scaled"),
        ({"learned_positions": 64, "rotary": None}, {}, "read token embeddings without learned positions"),
    ],
)
def test_what_the_layout_cannot_say_is_written_for_specjax_alone(changes, options, message, tmp_path, caplog):
    """Where a user asked for the layout, it is an error."""
    decoder = Decoder(dataclasses.replace(tiny.config(layers=LAYERS), **changes))
    network = BlockParallel(BlockParallelConfig(decoder.config, **{"states_after": (2,), **options}))
    loaded = LoadedAttachment(network, jax.eval_shape(network.init, jax.random.key(0)), "")
    loaded = dataclasses.replace(loaded, params=jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), loaded.params))
    with pytest.raises(UserError, match=f"the draft cannot be exported: .*{message}"):
        api.save_for_engines(tmp_path / "engines", loaded)
    with caplog.at_level(logging.WARNING):
        api.save_adapter(tmp_path / "ours", loaded)
    assert "is written for specjax alone" in caplog.text
    assert hub_adapter.load(tmp_path / "ours", decoder).network == network


@pytest.mark.slow
def test_a_draft_of_another_shape_than_the_targets_layers_reads_back_and_drafts(target, tmp_path):
    decoder, params = target
    layer = tiny.config(layers=3, heads=4, kv_heads=1, rope_theta=5e4, tied_head=False, qk_norm=True)
    layer = dataclasses.replace(layer, attention_bias=True, output_bias=True, mlp_width=20)
    network, own = tiny.block_parallel(decoder, layers=3, block_size=4, states_after=(2, 5), layer=layer, mask_id=9)
    own["blocks"][0]["attention"]["query"]["bias"] = jax.numpy.arange(32.0)
    hub_adapter.save(tmp_path / "draft", LoadedAttachment(network, own, ""))
    loaded = hub_adapter.load(tmp_path / "draft", decoder, params)
    assert loaded.network == network and bits(loaded.params) == bits(own)
    model = api.Model(decoder, params, train_byte_bpe(["x = 1\n" * 30], 258))
    how = {"temperature": 0.0, "max_new_tokens": 6, "eos_ids": (), "gamma": 2}
    assert api.generate(model, [[5, 6, 7]], drafter=loaded, **how).tokens == (
        api.generate(model, [[5, 6, 7]], **how).tokens
    )


def test_the_layer_ids_of_the_package_speculators_are_inputs(target, published):
    """Files in its layout name the same states by ids that are one higher."""
    fields = json.loads((published() / "config.json").read_text())
    drafting = fields.pop("dflash_config")
    described = {
        "speculators_model_type": "dflash",
        "transformer_layer_config": fields,
        "block_size": 4,
        "aux_hidden_state_layer_ids": [2, 4, 7],
        "mask_token_id": drafting["mask_token_id"],
    }
    config = dflash_config.read(described, "speculators", target[0].config)
    assert config.states_after == (2, 4, 7)
    with pytest.raises(UserError, match='"sample_from_anchor": True, which is not supported'):
        dflash_config.read(described | {"sample_from_anchor": True}, "speculators", target[0].config)


def test_a_configs_path_names_a_published_draft(target, published):
    section = {"kind": "block_parallel", "path": str(published()), "rules": {"lossless": (2,)}}
    config = ConfigDict({"target": "target", "leniences": (), "drafters": {"mine": section}})
    load_adapter = lambda path, model, states_after: hub_adapter.load(path, model.decoder, states_after=states_after)
    _, drafters = cases.load_models(config, lambda path: api.Model(*target, None), load_adapter)
    built = build_drafter(api.BlockParallelDraft(), target[0], 3, drafters["mine"].network)
    assert (built.taps, built.gamma) == ((2, 4, 7), 3)
    with pytest.raises(UserError, match='made for drafter "block_parallel", not for .*set kind to that'):
        build_drafter(api.Eagle3(), target[0], 3, drafters["mine"].network)
