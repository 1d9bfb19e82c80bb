"""An adapter, or Medusa heads, alone in a directory: a file of their own, tied to the target whose states they read."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr

from specjax.hub import weights
from specjax.models.adapters import Adapter, AdapterConfig
from specjax.models.language_model import LanguageModel, Params
from specjax.models.medusa import MedusaConfig, MedusaHeads
from specjax.runtime import processes
from specjax.runtime.dtypes import dtype_named
from specjax.runtime.errors import UserError, nearest

CONFIG_FILE = "adapter_config.json"
_FORMAT = "specjax-adapter-1"
# What may be attached to a target, by its `type` in the file; without one it is an adapter.
_TYPES = {"adapter": (Adapter, AdapterConfig), "medusa": (MedusaHeads, MedusaConfig)}
# Values of each parameter that enter the fingerprint.
_SAMPLE = 64


def fingerprint(decoder: LanguageModel, params: Params) -> str:
    """What tells a target from another: its config, and some values out of each of its parameters.

    Values are rounded to bfloat16 first, so that a checkpoint has one fingerprint whether it is kept in float32 or in
    bfloat16. In float16, which rounds otherwise, it may have another.
    """
    fields = dataclasses.asdict(decoder.config)
    for name in ("param_dtype", "compute_dtype"):
        del fields[name]
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    samples = processes.fetch(_samples(params))  # all processes come here together
    for path, values in jax.tree_util.tree_leaves_with_path(samples):
        digest.update(_name(path).encode())
        digest.update(np.asarray(values).tobytes())
    return digest.hexdigest()[:32]


@jax.jit
def _samples(params: Params) -> Params:
    middle = lambda leaf: leaf[tuple(size // 2 for size in leaf.shape[:-1])]
    return jax.tree.map(lambda leaf: middle(leaf)[:_SAMPLE].astype(jnp.bfloat16), params)


@dataclasses.dataclass(frozen=True)
class LoadedAdapter:
    """An adapter (or Medusa heads) with its parameters.

    Attributes:
      target: fingerprint of the model to which it belongs.
    """

    adapter: Adapter | MedusaHeads
    params: Any
    target: str

    @property
    def network(self) -> Adapter | MedusaHeads:
        """What is computed with the parameters, as of `hub.model.Model`."""
        return self.adapter

    def check(self, target: str) -> None:
        """Raises UserError unless `target` is the fingerprint of its own target."""
        if target != self.target:
            raise UserError(
                f"this adapter belongs to another target (fingerprint {self.target[:8]}, this model's is "
                f"{target[:8]}); load the target with which it was trained, as float32 or bfloat16"
            )


def save(directory: str | Path, loaded: LoadedAdapter) -> None:
    """Writes `adapter.safetensors` and `adapter_config.json`; replaces those of an earlier adapter.

    Raises:
      UserError: if the directory holds other files, or cannot be written.
    """
    from safetensors.numpy import save_file

    directory, config = Path(directory), loaded.adapter.config
    others = sorted(
        {path.name for path in directory.iterdir()} - {CONFIG_FILE, weights.SPECJAX_ADAPTER_FILE}
        if directory.is_dir()
        else ()
    )
    if others:
        raise UserError(f"{directory} holds other files ({others[0]}); choose a directory for the adapter alone")
    leaves = jax.tree_util.tree_leaves_with_path(loaded.params)
    fields = {
        "format": _FORMAT,
        "type": next(name for name, (network, _) in _TYPES.items() if isinstance(loaded.adapter, network)),
        **{name: getattr(config, name) for name in _own_fields(type(config))},
        "param_dtype": config.target.param_dtype,
        "target": {"fingerprint": loaded.target, "family": config.target.family, "layers": config.target.layers},
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        save_file({_name(path): np.asarray(leaf) for path, leaf in leaves}, directory / weights.SPECJAX_ADAPTER_FILE)
        (directory / CONFIG_FILE).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{directory} cannot be written ({error}); make room or choose another place") from None


def holds_one(directory: str | Path) -> bool:
    """Whether this is the directory of an adapter that specjax wrote."""
    return (Path(directory) / weights.SPECJAX_ADAPTER_FILE).is_file()


def load(directory: str | Path, target: LanguageModel, *, shardings=None) -> LoadedAdapter:
    """Reads an adapter for a target of the right sizes; the caller checks the fingerprint.

    Args:
      shardings: a function of the adapter that gives the tree of shardings; the default device without one.

    Raises:
      UserError: for whatever is missing or damaged, and for an adapter that does not fit the target.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    directory = Path(directory)
    adapter, belongs = describe(directory, target)
    path = directory / weights.SPECJAX_ADAPTER_FILE
    try:
        stored = load_file(path)
    except FileNotFoundError:
        raise UserError(f"there is no {path}; copy the adapter again") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or cut short ({error}); copy or export it again") from None
    expected = {
        _name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(adapter.abstract_params())
    }
    if expected != {name: values.shape for name, values in stored.items()}:
        raise UserError(
            f"the tensors in {path} are not those of this adapter on this target; take the target it is for"
        )
    dtype = dtype_named(adapter.config.target.param_dtype)
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.asarray(stored[_name(path)]).astype(dtype), adapter.abstract_params()
    )
    params = params if shardings is None else jax.device_put(params, shardings(adapter))
    return LoadedAdapter(adapter, params, belongs)


def describe(directory: Path, target: LanguageModel) -> tuple[Adapter | MedusaHeads, str]:
    """What the directory's `adapter_config.json` describes on this target, and the fingerprint of its own target.

    Raises:
      UserError: for a file that is missing or damaged, or not one of ours.
    """
    described, fields = directory / CONFIG_FILE, weights.read_json(directory / CONFIG_FILE)
    if fields.get("format") != _FORMAT:
        raise UserError(f'{described} has no "format": "{_FORMAT}"; name a directory that specjax wrote an adapter to')
    kind = fields.get("type", "adapter")
    if kind not in _TYPES:
        raise UserError(f'{described}: "type" is {kind!r}{nearest(kind, _TYPES)}')
    network, config_of = _TYPES[kind]
    try:
        config = config_of(target.config, **{name: fields[name] for name in _own_fields(config_of)})
        belongs = fields["target"]["fingerprint"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{described} lacks or misstates {error}; export the adapter again") from None
    return network(config), belongs


def _own_fields(config_of: type) -> list[str]:
    """What a config says beyond its target."""
    return [field.name for field in dataclasses.fields(config_of) if field.name != "target"]


def _name(path) -> str:
    return keystr(path, simple=True, separator=".")
