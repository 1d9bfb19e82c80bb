"""Exports a random checkpoint and loads it onto the mesh: seconds, bytes read by each rank, memory of the host."""

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs.benchmark import process_memory
from specjax.hub import load as hub_load
from specjax.hub import save as hub_save
from specjax.hub.tokenizer import train_byte_bpe
from specjax.models.config import DecoderConfig
from specjax.models.decoder import Decoder
from specjax.models.language_model import Params
from specjax.runtime import mesh as meshes
from specjax.runtime.errors import UserError


def loading(config: Any) -> list[dict]:
    """Exports one model, then loads it from the disk ("cold") and from the system's file cache ("warm").

    Bytes of a rank are those of the slices that it reads from the files. The peak above the arrays is the most memory
    of the process at any time, minus its memory before and the arrays loaded so far; mapped pages of the files count.

    Raises:
      UserError: if the disk has no room for the checkpoint.
    """
    section = config.loading
    decoder = Decoder(DecoderConfig.llama(**config.models[section.model].to_dict()))
    mesh = meshes.make_mesh(config.mesh)
    rows = []
    with _directory(section.directory, decoder) as directory:
        started = time.perf_counter()
        params = _random_params(decoder, config.seed)
        tokenizer = train_byte_bpe(["a tokenizer has to be there\n"], 260)
        hub_save.save(directory, decoder, params, tokenizer, max_shard_bytes=section.max_shard_bytes)
        export_seconds = time.perf_counter() - started
        del params
        files = sorted(directory.glob("*.safetensors"))
        for cache in ("cold", "warm"):
            if cache == "cold":
                _forget(files)
            row = _load(directory, section.param_dtype, mesh)
            described = {"parameters": decoder.num_params, "files": len(files), "devices": mesh.size, "cache": cache}
            rows.append({**described, **row, "export_seconds": export_seconds})
    return rows


def _load(directory: Path, param_dtype: str, mesh: jax.sharding.Mesh) -> dict:
    """Loads the checkpoint onto the mesh; returns the columns of a row."""
    dtypes = {"param_dtype": param_dtype, "compute_dtype": "float32"}
    _, config = hub_load.read_config(directory, **dtypes)
    shardings = meshes.shardings(Decoder(config).axes(), mesh)
    size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    started = time.perf_counter()
    _, arriving = hub_load.stream(directory, shardings=shardings, **dtypes)
    arrays, of_rank, held, above = [], dict.fromkeys(mesh.devices.flat, 0), 0, []
    before = process_memory.settled()
    for loaded in arriving:
        arrays.append(loaded.array)
        held += sum(shard.data.nbytes for shard in loaded.array.addressable_shards)
        above.append(process_memory.peak() - before - held)
        process_memory.reset_peak()
        for device, count in loaded.file_bytes.items():
            of_rank[device] += count
    seconds = time.perf_counter() - started
    return {
        "file_gigabytes": size / 1e9,
        "seconds": seconds,
        "gigabytes_per_second": size / 1e9 / seconds,
        "most_gigabytes_of_a_rank": max(of_rank.values()) / 1e9,
        "array_gigabytes": held / 1e9,
        "largest_array_megabytes": max(array.nbytes for array in arrays) / 1e6,
        "peak_megabytes_above_arrays": max(above) / 1e6,
    }


@contextlib.contextmanager
def _directory(parent: str, decoder: Decoder) -> Iterator[Path]:
    """A folder for the checkpoint, in `parent` or where the system puts temporary files; removed afterwards."""
    with tempfile.TemporaryDirectory(dir=parent or None) as temporary:
        space = os.statvfs(temporary)
        free = space.f_bavail * space.f_frsize
        wanted = decoder.num_params * jnp.dtype(decoder.config.param_dtype).itemsize
        if free < 1.1 * wanted:
            raise UserError(
                f"{temporary} has {free / 1e9:.1f} GB free and the checkpoint takes {wanted / 1e9:.1f}; "
                "set loading.directory to a larger disk"
            )
        yield Path(temporary) / "checkpoint"


def _random_params(decoder: Decoder, seed: int) -> Params:
    """Random numbers of magnitude 1/128 to 1/64; all parameters share the memory of the largest one."""
    leaves, tree = jax.tree.flatten(decoder.abstract_params())
    largest, spare = max(leaf.size for leaf in leaves), 4096
    bits = np.random.default_rng(seed).integers(0, 1 << 16, largest + spare, np.uint16)
    values = ((bits & 0x807F) | 0x3C00).view(jnp.bfloat16)
    values = values.astype(leaves[0].dtype) if leaves[0].dtype != values.dtype else values
    starts = [number * 97 % spare for number in range(len(leaves))]
    cut = [values[start : start + leaf.size].reshape(leaf.shape) for start, leaf in zip(starts, leaves, strict=True)]
    return jax.tree.unflatten(tree, cut)


def _forget(files: list[Path]) -> None:
    """Flushes the files to the disk and drops them from the system's cache."""
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
