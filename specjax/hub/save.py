"""Writes a model as a Hugging Face directory that transformers and `hub.load` read."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from specjax.hub import load as hub_load
from specjax.hub import tokenizer_files
from specjax.hub.families import base
from specjax.hub.tokenizer import Tokenizer
from specjax.models.language_model import LanguageModel, Params
from specjax.runtime.errors import UserError

_GENERATION_FILE = "generation_config.json"
FILES = (hub_load.CONFIG_FILE, hub_load.WEIGHTS_FILE, _GENERATION_FILE, *tokenizer_files.FILES)


def save(directory: str | Path, decoder: LanguageModel, params: Params, tokenizer: Tokenizer) -> None:
    """Writes the model and its tokenizer, the parameters bit for bit in the dtype of `decoder.config`.

    Everything is written beside `directory`, read back and compared, and only then put in its place; an earlier
    export there is replaced as a whole.

    Raises:
      UserError: if the directory holds other files, the disk refuses, the tokenizer has more ids than the model,
        or the parameters are not those of the decoder.
    """
    directory = Path(directory).absolute()
    _check_target(directory)
    config = decoder.config
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} ids and the model only {config.vocab_size}; "
            "save the model with the tokenizer it was trained with"
        )
    tensors = _tensors(decoder, params)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    except OSError as error:
        raise UserError(f"{directory.parent} cannot be written ({error}); choose another place") from None
    try:
        _write(temporary / "new", config, tensors, tokenizer)
        _check_round_trip(temporary / "new", config, tensors)
        _replace(directory, temporary)
    except OSError as error:
        raise UserError(f"{directory} cannot be written ({error}); make room or choose another place") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_target(directory: Path) -> None:
    """Raises UserError unless the directory is free or holds nothing but an earlier export."""
    if not directory.exists():
        return
    if not directory.is_dir():
        raise UserError(f"{directory} is a file; name a directory to export to")
    others = sorted(entry.name for entry in directory.iterdir() if entry.name not in FILES)
    if others:
        raise UserError(f"{directory} holds files of another kind ({others[0]}); export to a directory of its own")


def _tensors(decoder: LanguageModel, params: Params) -> dict[str, np.ndarray]:
    """The arrays on the host under their names in the file, turned as they lie there."""
    paths = lambda tree: {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    expected, given = paths(decoder.abstract_params()), paths(params)
    wrong = sorted(set(expected) ^ set(given))
    wrong += [
        key
        for key in sorted(set(expected) & set(given))
        if (expected[key].shape, expected[key].dtype) != (given[key].shape, given[key].dtype)
    ]
    if wrong:
        raise UserError(
            f"the parameter at {wrong[0]} is not what the config describes; save a model with its own parameters"
        )
    listed = hub_load.FAMILIES[decoder.config.family].tensors(decoder.config)
    outputs = base.fused_outputs(listed)
    tensors: dict[str, np.ndarray] = {}
    for tensor in listed:
        values = np.asarray(jax.device_get(hub_load.at(params, tensor.path)))
        shape = base.shape_in_file(tensor, values.shape, outputs)
        # The writer takes the bytes as they lie in memory, so a mere view would be stored unturned.
        turned = np.ascontiguousarray(values.T if tensor.transposed else values)
        if tensor.part is None:
            tensors[tensor.name] = turned
            continue
        axis = base.output_axis(tensor, values.ndim)
        whole, done = tensors.setdefault(tensor.name, np.empty(shape, values.dtype)), 0
        for run in base.runs_in_file(tensor, slice(0, turned.shape[axis]), shape[axis]):
            length = run.stop - run.start
            whole[(slice(None),) * axis + (run,)] = turned[(slice(None),) * axis + (slice(done, done + length),)]
            done += length
    return tensors


def _write(directory: Path, config, tensors: dict[str, np.ndarray], tokenizer) -> None:
    from safetensors.numpy import save_file

    tokenizer.save(directory)
    eos = list(tokenizer.eos_ids) if len(tokenizer.eos_ids) > 1 else tokenizer.eos_ids[0]
    special = {"bos_token_id": tokenizer.bos_id, "eos_token_id": eos, "pad_token_id": tokenizer.pad_id}
    fields = {**hub_load.FAMILIES[config.family].write_config(config), **special, "torch_dtype": config.param_dtype}
    _write_json(directory / hub_load.CONFIG_FILE, fields)
    _write_json(directory / _GENERATION_FILE, special)
    save_file(tensors, directory / hub_load.WEIGHTS_FILE, metadata={"format": "pt"})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _check_round_trip(directory: Path, config, tensors: dict[str, np.ndarray]) -> None:
    """Raises RuntimeError unless what was written reads back as this config and these very bits.

    On the host, one tensor at a time: a model spread over many devices need not fit one of them.
    """
    from safetensors import safe_open

    _, described = hub_load.read_config(directory, param_dtype=config.param_dtype, compute_dtype=config.compute_dtype)
    if described != config:
        raise RuntimeError(f"The export reads back as {described}, not as {config}.")
    with safe_open(directory / hub_load.WEIGHTS_FILE, framework="numpy") as stored:
        for name, values in tensors.items():
            again = stored.get_tensor(name)
            if (again.dtype, again.shape) != (
                values.dtype,
                values.shape,
            ) or again.tobytes() != values.tobytes():
                raise RuntimeError(f"The export of {name} does not read back bit for bit.")


def _replace(directory: Path, temporary: Path) -> None:
    """Puts `temporary/new` in the place of `directory`; what was there comes back if that fails."""
    if directory.exists():
        os.rename(directory, temporary / "old")
    try:
        os.rename(temporary / "new", directory)
    except OSError:
        if (temporary / "old").exists():
            os.rename(temporary / "old", directory)
        raise
