"""JAX's persistent cache of compiled programs, so that a second process compiles nothing that an earlier one did."""

import logging
import os
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache


def start() -> None:
    """Turns the cache on, in `folder()`; without effect where JAX already has one, as with its own variables.

    A folder that cannot be written is named in a warning, and programs are then compiled as without a cache. A damaged
    entry is compiled again.
    """
    place = folder()
    if jax.config.jax_compilation_cache_dir is not None or place is None:
        return
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        logging.warning("compiled programs are not stored (%s); set SPECJAX_CACHE to a folder, or to off", error)
        return
    if not os.access(place, os.W_OK):
        logging.warning("compiled programs are not stored (%s cannot be written); set SPECJAX_CACHE", place)
        return
    jax.config.update("jax_compilation_cache_dir", str(place))
    compilation_cache.reset_cache()  # JAX looks at the setting only once, when it compiles first
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # Small programs too: a call has tens of them, and JAX by default stores those that take a second or more.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def folder() -> Path | None:
    """`SPECJAX_CACHE`, or `specjax/xla` in the user's folder of caches; None if SPECJAX_CACHE is "off"."""
    place = os.environ.get("SPECJAX_CACHE", "")
    if place:
        return None if place == "off" else Path(place).expanduser()
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(caches).expanduser() / "specjax" / "xla"
