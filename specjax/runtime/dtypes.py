"""Converts names of dtypes in configs to JAX dtypes."""

import jax
import jax.numpy as jnp

from specjax.runtime.errors import UserError, nearest

_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


def dtype_named(name: str):
    """The JAX dtype called `name`. Raises UserError for an unknown name."""
    if name not in _DTYPES:
        raise UserError(f'there is no dtype "{name}"{nearest(name, _DTYPES)}')
    return _DTYPES[name]


def compute_dtype(name: str) -> str:
    """`name` itself; for "auto", float32 on CPU and bfloat16 on accelerators."""
    if name != "auto":
        dtype_named(name)
        return name
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"
