"""Configs: loading the file, naming the outputs of earlier stages, and keeping a workdir to one config."""

import importlib.util
import json
import sys
import types
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from specjax.runtime.errors import UserError, nearest

# The folder of configs, which is importable under this name.
_PACKAGE = "configs"
# "stage:NAME" is what stage NAME exported, "workdir:NAME" the folder it ran in.
_REFERENCES = {"stage": "export", "workdir": ""}
# The value "required:KEY:WHAT" of a config must be replaced on the command line, by --config.KEY=...
_REQUIRED = "required:"
# Keys of earlier versions -> what replaces them. A pattern matches the end of a key's path; "*" is any one name.
RENAMED = {
    "model.whole": "model.replicate",
    "drafters.*.whole": "drafters.*.replicate",
}


def load(path_and_variant: str) -> ConfigDict:
    """Calls `get_config` of the file: `path.py`, or `path.py:variant` to call `get_config("variant")`.

    Raises:
      UserError: for a file that is missing, not Python, or without a `get_config` that takes this variant.
    """
    name, colon, variant = path_and_variant.partition(":")
    path = Path(name)
    if not path.is_file():
        siblings = [str(p) for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise UserError(f"there is no config file {name}{nearest(name, siblings)}")
    try:
        module = _executed(path.resolve())
    except SyntaxError as error:
        raise UserError(f"{name} is not valid Python ({error}); correct it") from error
    if not hasattr(module, "get_config"):
        raise UserError(f"{name} has no get_config function; name a config file, such as configs/quickstart.py")
    if colon and not module.get_config.__code__.co_argcount:
        raise UserError(f'{name} has no variants; leave out ":{variant}"')
    try:
        config = module.get_config(variant) if colon else module.get_config()
    except ValueError as error:  # how a config refuses a variant that it does not have
        raise UserError(f"{path_and_variant}: {error}") from error
    for key, _ in _leaves(to_plain(config)):
        refuse_renamed(key)
    return config


def refuse_renamed(key: str) -> None:
    """Raises UserError with the new name if `key`, a path such as "drafters.small.whole", is of an earlier version."""
    names = key.split(".")
    for pattern, replacement in RENAMED.items():
        parts = pattern.split(".")
        end = names[-len(parts) :]
        if len(end) == len(parts) and all(part in ("*", name) for part, name in zip(parts, end, strict=True)):
            raise UserError(f"config.{key} is an old name; it is now {replacement}")


def _executed(path: Path) -> types.ModuleType:
    """The module of a config file, executed anew.

    A file in a folder `configs` belongs to the package `configs`, which becomes importable from any working directory:
    `from configs.kangaroo import parts`. Any other file may import its neighbours by their bare names.
    """
    root = next((folder for folder in path.parents if folder.name == _PACKAGE), None)
    if root is None:
        module_name = f"config_{path.stem}"
    else:
        _make_importable(root)
        module_name = ".".join((_PACKAGE, *path.relative_to(root).with_suffix("").parts))
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is not a Python file; a config is a .py file with a get_config function")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


def _make_importable(root: Path) -> None:
    """Makes `root` the package `configs`, in place of a folder of that name that was imported earlier."""
    package = sys.modules.get(_PACKAGE)
    if package is not None and str(root) in map(str, package.__path__):
        return
    for name in [name for name in sys.modules if name == _PACKAGE or name.startswith(f"{_PACKAGE}.")]:
        del sys.modules[name]
    package = types.ModuleType(_PACKAGE)
    package.__path__ = [str(root)]
    sys.modules[_PACKAGE] = package


def check_given(config: ConfigDict) -> None:
    """Refuses a config that leaves a value to the command line, "required:KEY:WHAT", and was not given it.

    Raises:
      UserError: with the key to give, and what it is.
    """
    for _, value in _leaves(to_plain(config)):
        if isinstance(value, str) and value.startswith(_REQUIRED):
            key, _, what = value.removeprefix(_REQUIRED).partition(":")
            raise UserError(f"config.{key} is not set; give --config.{key}=..., {what}")


def to_plain(config: Mapping | ConfigDict) -> dict:
    """The config as what JSON gives back: dicts, lists, strings, numbers, booleans and None."""
    return json.loads(json.dumps(config.to_dict() if isinstance(config, ConfigDict) else config))


def resolve(config: ConfigDict, workdir: str | Path, earlier: Collection[str]) -> ConfigDict:
    """A copy in which "stage:NAME" is the folder stage NAME exported and "workdir:NAME" the one it ran in.

    Args:
      config: the section of one stage.
      workdir: of the whole run.
      earlier: the stages that come before this one.

    Raises:
      UserError: for a reference to a stage that does not come before this one.
    """

    def value(x: Any) -> Any:
        if isinstance(x, Mapping):
            return {key: value(item) for key, item in x.items()}
        if isinstance(x, (list, tuple)):
            return type(x)(value(item) for item in x)
        kind, colon, name = x.partition(":") if isinstance(x, str) else ("", "", "")
        if not colon or kind not in _REFERENCES:
            return x
        if name not in earlier:
            raise UserError(f'"{x}" names no earlier stage{nearest(name, earlier)}')
        return str(Path(workdir) / name / _REFERENCES[kind])

    resolved = ConfigDict(value(config.to_dict()))
    resolved.lock()
    return resolved


def assert_same_run(config: ConfigDict, workdir: str | Path) -> None:
    """Writes `workdir/config.json`, or checks that the one there says the same.

    Stages may be added to a run of stages, and a mesh may change, since a run goes on wherever there are devices: then
    the file is written anew. What else it already says may not change. References to earlier stages are written as
    they stand, so that a workdir may be moved.

    Raises:
      UserError: listing the keys that differ, as `key: there -> asked for`.
    """
    path = Path(workdir) / "config.json"
    new = to_plain(config)
    if not path.exists():
        _write(path, new)
        return
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}); choose another --workdir") from error
    asked = _without_new_stages(new, old)
    before, after = dict(_leaves(old)), dict(_leaves(asked))
    keys = sorted(before.keys() | after.keys())
    changed = [key for key in keys if _shown(before, key) != _shown(after, key)]
    differing = [
        f"{key}: {_shown(before, key)} -> {_shown(after, key)}" for key in changed if "mesh" not in key.split(".")
    ]
    if differing:
        raise UserError(
            f"{workdir} belongs to a run with another config ({'; '.join(differing)}); choose another "
            "--workdir, or ask for what it was started with"
        )
    if changed or asked != new:
        _write(path, new)


def _write(path: Path, config: dict) -> None:
    if jax.process_index():
        return  # The first process writes it.
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name("config.json.partial")
    partial.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def _without_new_stages(config: dict, old: Any) -> dict:
    """`config` without the stages that `old`, an earlier config of the workdir, did not have; as it is without any."""
    if "stages" not in config or not isinstance(old, dict) or not isinstance(old.get("stages"), list):
        return config
    added = {name for name in config["stages"] if name not in old["stages"] and name not in old}
    kept = {key: value for key, value in config.items() if key not in added}
    return {**kept, "stages": [name for name in config["stages"] if name not in added]}


def _shown(leaves: dict[str, Any], key: str) -> str:
    return json.dumps(leaves[key]) if key in leaves else "absent"


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree
