"""Converts names of dtypes in configs to JAX dtypes, and chooses dtypes."""

import functools
import pathlib

import jax
import jax.numpy as jnp
from absl import logging

from specjax.runtime import process_memory
from specjax.runtime.errors import UserError, nearest

_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
# Dtypes of kernels that are only decoded with, see `models.quantised`.
QUANTISED = ("int8", "int4")
# Values of `compute_dtype` in a config that leave the choice to the device, see `compute_dtype`.
CHOICES = ("auto", "fastest")


def dtype_named(name: str):
    """The JAX dtype called `name`. Raises UserError for an unknown name."""
    if name not in _DTYPES:
        raise UserError(f'there is no dtype "{name}"{nearest(name, (*_DTYPES, *CHOICES))}')
    return _DTYPES[name]


def check_param_dtype(name: str) -> None:
    """Raises UserError unless parameters can have the dtype `name`: a float dtype, or one of `QUANTISED`."""
    if name not in (*_DTYPES, *QUANTISED):
        raise UserError(f'there is no dtype "{name}"{nearest(name, (*_DTYPES, *QUANTISED))}')


def check_trained(key: str, name: str) -> None:
    """Raises UserError if the config's `key` gives this dtype to parameters that are trained or saved."""
    if name in QUANTISED:
        raise UserError(
            f"{key} is {name}, and quantised weights can only be decoded with; choose float32, and load the result "
            f"with param_dtype {name}"
        )


def compute_dtype(name: str) -> str:
    """The dtype of activations for a name in a config: the name itself, or a choice for the device.

    "auto" is float32 on CPU and bfloat16 on accelerators. "fastest" is for training and for writing text to train on:
    bfloat16 also on a CPU that multiplies bfloat16 matrices (AMX), where a training step takes half the time.
    """
    if name not in CHOICES:
        dtype_named(name)
        return name
    has_units = jax.default_backend() != "cpu" or (name == "fastest" and cpu_has_amx())
    return "bfloat16" if has_units else "float32"


@functools.cache
def cpu_has_amx() -> bool:
    """Whether Linux reports the processor's instructions for products of bfloat16; False on other systems."""
    processor = pathlib.Path("/proc/cpuinfo")
    return processor.exists() and "amx_bf16" in processor.read_text()


def rounding(dtype: str) -> float:
    """The distance of 1 to the next number, at the precision to which products of this dtype round their inputs.

    JAX rounds float32 inputs to 10 bits of mantissa on GPUs (TF32) and to bfloat16 on TPUs, unless the matmul precision
    is "highest" or "float32"; JAX_DEFAULT_MATMUL_PRECISION sets it.
    """
    platform, precision = jax.default_backend(), jax.config.jax_default_matmul_precision
    coarse = {"gpu": 2.0**-10, "tpu": float(jnp.finfo(jnp.bfloat16).eps)}
    if dtype == "float32" and platform in coarse and precision not in ("highest", "float32"):
        return coarse[platform]
    return float(jnp.finfo(dtype).eps)


# Share of the free memory that float32 parameters may take; caches, activations and other models need the rest.
_SHARE = 0.8


def auto_param_dtype(stored: str, count: int, *, rounds: bool = False) -> str:
    """The dtype in which a checkpoint's parameters decode fastest within memory.

    On accelerators it is `stored`. So it is on a CPU with AMX for bfloat16: SmolLM2 decodes 1.35 times as fast as in
    float32. On other CPUs it is float32 if that fits, because products read it two to three times as fast as 16-bit
    numbers.

    Args:
      stored: dtype of the checkpoint; bfloat16 for a quantised one.
      count: number of parameters.
      rounds: whether bfloat16 does not hold the parameters exactly; then AMX makes no difference.
    """
    if stored == "float32" or jax.default_backend() != "cpu":
        return stored
    if stored == "bfloat16" and not rounds and cpu_has_amx():
        logging.info("parameters stay in bfloat16, which this CPU multiplies faster than float32")
        return stored
    gigabytes, free = 4 * count / 1e9, process_memory.free_bytes(jax.local_devices()[:1]) / 1e9
    if gigabytes > _SHARE * free:
        message = "parameters stay in %s, because float32 would take %.1f GB and %.1f GB are free; decoding is slower"
        logging.warning(message, stored, gigabytes, free)
        return stored
    logging.info("parameters are converted from %s to float32, which decodes faster on CPU: %.1f GB", stored, gigabytes)
    return "float32"
