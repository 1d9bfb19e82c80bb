"""EAGLE-3 drafts in the layouts of SGLang and `speculators`: what is written, what is read, and what is refused."""

import dataclasses
import json
import re

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
from specjax.hub import eagle3_config
from specjax.hub import load as hub_load
from specjax.hub.adapter import LoadedAttachment
from specjax.hub.tokenizer import train_byte_bpe
from specjax.models.decoder import Decoder
from specjax.models.eagle3 import Eagle3Config
from specjax.models.vocabulary import draft_vocabulary
from specjax.runtime.errors import UserError

LAYERS, VOCAB, IDS, TENSORS = 8, 24, [1, 2, 5, 23], "model.safetensors"
FILES = {"config.json", TENSORS, "speculative_config.json"}
LAYOUTS = ("sglang", "speculators")


@pytest.fixture(scope="module")
def target():
    return tiny.decoder(1, layers=LAYERS)


@pytest.fixture(scope="module")
def draft(target):
    network, own = tiny.eagle3(*target, steps=3, vocabulary=draft_vocabulary(IDS))
    return LoadedAttachment(network, own, "fingerprint")


@pytest.fixture
def published(draft, tmp_path):
    """A function that writes a draft as other tools do, with changes to the config and to the tensors."""

    def write(layout="sglang", *, remove=(), tensors=None, **changes):
        directory = tmp_path / layout
        hub_adapter.save_for_engines(directory, draft, layout=layout, target_name="owner/target")
        path = directory / "config.json"
        fields = json.loads(path.read_text()) | changes
        kept = {name: value for name, value in fields.items() if name not in ("specjax", *remove)}
        path.write_text(json.dumps(kept))
        if tensors:
            save_file(tensors(load_file(directory / TENSORS)), directory / TENSORS)
        return directory

    return write


def config_of(target, **options):
    return Eagle3Config(target[0].config, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_draft_reads_back_from_either_layout_with_and_without_our_key(target, draft, published, tmp_path, layout):
    hub_adapter.save_for_engines(tmp_path / "ours", draft, layout=layout)
    ours = hub_adapter.load(tmp_path / "ours", target[0])
    assert (ours.network, ours.target) == (draft.network, "fingerprint")
    theirs = hub_adapter.load(published(layout), target[0])
    assert theirs.network.config.layer is None and theirs.network.taps == draft.network.taps
    assert theirs.network.config.vocabulary == draft.network.config.vocabulary and theirs.target == ""
    for loaded in (ours, theirs):
        assert bits(loaded.params) == bits(draft.params)


def test_the_files_have_the_published_names(draft, published):
    sglang, speculators = (load_file(published(layout) / TENSORS) for layout in LAYOUTS)
    assert {name.replace("midlayer.", "layers.0.") for name in sglang} == set(speculators)
    assert {"fc.weight", "midlayer.hidden_norm.weight", "midlayer.self_attn.q_proj.weight", "lm_head.weight"} < set(
        sglang
    )
    np.testing.assert_array_equal(sglang["d2t"], [1, 1, 3, 20])
    assert sglang["d2t"].dtype == np.int64 and np.flatnonzero(sglang["t2d"]).tolist() == IDS
    assert sglang["fc.weight"].shape == (16, 48)


def test_vllm_is_told_the_draft_and_the_number_of_tokens(published):
    directory = published()
    engine = json.loads((directory / "speculative_config.json").read_text())
    assert engine == {"method": "eagle3", "model": str(directory), "num_speculative_tokens": 3}


def test_default_layers_need_no_ids_and_others_have_those_that_vllm_reads(target):
    assert "eagle_config" not in eagle3_config.write(config_of(target), "sglang", {})
    other = config_of(target, states_after=(2, 3, 8))
    assert eagle3_config.write(other, "sglang", {})["eagle_config"][eagle3_config.IDS] == [2, 3, 8]
    assert eagle3_config.write(other, "speculators", {})[eagle3_config.IDS] == [2, 3, 8]


@pytest.mark.parametrize(
    ("layout", "options", "message"),
    [
        ("sglang", {"norm_before_residual": True}, "SGLang ignores norm_before_residual.*or export with layout"),
        ("sglang", {"states_after": (1, 4, 5)}, "that start with 1 as outputs"),
    ],
)
def test_what_a_layout_cannot_say_is_not_exported(target, layout, options, message):
    with pytest.raises(UserError, match=message):
        eagle3_config.write(config_of(target, **options), layout, {})


def test_what_other_programs_do_not_load_is_not_exported_for_them(target, draft, tmp_path):
    heads = LoadedAttachment(tiny.heads(target[0]), {}, "")
    with pytest.raises(UserError, match=r"load EAGLE-3 and block-parallel drafts only; save this adapter with api"):
        api.save_for_engines(tmp_path / "heads", heads)
    with pytest.raises(UserError, match='the layout of this draft must be one of speculators, sglang, not "gguf"'):
        api.save_for_engines(tmp_path / "draft", draft, layout="gguf")


EAGLE = {"eagle_config": {"use_aux_hidden_state": True, eagle3_config.IDS: [1, 3, 4]}}


def test_layer_ids_of_an_unknown_convention_are_asked_about(target, published):
    directory = published(**EAGLE)
    with pytest.raises(UserError, match=re.escape("set states_after to (1, 3, 4) for inputs")) as error:
        hub_adapter.load(directory, target[0])
    assert "or to (2, 4, 5) for outputs" in str(error.value) and "\n" not in str(error.value)
    for answer in ((1, 3, 4), [2, 4, 5]):
        assert hub_adapter.load(directory, target[0], states_after=answer).network.taps == tuple(answer)
    with pytest.raises(UserError, match=re.escape("states_after is (3, 4, 5), and the draft's files say (1, 3, 4) or")):
        hub_adapter.load(directory, target[0], states_after=(3, 4, 5))


def test_ids_in_the_layout_of_speculators_are_inputs_unless_they_are_the_outputs_that_others_default_to(
    target, published
):
    assert hub_adapter.load(published("speculators"), target[0]).network.taps == (2, 4, 5)
    with pytest.raises(UserError, match=r"states_after to \(1, 3, 4\) for inputs"):
        hub_adapter.load(published("speculators", **{eagle3_config.IDS: [1, 3, 4]}), target[0])


def test_a_stated_convention_cannot_be_overruled(target, draft, tmp_path):
    hub_adapter.save(tmp_path / "draft", draft)
    with pytest.raises(UserError, match=r"states_after is \(3, 4, 5\), and the draft's files say \(2, 4, 5\)"):
        hub_adapter.load(tmp_path / "draft", target[0], states_after=(3, 4, 5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 32}, "reads hidden states of size 16, this target's have 32; load the target that it was trained"),
        ({"vocab_size": 30}, "for a tokenizer of 24 ids, and this target has 30; load the target"),
        ({"layers": 12}, "for a target of 8 layers, and this one has 12; load the target"),
    ],
)
def test_a_draft_of_another_target_is_refused_by_what_differs(draft, tmp_path, changes, message):
    hub_adapter.save(tmp_path / "draft", draft)
    other = Decoder(tiny.config(**{"layers": LAYERS, **changes}))
    with pytest.raises(UserError, match=message):
        hub_adapter.load(tmp_path / "draft", other)


def test_layer_ids_beyond_the_target_are_refused(target, published):
    with pytest.raises(UserError, match="reads the state after layer 9 of 8; load the target"):
        hub_adapter.load(published("speculators", **{eagle3_config.IDS: [2, 4, 9]}), target[0])


def test_a_draft_with_another_tokenizer_is_refused(target, published):
    directory, model = published(), api.Model(*target, train_byte_bpe(["x = 1\n" * 30], 258))
    train_byte_bpe(["lorem ipsum\n" * 30], 270).save(directory)
    with pytest.raises(UserError, match="target and draft have different tokenizers"):
        api.load_adapter(directory, model)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([1, 1, 0, 20], "must hold each id once in ascending order, and 2 is repeated; sort it"),
        ([1, 3, 1, 20], "must hold each id once in ascending order, and 3 follows 4; sort it"),
        ([1, 1, 3, 30], r"names id 33, and the target has the ids 0 \.\. 23; take the draft of this target"),
        ([-1, 1, 3, 20], "names id -1, and the target has the ids"),
        ([1, 2, 3, 20], "d2t and t2d in .* name different ids; copy the draft again"),
    ],
)
def test_a_bad_map_of_the_draft_vocabulary_is_refused(target, published, offsets, message):
    directory = published(tensors=lambda tensors: tensors | {"d2t": np.asarray(offsets)})
    with pytest.raises(UserError, match=message) as error:
        hub_adapter.load(directory, target[0])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["DSparkModel"]}, r"\['DSparkModel'\] are unknown; the known ones are .*Eagle3.*DFlash"),
        ({"speculators_model_type": "peagle"}, "\"speculators_model_type\" 'peagle' are unknown; the known ones"),
        ({"num_hidden_layers": 2}, "has 2 layers or a window, which is not supported"),
        ({"model_type": "phi3"}, "layer of type 'phi3' is not supported; the supported are llama, qwen3"),
        ({"eagle_config": {"use_aux_hidden_state": False}}, '"use_aux_hidden_state" is false, which is not supported'),
        ({"norm_before_fc": True, "fc_norm": True}, "are both true; one of them is wrong"),
        ({"eagle_config": {eagle3_config.IDS: "2, 3"}}, "must be a list of layers, not '2, 3'"),
        ({"hidden_act": "gelu"}, "\"hidden_act\" is 'gelu', which is not supported"),
    ],
)
def test_an_architecture_that_is_not_supported_is_refused(target, published, changes, message):
    directory = published(**changes)
    with pytest.raises(UserError, match=message) as error:
        hub_adapter.load(directory, target[0])
    assert str(error.value).startswith(f"{directory}/config.json: ")


def test_a_residual_that_the_file_leaves_open_is_refused(target, published):
    with pytest.raises(UserError, match='"norm_before_residual" is missing, and programs assume different values'):
        hub_adapter.load(published("speculators", remove=("norm_before_residual",)), target[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors | {"extra.weight": tensors["fc.weight"]}, "also hold extra.weight; take the complete"),
        (lambda tensors: {k: v for k, v in tensors.items() if k != "lm_head.weight"}, "lack lm_head.weight; take"),
        (
            lambda tensors: tensors | {"fc.weight": tensors["fc.weight"][:, :32]},
            r"fc\.weight in .* has shape \[16, 32\]",
        ),
    ],
)
def test_other_tensors_than_the_config_describes_are_refused(target, published, change, message):
    with pytest.raises(UserError, match=message):
        hub_adapter.load(published(tensors=change), target[0])


def test_a_draft_is_no_model_of_its_own(published):
    with pytest.raises(UserError, match=r"a draft on another model's states; load that model, and give this directory"):
        hub_load.load(published())


def test_a_stored_copy_of_the_targets_embedding_is_not_loaded(target, draft, tmp_path):
    """Any other embedding is the draft's own."""
    decoder, params = target
    for name, scale in (("same", 1.0), ("other", 1.5)):
        hub_adapter.save_for_engines(tmp_path / name, draft, embedding=scale * params["embedding"])
        loaded = hub_adapter.load(tmp_path / name, decoder, params)
        assert loaded.network.config.own_embedding == (name == "other") == ("embedding" in loaded.params)
    np.testing.assert_array_equal(loaded.params["embedding"], 1.5 * params["embedding"])


@pytest.fixture
def narrow(target, tmp_path):
    """A draft of another width, with biases, norms and an embedding of its own: as saved, and as loaded."""
    decoder, params = target
    layer = tiny.config(layers=1, width=12, heads=4, kv_heads=2, rope_theta=5e4, tied_head=False, qk_norm=True)
    layer = dataclasses.replace(layer, attention_bias=True, output_bias=True)
    options = {"layer": layer, "own_embedding": True, "norm_before_fc": True, "norm_output": True}
    network, own = tiny.eagle3(decoder, **options)
    own["attention"]["query"]["bias"] = jax.numpy.arange(32.0)
    saved = LoadedAttachment(network, own, "")
    hub_adapter.save_for_engines(tmp_path / "draft", saved)
    return saved, hub_adapter.load(tmp_path / "draft", decoder, params)


def test_a_draft_of_another_shape_than_the_targets_layers_reads_back(narrow, tmp_path):
    saved, loaded = narrow
    assert loaded.network == saved.network and bits(loaded.params) == bits(saved.params)
    assert "input_norm.weight" in load_file(tmp_path / "draft" / TENSORS)
    with pytest.raises(UserError, match="no norms of queries and keys, or export with layout"):
        hub_adapter.save_for_engines(tmp_path / "sglang", loaded, layout="sglang")


@pytest.mark.slow
def test_a_draft_of_another_shape_than_the_targets_layers_drafts(target, narrow):
    (decoder, params), (_, loaded) = target, narrow
    model = api.Model(decoder, params, train_byte_bpe(["x = 1\n" * 30], 258))
    how = {"temperature": 0.0, "max_new_tokens": 6, "eos_ids": (), "gamma": 2}
    drafted = api.generate(model, [[5, 6, 7]], drafter=loaded, **how)
    assert drafted.tokens == api.generate(model, [[5, 6, 7]], **how).tokens


def test_a_config_names_the_layers_of_a_draft_that_leaves_them_open(target, published):
    """The option reaches the loader; one that differs from what was loaded is refused."""
    asked = []

    def load_adapter(path, model, states_after):
        asked.append((path, states_after))
        return hub_adapter.load(path, model.decoder, states_after=states_after)

    section = {
        "kind": "eagle3",
        "path": str(published(**EAGLE)),
        "states_after": (2, 4, 5),
        "rules": {"lossless": (2,)},
    }
    config = ConfigDict({"target": "target", "leniences": (), "drafters": {"mine": section}})
    model = api.Model(*target, None)
    _, drafters = cases.load_models(config, lambda path: model, load_adapter)
    assert asked == [(section["path"], (2, 4, 5))] and drafters["mine"].network.taps == (2, 4, 5)
    with pytest.raises(UserError, match=r"states_after is \(1, 3, 4\), and the draft was loaded with \(2, 4, 5\)"):
        build_drafter(api.Eagle3(states_after=(1, 3, 4)), target[0], 2, drafters["mine"].network)


def test_training_exports_the_published_layout(target, draft, tmp_path):
    hub_adapter.save(tmp_path / "export", draft, target_name="owner/target")
    assert {path.name for path in (tmp_path / "export").iterdir()} == FILES
    fields = json.loads((tmp_path / "export" / "config.json").read_text())
    assert fields["speculators_config"]["verifier"] == {
        "name_or_path": "owner/target",
        "architectures": ["LlamaForCausalLM"],
    }
    (tmp_path / "export" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds files of another kind \(notes.txt\)"):
        hub_adapter.save(tmp_path / "export", draft)
