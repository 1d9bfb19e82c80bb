"""Settings of every test, made before JAX starts: eight virtual CPU devices, strict promotion, one program cache."""

import atexit
import functools
import gc
import os
import resource
import shutil
import tempfile
from pathlib import Path

import flags

# Before the first array: read when the backend starts.
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), flags.DEVICES, flags.THREADS, flags.QUICK]).strip()

# All workers share one compilation cache, which saves a fifth of the processor's time. It is deleted after the run. The
# first process makes it and its workers inherit the variable.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="specjax-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax
import pytest

pytest.register_assert_rewrite("enumeration", "lossless", "tiny")

# Without it (4, 4) < (4,) silently compares per column.
jax.config.update("jax_numpy_rank_promotion", "raise")


# The longest files run first, so that no worker is left alone with one at the end.
LONGEST = ("test_tpu", "test_smoke", "test_notebook", "test_exactness", "test_trainer", "test_plan", "test_loop")

# Each test of these files is a run of its own, up to a minute and a half long: any free worker takes the next one. The
# tests of every other file share fixtures, so they stay on one worker.
SPREAD = ("test_smoke.py", "test_notebook.py")
# With this, each test of any file: on a GPU with many cores compiling takes longer than the fixtures.
SPREAD_ALL = bool(os.environ.get("SPECJAX_SPREAD_TESTS"))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Move the longest files to the front."""
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.hookimpl(tryfirst=True, specname="pytest_collection_modifyitems")
def pytest_mark_slow_cases_without_a_new_value_as_thorough(items):
    """A case stays if it has a value of an argument that no earlier one has, so that CI misses no drafter and no rule.
    So does every fourth."""
    cases = {}
    for item in items:
        in_ci = item.get_closest_marker("slow") and not item.get_closest_marker("peers")
        if in_ci and hasattr(item, "callspec") and item.path.name not in SPREAD:
            cases.setdefault((item.path, item.originalname), []).append(item)
    for of_test in cases.values():
        seen = set()
        for number, item in enumerate(of_test):
            # Values are the same objects in every case that has them.
            values = {(name, id(value)) for name, value in item.callspec.params.items()}
            if number % 4 and values <= seen:
                item.add_marker("thorough")
            else:
                seen |= values


# To search for garbage takes a sixth of the time of collecting the tests and a tenth of that of running them: imports
# and traces make many objects, and most of them live.
gc.disable()


def pytest_collection_finish():
    """Search for garbage again, but seldom and not among what was imported."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    gc.enable()


@pytest.hookimpl(wrapper=True, optionalhook=True)  # absent with -p no:xdist
def pytest_xdist_auto_num_workers(config):
    """One worker more than cores: tests of several processes, of signals and of lost hosts mostly wait."""
    return (yield) + 1


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Keep a file on one worker, in our order. (--dist loadgroup splits groups under pytest 9.2.)"""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.split("::", 1)[0]
            return nodeid if SPREAD_ALL or file.endswith(SPREAD) else file

    config.option.loadscopereorder = False  # by number of tests, which says little about time
    return ByFile(config, log)


@pytest.fixture(autouse=True, scope="module")
def one_worker(request, tmp_path_factory):
    """Check that one worker runs all of a file: a later pytest or xdist might ignore our scheduler unnoticed."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is None or SPREAD_ALL or request.path.name in SPREAD:
        return
    note = tmp_path_factory.getbasetemp().parent / f"{request.path.stem}.worker"  # in the folder of all workers
    if note.exists():
        assert note.read_text() == worker, f"tests of {request.path.name} are spread over workers: see ByFile"
    note.write_text(worker)


# Bytes of a worker above which it drops its compiled programs after a file.
MOST_BYTES = 2 << 30


@pytest.fixture(autouse=True, scope="module")
def compiled_programs(request):
    """Keep compiled programs for the next file, small ones above all; but a worker would grow to several gigabytes."""
    alone = request.path.stem in flags.ALONE
    if alone:
        jax.clear_caches()
    yield
    from specjax.runtime import process_memory

    memory = Path("/proc/self/statm")
    held = int(memory.read_text().split()[1]) * resource.getpagesize() if memory.exists() else MOST_BYTES
    if alone or held >= MOST_BYTES or process_memory.crowded(0.3):
        jax.clear_caches()


@pytest.fixture
def layers_by_themselves(monkeypatch):
    """Trace every layer in every program, for tests that replace what a layer calls."""
    from specjax.models import layers

    monkeypatch.setattr(layers, "traced_once", functools.partial)


@pytest.fixture(autouse=True)
def dtype_promotion(request):
    """Strict promotion, except in tests that run optax, which raises under it."""
    if request.node.get_closest_marker("standard_promotion"):
        yield
        return
    with jax.numpy_dtype_promotion("strict"):
        yield
