"""A rank reads only its part, the host holds little more than that, and exports are cut into shards that load."""

import json
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
from helpers import bits, change_tensors
from safetensors.numpy import load_file, save_file

from specjax.hub import file_layout, weights
from specjax.hub import load as hub_load
from specjax.hub import save as hub_save
from specjax.hub.load import load
from specjax.hub.tokenizer import train_byte_bpe
from specjax.models.decoder import Decoder
from specjax.runtime import dtypes
from specjax.runtime import mesh as meshes
from specjax.runtime.errors import UserError

INDEX = "model.safetensors.index.json"
LIMIT = 60_000


@pytest.fixture(scope="module")
def tokenizer():
    return train_byte_bpe(["some words, and some words again\n"] * 20, 270)


@pytest.fixture(scope="module")
def model():
    decoder = Decoder(tiny.config(vocab_size=512, width=64, heads=8, kv_heads=4, mlp_width=256, tied_head=False))
    return decoder, tiny.random_params(decoder)


@pytest.fixture(scope="module")
def exported(model, tokenizer, tmp_path_factory):
    directory = tmp_path_factory.mktemp("loading") / "whole"
    hub_save.save(directory, *model, tokenizer)
    return directory


@pytest.fixture(scope="module")
def sharded(model, tokenizer, tmp_path_factory):
    directory = tmp_path_factory.mktemp("loading") / "sharded"
    hub_save.save(directory, *model, tokenizer, max_shard_bytes=LIMIT)
    return directory


@pytest.fixture
def copy(exported, tmp_path):
    """A private copy of the export, to be damaged."""
    for path in exported.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def ones(decoder):
    return jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), decoder.abstract_params())


def mesh(data=1, fsdp=2, tensor=4):
    return meshes.make_mesh({"data": data, "fsdp": fsdp, "tensor": tensor})


def shardings(decoder, **sizes):
    return meshes.shardings(decoder.axes(), mesh(**sizes))


# --- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [dict(), dict(data=8, fsdp=1, tensor=1), dict(data=2, fsdp=2, tensor=2)])
def test_a_device_reads_only_its_slices_and_every_value_arrives(model, sharded, sizes):
    decoder, params = model
    placed = shardings(decoder, **sizes)
    _, arriving = hub_load.stream(sharded, param_dtype="float32", compute_dtype="float32", shardings=placed)
    loaded = list(arriving)
    assert len(loaded) == len(jax.tree.leaves(params))
    for parameter in loaded:
        assert parameter.array.sharding == hub_load.at(placed, parameter.path)
        np.testing.assert_array_equal(parameter.array, hub_load.at(params, parameter.path))
        for shard in parameter.array.addressable_shards:
            assert parameter.file_bytes[shard.device] == shard.data.nbytes
    if not sizes:  # all matrices are split over all eight
        total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        of_rank = [sum(parameter.file_bytes[device] for parameter in loaded) for device in mesh().devices.flat]
        assert max(of_rank) < total / 8 * 1.02


def test_a_part_that_several_devices_share_is_read_once(model, exported, monkeypatch):
    decoder, params = model
    counted, honest = [], hub_load._part

    def count(*arguments):
        part, read = honest(*arguments)
        counted.append(read)
        return part, read

    monkeypatch.setattr(hub_load, "_part", count)
    load(exported, shardings=shardings(decoder, data=8, fsdp=1, tensor=1))
    assert sum(counted) == sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def largest(params):
    return max(leaf.nbytes for leaf in jax.tree.leaves(params))


def traced_peak(call):
    """Bytes of numpy's that were alive at once; those of JAX's devices are not traced."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        kept = call()
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    return peak, kept


SLACK = 1_000_000  # Python's own objects: headers, paths, compiled copies


@pytest.fixture(scope="module")
def large(tokenizer, tmp_path_factory):
    """8 layers, 52 MB, the largest tensor 2 MB."""
    decoder = Decoder(tiny.config(vocab_size=512, width=512, heads=8, kv_heads=4, mlp_width=1024, layers=8))
    params = ones(decoder)
    directory = tmp_path_factory.mktemp("loading") / "large"
    hub_save.save(directory, decoder, params, tokenizer)
    return directory, decoder, params


@pytest.mark.parametrize("spread", [False, True])
def test_while_loading_the_host_holds_about_one_tensor_more_than_the_arrays(large, spread, monkeypatch):
    directory, decoder, params = large
    monkeypatch.setattr(hub_load, "_PIECE_BYTES", 1 << 14)
    placed = (
        shardings(decoder)
        if spread
        else jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), params)
    )

    def stream():
        _, arriving = hub_load.stream(directory, param_dtype="bfloat16", compute_dtype="float32", shardings=placed)
        for _ in arriving:  # let go: on CPU an array may share the memory that it was read into
            pass

    stream()
    peak, _ = traced_peak(stream)
    # One that is being read, and the last one, which is let go a moment later.
    assert peak < 2 * largest(params) + SLACK < sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 4


def test_while_exporting_the_host_holds_about_one_shard_though_the_parameters_are_spread(large, tokenizer, tmp_path):
    _, decoder, params = large
    limit = 8_000_000
    spread = meshes.shard(params, decoder.axes(), mesh())
    export = lambda name: hub_save.save(tmp_path / name, decoder, spread, tokenizer, max_shard_bytes=limit)
    export("first")
    peak, _ = traced_peak(lambda: export("second"))
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert peak < limit + 2 * largest(params) + SLACK < total / 2


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 4])
def test_of_a_fused_tensor_a_rank_reads_its_part_alone(tmp_path, monkeypatch, transposed, groups):
    """Queries, keys and values of 8 channels each, one after another or head by head, over a file of small pieces."""
    monkeypatch.setattr(hub_load, "_PIECE_BYTES", 64)
    file = np.random.default_rng(0).normal(size=(6, 24) if transposed else (24, 6)).astype(np.float32)
    save_file({"fused": file}, tmp_path / "file.safetensors")
    stored = weights.tensors_in(tmp_path / "file.safetensors")["fused"]
    outputs = (file.T if transposed else file).reshape(groups, 3, 8 // groups, 6)
    for number in range(3):
        whole = outputs[:, number].reshape(8, 6)
        tensor = file_layout.Tensor(
            "fused", (), transposed, file_layout.Part(number * 8 // groups, 8 // groups, 24 // groups, groups)
        )
        for rows, columns in [(slice(0, 8), slice(0, 6)), (slice(0, 8), slice(2, 5)), (slice(3, 7), slice(0, 6))]:
            part, read = hub_load._part({"fused": stored}, [tensor], (rows, columns), np.dtype("float32"))
            np.testing.assert_array_equal(part, whole[rows, columns])
            assert read == part.nbytes


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("asked", ["float32", "bfloat16", "float16"])
def test_every_kind_of_float_is_read_into_every_other(model, copy, stored, asked):
    as_stored = lambda tensors: {name: t.astype(jnp.dtype(stored)) for name, t in tensors.items()}
    change_tensors(copy, as_stored)
    _, params = load(copy, param_dtype=asked)
    expected = jax.tree.map(lambda leaf: leaf.astype(stored).astype(asked), model[1])
    assert bits(params) == bits(expected)


def test_values_that_the_asked_dtype_cannot_hold_are_refused_by_the_tensor(copy):
    name = "model.layers.1.mlp.up_proj.weight"
    change_tensors(copy, lambda tensors: {**tensors, name: tensors[name].astype(ml_dtypes.bfloat16) * 0 + 1e5})
    load(copy, param_dtype="bfloat16")
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight has values that float16 cannot hold"):
        load(copy, param_dtype="float16")


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_mesh_that_does_not_divide_a_tensor_is_refused_by_its_name(tokenizer, tmp_path):
    decoder = Decoder(tiny.config(vocab_size=271))
    hub_save.save(tmp_path / "odd", decoder, ones(decoder), tokenizer)
    with pytest.raises(UserError, match=r"embed_tokens\.weight, of shape \[271, 16\] .*does not split evenly"):
        load(tmp_path / "odd", shardings=shardings(decoder))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth"])
def test_pytorch_files_alone_are_answered_with_how_to_convert_them(copy, name):
    (copy / "model.safetensors").rename(copy / name)
    with pytest.raises(UserError, match=rf"PyTorch files \({name}\).*save_pretrained\(NEW_DIR") as caught:
        load(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_is_refused_with_or_without_a_model_next_to_it(copy, tmp_path, name):
    (copy / name).write_text("{}")
    with pytest.raises(UserError, match=rf"holds an adapter \({name}\).*merge_and_unload"):
        load(copy)
    (copy / "config.json").unlink()
    with pytest.raises(UserError, match="holds an adapter"):
        load(copy)


@pytest.mark.parametrize("field", ["quantization_config", "compression_config"])
def test_a_config_of_quantised_weights_is_refused_with_the_method(copy, field):
    path = copy / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: {"quant_method": "bitsandbytes", "bits": 4}}))
    with pytest.raises(UserError, match=rf'"{field}" says that the weights are quantised \(method \'bitsandbytes\'\)'):
        load(copy)


@pytest.mark.parametrize("ending", ["qweight", "weight_scale", "SCB"])
def test_quantised_tensors_are_refused_by_their_name(copy, ending):
    name = f"model.layers.0.mlp.up_proj.{ending}"

    def quantise(tensors):
        del tensors["model.layers.0.mlp.up_proj.weight"]
        tensors[name] = np.ones((4, 4), np.int32)

    change_tensors(copy, quantise)
    with pytest.raises(UserError, match=rf"are quantised \({name}\)"):
        load(copy)


@pytest.mark.parametrize("dtype, message", [(np.int8, "I8"), (ml_dtypes.float8_e4m3fn, "F8_E4M3")])
def test_eight_bit_tensors_are_refused(copy, dtype, message):
    name = "model.layers.0.mlp.up_proj.weight"
    change_tensors(copy, lambda tensors: {**tensors, name: tensors[name].astype(dtype)})
    with pytest.raises(UserError, match=rf"up_proj\.weight is stored as {message}; quantised"):
        load(copy)


def test_names_and_shapes_are_judged_before_a_value_is_read(copy, monkeypatch):
    change_tensors(copy, lambda tensors: {**tensors, "lm_head.weight": np.ones((3, 3), np.float32)})
    monkeypatch.setattr(hub_load, "_part", lambda *_: pytest.fail("read"))
    with pytest.raises(UserError, match=r"lm_head\.weight has shape \[3, 3\]"):
        load(copy)


def test_a_tensor_stored_in_two_shards_is_refused(sharded, tmp_path):
    for path in sharded.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weight_map = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    other = next(file for file in weight_map.values() if file != weight_map["model.norm.weight"])
    more = {**load_file(tmp_path / other), "model.norm.weight": np.ones(64, np.float32)}
    save_file(more, tmp_path / other)
    with pytest.raises(UserError, match=r"model\.norm\.weight is stored twice"):
        load(tmp_path)


@pytest.mark.parametrize("kept", [0, 7, 300, -1])
def test_a_truncated_shard_is_named(sharded, tmp_path, kept):
    for path in sharded.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    damaged = sorted(tmp_path.glob("model-*.safetensors"))[1]
    damaged.write_bytes(damaged.read_bytes()[:kept])
    with pytest.raises(UserError, match=rf"{damaged.name} is damaged or cut short"):
        load(tmp_path)


# --- what is exported ------------------------------------------------------------------------------------------------


def test_an_export_beyond_the_limit_is_cut_into_shards_with_an_index(model, exported, sharded):
    whole = load_file(exported / "model.safetensors")
    index = json.loads((sharded / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    assert set(index["weight_map"]) == set(whole)
    files = sorted(path.name for path in sharded.glob("model*.safetensors"))
    count = len(files)
    assert count > 2 and files == [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    for file in files:
        tensors = load_file(sharded / file)
        assert set(tensors) == {name for name, of in index["weight_map"].items() if of == file}
        assert sum(tensor.nbytes for tensor in tensors.values()) <= LIMIT or len(tensors) == 1
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(tensor, whole[name])
    assert bits(load(sharded)[1]) == bits(model[1])


def test_an_export_of_spread_parameters_is_that_of_the_same_parameters_on_one_device(
    model, exported, tokenizer, tmp_path
):
    decoder, params = model
    for number, sizes in enumerate([dict(), dict(data=2, fsdp=2, tensor=2)]):
        spread = meshes.shard(params, decoder.axes(), mesh(**sizes))
        hub_save.save(tmp_path / str(number), decoder, spread, tokenizer)
        written = (tmp_path / str(number) / "model.safetensors").read_bytes()
        assert written == (exported / "model.safetensors").read_bytes()


def test_an_export_takes_the_place_of_one_with_more_or_fewer_shards(model, tokenizer, tmp_path):
    decoder, params = model
    names = lambda: sorted(path.name for path in (tmp_path / "export").glob("model*"))
    for limit in (LIMIT, 5 * LIMIT, hub_save.MAX_SHARD_BYTES, LIMIT):
        hub_save.save(tmp_path / "export", decoder, params, tokenizer, max_shard_bytes=limit)
        assert (names() == ["model.safetensors"]) == (limit == hub_save.MAX_SHARD_BYTES)
        assert bits(load(tmp_path / "export")[1]) == bits(params)
    (tmp_path / "export" / "model-1-of-2.safetensors").write_text("another's")
    with pytest.raises(UserError, match=r"holds files of another kind \(model-1-of-2"):
        hub_save.save(tmp_path / "export", decoder, params, tokenizer)


def test_a_shard_that_reads_back_differently_is_never_put_in_place(model, tokenizer, tmp_path, monkeypatch):
    import safetensors.numpy

    honest = safetensors.numpy.save_file
    bend = lambda tensors, path, metadata: honest(
        {name: tensor * 2 if name == "model.norm.weight" else tensor for name, tensor in tensors.items()},
        path,
        metadata=metadata,
    )
    monkeypatch.setattr("safetensors.numpy.save_file", bend)
    with pytest.raises(RuntimeError, match=r"model\.norm\.weight does not read back"):
        hub_save.save(tmp_path / "export", *model, tokenizer, max_shard_bytes=LIMIT)
    assert list(tmp_path.iterdir()) == []


def test_a_limit_without_room_is_refused(model, tokenizer, tmp_path):
    with pytest.raises(UserError, match="max_shard_bytes must be at least 1"):
        hub_save.save(tmp_path / "export", *model, tokenizer, max_shard_bytes=0)


@pytest.mark.parametrize(
    "free, asked, amx, dtype",
    [
        (1e12, "auto", False, "float32"),
        (1e12, "auto", True, "bfloat16"),
        (10, "auto", False, "bfloat16"),
        (10, "float32", True, "float32"),
    ],
)
def test_16_bit_weights_become_float32_where_memory_allows_it_and_the_cpu_lacks_amx(
    copy, monkeypatch, free, asked, amx, dtype
):
    monkeypatch.setattr(dtypes, "cpu_has_amx", lambda: amx)
    change_tensors(copy, lambda tensors: {name: t.astype(jnp.bfloat16) for name, t in tensors.items()})
    monkeypatch.setattr(dtypes.process_memory, "free_bytes", lambda devices: free)
    decoder, params = load(copy, param_dtype=asked)
    assert decoder.config.param_dtype == dtype
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {dtype}
