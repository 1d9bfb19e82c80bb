"""Settings of every test, made before JAX starts: eight virtual CPU devices, strict promotions."""

import os

# Before the first array: read when the backend starts. One thread a worker: the arrays of tests are small, and
# workers that each want all cores wait for one another. Most of the time is compilation, a fifth of which is optimising
# what runs for milliseconds.
XLA_FLAGS = (
    "--xla_force_host_platform_device_count=8 --xla_cpu_multi_thread_eigen=false --xla_backend_optimization_level=0"
)
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {XLA_FLAGS}".strip()

import jax
import pytest

# Without it (4, 4) < (4,) silently compares per column.
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True, scope="module")
def compiled_programs():
    """Let go of after each file, which are some hundred: kept, a worker grows to several gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def dtype_promotion(request):
    """Strict, but for tests that run code of optax, which is not written for it."""
    if request.node.get_closest_marker("standard_promotion"):
        yield
        return
    with jax.numpy_dtype_promotion("strict"):
        yield
