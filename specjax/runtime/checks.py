"""Checks the types of single values that a user gave."""

import numbers
from typing import Any

from specjax.runtime.errors import UserError

_NAMES = {bool: "True or False", int: "a whole number", float: "a number"}
_ACCEPTED = {bool: bool, int: numbers.Integral, float: numbers.Real}


def seed(name: str, value: Any) -> None:
    """Raises UserError unless the value is a seed; JAX would map others to the same random numbers as one of these."""
    instance(name, value, int)
    if not 0 <= value < 2**32:
        raise UserError(f"{name} must lie in 0 .. {2**32 - 1}, not {value}")


def instance(name: str, value: Any, kind: type) -> None:
    """Raises UserError unless the value is of type `kind` (bool, int or float); an int is accepted as a float."""
    numpy_scalar = getattr(value, "ndim", None) == 0 and hasattr(value, "item")
    plain = value.item() if numpy_scalar else value
    if not isinstance(plain, _ACCEPTED[kind]) or (kind is not bool and isinstance(plain, bool)):
        raise UserError(f"{name} must be {_NAMES[kind]}, not {value!r}")
