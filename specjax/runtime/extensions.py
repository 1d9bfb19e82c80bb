"""Imports objects of a user's own code (extensions), which configs name by file or module."""

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specjax.runtime.errors import UserError, nearest

# Prefix of the names of modules that are imported from a path.
_PREFIX = "specjax_extension_"


def named(name: str, table: Mapping[str, Any], what: str) -> Any:
    """Returns `table[name]`, or an object of the user's code: "path/to/file.py:Name" or "package.module:Name".

    Args:
      name: a key of `table`, or a file or module with the name of an object in it.
      table: the objects that specjax provides, by name.
      what: the kind of object, such as "drafter", for error messages.

    Raises:
      UserError: for an unknown name, and if the file, module or object does not exist.
    """
    place, colon, attribute = name.rpartition(":")
    if not colon:
        if name not in table:
            raise UserError(f'there is no {what} "{name}"{nearest(name, table)}')
        return table[name]
    module = _module(place, what)
    if not hasattr(module, attribute):
        raise UserError(f'{place} has no {what} "{attribute}"{nearest(attribute, vars(module))}')
    return getattr(module, attribute)


def place_of(thing: Any) -> str:
    """The name with which `named` finds a class or function in a later process: "FILE:NAME" or "MODULE:NAME"."""
    module = sys.modules[thing.__module__]
    imported_from_path = module.__name__ == "__main__" or module.__name__.startswith(_PREFIX)
    place = str(Path(module.__file__).resolve()) if imported_from_path else module.__name__
    return f"{place}:{thing.__qualname__}"


def _module(place: str, what: str) -> Any:
    """Imports a module by its name or path. A file is executed once per process."""
    if not place.endswith(".py"):
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as error:
            raise UserError(f'the {what} is in module "{place}", which cannot be imported ({error})') from error
    path = Path(place).resolve()
    if not path.is_file():
        raise UserError(f"the {what} is in {place}, and there is no such file")
    module_name = f"{_PREFIX}{path.stem}_{abs(hash(str(path))):x}"
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[module_name]
            raise
    return sys.modules[module_name]
