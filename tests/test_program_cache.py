"""The cache of compiled programs: where it is, and that nothing it meets stops a run."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from specjax.runtime import program_cache

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def no_cache(monkeypatch):
    """JAX without a cache; the settings of the tests come back afterwards."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    values = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.delenv("SPECJAX_CACHE", raising=False)
    yield monkeypatch
    for name, value in values.items():
        jax.config.update(name, value)


def test_the_folder_is_the_users_or_a_named_one(no_cache):
    no_cache.setenv("XDG_CACHE_HOME", "/caches")
    assert program_cache.folder() == Path("/caches/specjax/xla")
    no_cache.setenv("XDG_CACHE_HOME", "")
    assert program_cache.folder() == Path.home() / ".cache" / "specjax" / "xla"
    no_cache.setenv("SPECJAX_CACHE", "somewhere")
    assert program_cache.folder() == Path("somewhere")
    no_cache.setenv("SPECJAX_CACHE", "off")
    assert program_cache.folder() is None
    program_cache.start()
    assert jax.config.jax_compilation_cache_dir is None


def test_a_cache_that_jax_has_stays(no_cache, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    program_cache.start()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)


def test_a_folder_that_cannot_be_made_is_a_warning(no_cache, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    no_cache.setenv("SPECJAX_CACHE", str(tmp_path / "file" / "xla"))
    with caplog.at_level(logging.WARNING):
        program_cache.start()
    assert "not stored" in caplog.text and jax.config.jax_compilation_cache_dir is None


CODE = """
import jax, jax.numpy as jnp
from specjax.runtime import program_cache
program_cache.start()
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
print(float(jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((8, 8))).sum()), sum("cache_hits" in name for name in events))
"""


@pytest.mark.slow
def test_a_second_process_compiles_nothing_and_a_damaged_entry_stops_nothing(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {"SPECJAX_CACHE": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}

    def hits():
        done = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        total, count = done.stdout.split()
        return float(total), int(count)

    (total, first), (same, second) = hits(), hits()
    assert first == 0 and second > 0 and same == total
    for entry in tmp_path.rglob("*-cache"):
        entry.write_bytes(b"damaged")
    assert hits()[0] == total
