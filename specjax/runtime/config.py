"""Loads config files, resolves references to earlier stages, and makes sure that a workdir is used with one config."""

import contextlib
import fnmatch
import hashlib
import importlib.util
import json
import re
import sys
import types
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict, FieldReference

from specjax.runtime.errors import UserError, nearest
from specjax.runtime.files import write_atomically

# A folder of this name is made importable as a package when one of its configs is loaded.
_PACKAGE = "configs"
# The value "stage:NAME" is the folder that stage NAME exported to, "stage:NAME/FILE" a file in it, and "workdir:NAME"
# the folder it ran in.
_REFERENCES = {"stage": "export", "workdir": ""}
# The value "required:KEY:WHAT" of a config must be replaced on the command line, by --config.KEY=...
_REQUIRED = "required:"
# Files of a workdir: the config of its run, and size and digest of the data that the run reads.
_CONFIG_FILE, _DATA_FILE = "config.json", "data.json"
# Keys of earlier versions -> what replaces them. A pattern matches the end of a key's path.
RENAMED = {
    "model.whole": "model.replicate",
    "drafters.*.whole": "drafters.*.replicate",
}
# Ends of the paths of config files of earlier versions -> where these files are now.
MOVED = {
    "configs/evaluate/pair.py": "configs/evaluate.py",
    "configs/draft_design/advise.py": "configs/advise.py",
}


def load(path_and_variant: str) -> ConfigDict:
    """Returns `get_config()` of the file `path.py`, or `get_config("variant")` for "path.py:variant".

    Raises:
      UserError: if the file is missing, is not Python, has no such variant, or uses a key of an earlier version.
    """
    name, colon, variant = path_and_variant.partition(":")
    path = Path(name)
    if not path.is_file():
        moved = next((file for old, file in MOVED.items() if path.as_posix().endswith(old)), None)
        if moved is not None:
            raise UserError(f"{name} is an old name; it is now {moved}")
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
    except ValueError as error:  # raised by a config for an unknown variant
        raise UserError(f"{path_and_variant}: {error}") from error
    for key, _ in leaves(to_plain(config)):
        refuse_renamed(key)
    return _separated(config)


def _separated(config: ConfigDict) -> ConfigDict:
    """A copy in which an override of a key changes no shorter key, and sections have no values in common.

    With shared references, an override of `evaluation.task.path` would also set the path of the data to train on.
    In the copy, of the keys that share a reference, the shortest keeps it, and others follow it until they are set
    themselves. `text.task.path` follows `task.path` if there is such a key.
    """
    sharing: dict[int, list[str]] = {}  # keys of each reference, the shortest first
    fields = dict(_by_length(_fields(config)))
    for key, field in fields.items():
        sharing.setdefault(id(field), []).append(key)
    separate: dict[str, FieldReference] = {}
    for first, *others in sharing.values():
        for key in others:
            followed = max((name for name in (first, *others) if key.endswith(f".{name}")), key=len, default=first)
            separate[key] = FieldReference(separate.get(followed, fields[first]))
    return _copied(config, separate)


def _copied(section: ConfigDict, separate: Mapping[str, FieldReference], prefix: str = "") -> ConfigDict:
    copy = ConfigDict()
    for key, value in section.items(preserve_field_references=True):
        is_section = isinstance(value, ConfigDict)
        copy[key] = _copied(value, separate, f"{prefix}{key}.") if is_section else separate.get(prefix + key, value)
    return copy


def refuse_renamed(key: str) -> None:
    """Raises UserError if `key`, such as "drafters.small.whole", was renamed since an earlier version."""
    for pattern, replacement in RENAMED.items():
        if fnmatch.fnmatch(f".{key}", f"*.{pattern}"):
            raise UserError(f"config.{key} is an old name; it is now {replacement}")


def _executed(path: Path) -> types.ModuleType:
    """Executes a config file and returns its module.

    A file inside a folder `configs` can import files of this folder as `from configs.kangaroo import parts`, in any
    working directory. Any other file can import files of its own folder by their names.
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
    """Makes `root` importable as the package `configs`; removes another folder that was imported by this name."""
    package = sys.modules.get(_PACKAGE)
    if package is not None and str(root) in map(str, package.__path__):
        return
    for name in [name for name in sys.modules if name == _PACKAGE or name.startswith(f"{_PACKAGE}.")]:
        del sys.modules[name]
    package = types.ModuleType(_PACKAGE)
    package.__path__ = [str(root)]
    sys.modules[_PACKAGE] = package


def check_required(config: ConfigDict) -> None:
    """Raises UserError if a value that the command line must set is still "required:KEY:WHAT"."""
    for _, value in leaves(to_plain(config)):
        if isinstance(value, str) and value.startswith(_REQUIRED):
            key, _, what = value.removeprefix(_REQUIRED).partition(":")
            raise UserError(f"config.{key} is not set; give --config.{key}=..., {what}")


def to_plain(config: Mapping | ConfigDict) -> dict:
    """Converts a config to JSON types: dicts, lists, strings, numbers, booleans and None."""
    return json.loads(json.dumps(config.to_dict() if isinstance(config, ConfigDict) else config))


def resolve(config: ConfigDict, workdir: str | Path, earlier: Collection[str]) -> ConfigDict:
    """Replaces "stage:NAME" with the folder that stage exported to, "stage:NAME/FILE" with a file in it, and
    "workdir:NAME" with the folder it ran in.

    Args:
      config: the section of one stage.
      workdir: the folder of the whole run.
      earlier: names of the stages that run before this one.

    Returns:
      A locked copy.

    Raises:
      UserError: for a reference to any other stage.
    """

    def value(x: Any) -> Any:
        if isinstance(x, Mapping):
            return {key: value(item) for key, item in x.items()}
        if isinstance(x, (list, tuple)):
            return type(x)(value(item) for item in x)
        kind, colon, place = x.partition(":") if isinstance(x, str) else ("", "", "")
        if not colon or kind not in _REFERENCES:
            return x
        name, _, file = place.partition("/")
        if name not in earlier:
            raise UserError(f'"{x}" names no earlier stage{nearest(name, earlier)}')
        return str(Path(workdir) / name / _REFERENCES[kind] / file)

    resolved = ConfigDict(value(config.to_dict()))
    resolved.lock()
    return resolved


@contextlib.contextmanager
def claimed(config: ConfigDict, workdir: str | Path) -> Iterator[None]:
    """A context that runs a config in `workdir`, which then belongs to it: see `assert_same_run` and `check_data`.

    If it fails before it has written anything else, `config.json` is removed again; if some stages have begun and
    others have not, only the former are left in it. So a corrected command can use the same folder.
    """
    path, before = Path(workdir) / _CONFIG_FILE, _files(workdir)
    assert_same_run(config, workdir)
    try:
        check_data(config, workdir)
        yield
    except BaseException:
        stages = config.stages if "stages" in config else ()
        begun = [name for name in stages if (Path(workdir) / name / _CONFIG_FILE).exists()]
        if jax.process_index():
            pass
        elif begun and len(begun) < len(stages):
            plain = to_plain(config)
            _write(path, {"stages": begun, **{name: plain[name] for name in begun}})
        elif path not in before and _files(workdir) <= before | {path, path.with_name(_DATA_FILE)}:
            path.unlink(missing_ok=True)
            path.with_name(_DATA_FILE).unlink(missing_ok=True)
        raise


def _files(folder: str | Path) -> set[Path]:
    """All files in a folder, except those with which processes check that they share it."""
    return {path for path in Path(folder).rglob("*") if path.is_file() and not path.name.startswith(".process-")}


def assert_same_run(config: ConfigDict, workdir: str | Path) -> None:
    """Writes `workdir/config.json`; if the file exists, checks that it has the same content.

    Two changes are allowed and update the file: new stages, and another mesh (a run can resume on other devices).
    References to earlier stages are stored unresolved, so that a workdir can be moved.

    Raises:
      UserError: listing the keys that differ, as `key: old -> new`.
    """
    path = Path(workdir) / _CONFIG_FILE
    new = to_plain(config)
    if not path.exists():
        _write(path, new)
        return
    old = _read(path)
    before, after = ({key: json.dumps(x) for key, x in leaves(_comparable(tree, old))} for tree in (old, new))
    changed = [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]
    forbidden = [key for key in changed if "mesh" not in key.split(".")]
    if forbidden:
        changes = "; ".join(f"{key}: {before.get(key, 'absent')} -> {after.get(key, 'absent')}" for key in forbidden)
        raise UserError(
            f"{workdir} belongs to a run with another config ({changes}); choose another --workdir, or use the config "
            "that it was started with"
        )
    if old != new:
        _write(path, new)


def _read(path: Path) -> dict:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}); choose another --workdir") from error
    if not isinstance(fields, dict):
        raise UserError(f"{path} is damaged (it is no JSON object); choose another --workdir")
    return fields


def _write(path: Path, config: dict) -> None:
    if not jax.process_index():  # process 0 writes it
        write_atomically(path, json.dumps(config, indent=1) + "\n")


def _comparable(config: dict, old: dict) -> dict:
    """`config` without what a config with stages has in addition to `old`, which has an effect only on new stages."""
    if "stages" not in config or "stages" not in old:
        return config
    stages = [name for name in config["stages"] if name in old["stages"]]
    return {**{key: value for key, value in config.items() if key in old}, "stages": stages}


def check_data(config: ConfigDict, workdir: str | Path) -> None:
    """Records size and digest of the data in every `task.path` in `workdir/data.json`; checks those recorded before.

    Raises:
      UserError: for data that changed since the run began; data that is missing is left to its reader.
    """
    path = Path(workdir) / _DATA_FILE
    recorded = _read(path) if path.is_file() else {}
    places = {value for key, value in leaves(to_plain(config)) if f".{key}".endswith(".task.path")}
    current = {place: digest for place in places if (digest := digest_of(place))}
    for place in current.keys() & recorded.keys():
        if recorded[place] != current[place]:
            sizes = f"{recorded[place]['bytes']} bytes then, {current[place]['bytes']} now"
            raise UserError(
                f"{place} changed since the run in {workdir} began ({sizes}); restore it, or choose another --workdir"
            )
    if current.keys() - recorded.keys():
        _write(path, {**recorded, **current})


def digest_of(place: Any) -> dict[str, Any] | None:
    """The size of a file, or of the files in a folder, and a hash of their content; None if `place` names none."""
    if not isinstance(place, str):  # a task of the user's own may have any value there
        return None
    root = Path(place)
    files = [root] if root.is_file() else sorted(path for path in root.rglob("*") if path.is_file()) if place else []
    whole, size = hashlib.sha256(), 0
    for file in files:
        with file.open("rb") as content:
            whole.update(f"{file.relative_to(root)}\0{hashlib.file_digest(content, 'sha256').hexdigest()}".encode())
        size += file.stat().st_size
    return {"bytes": size, "sha256": whole.hexdigest()} if files else None


@contextlib.contextmanager
def typed_keys(config: ConfigDict, stage: str = "") -> Iterator[None]:
    """A context in which a UserError names keys of the command line, where these differ from those a binary reads.

    If a config has `prompts` and a section whose `task.path` refers to it, "task.path" becomes "--config.prompts". A
    key without such a reference, as read by the binary of `stage`, gets the stage's name.
    """
    try:
        yield
    except UserError as error:
        fields = [(key, _root(field)) for key, field in _fields(config)]
        typed = {id(root): key for key, root in reversed(_by_length(fields))}
        text = str(error)
        for key, root in fields:
            inner = key.removeprefix(f"{stage}.") if stage else key
            if inner != typed[id(root)] and (not stage or inner != key):
                name = re.escape(inner) if "." in inner else f"config\\.{inner}"
                text = re.sub(rf"(?<![\w.-])(--)?(config\.)?{name}(?![\w.])", f"--config.{typed[id(root)]}", text)
        raise UserError(text) from error


def _fields(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted key, reference or fresh object) for every leaf."""
    for key, value in config.items(preserve_field_references=True):
        if isinstance(value, ConfigDict):
            yield from _fields(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, FieldReference) else object()


def _by_length(fields: Iterable[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """(key, field) from the shortest key to the longest."""
    return sorted(fields, key=lambda pair: (pair[0].count("."), pair[0]))


def _root(field: Any) -> Any:
    """The reference that another one follows, itself if it follows none."""
    while isinstance(field, FieldReference) and isinstance(field._value, FieldReference):
        field = field._value
    return field


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted key, value) for every leaf of nested dicts."""
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree
