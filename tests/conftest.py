"""Settings of every test, made before JAX starts: eight virtual CPU devices, strict promotions, shared programs."""

import atexit
import os
import shutil
import tempfile

import flags

# Before the first array: read when the backend starts.
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), flags.DEVICES, flags.THREADS, flags.QUICK]).strip()

# What one file has compiled, in whichever worker, the others read: a fifth of the processor's time. It goes with the
# run; the process that is first here hands it to its workers.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="specjax-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax
import pytest

# Without it (4, 4) < (4,) silently compares per column.
jax.config.update("jax_numpy_rank_promotion", "raise")


# Files of which each test is a run by itself, of up to a minute and a half: whichever worker is free takes the next
# one. The tests of any other file share what they have made, and stay together.
APART = ("test_smoke.py", "test_notebook.py")


@pytest.hookimpl(wrapper=True, optionalhook=True)  # absent with -p no:xdist
def pytest_xdist_auto_num_workers(config):
    """One more than cores, as tests of several processes, of signals and of lost hosts are waiting for long."""
    return (yield) + 1


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Ours rather than --dist loadgroup, of which pytest 9.2 leaves no group together."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.split("::", 1)[0]
            return nodeid if file.endswith(APART) else file

    return ByFile(config, log)


@pytest.fixture(autouse=True, scope="module")
def one_worker(request, tmp_path_factory):
    """Of a file: a later pytest or xdist may leave our scheduler unused, and only the time would tell."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is None or request.path.name in APART:
        return
    note = tmp_path_factory.getbasetemp().parent / f"{request.path.stem}.worker"  # in the folder of all workers
    if note.exists():
        assert note.read_text() == worker, f"tests of {request.path.name} are spread over workers: see ByFile"
    note.write_text(worker)


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
