"""The benchmark measures what it says: every table is there, and what is compared is the same work."""

import json
import os
import subprocess
import sys
from pathlib import Path

import flags
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from configs.benchmark import measure as benchmark
from configs.benchmark import measure_memory as benchmark_memory
from configs.benchmark import process_memory, timed_steps
from specjax.decoding import loop
from specjax.runtime import config as configs
from specjax.runtime.errors import UserError
from specjax.runtime.process_memory import crowded

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "benchmark" / "cpu.py"


def smoke():
    return configs.load(f"{CONFIG}:smoke")


def accelerator(folder: Path, **settings: str) -> subprocess.CompletedProcess:
    """The script's smoke run with these settings."""
    settings = {"PYTHON": sys.executable, "SMOKE": "1", "XLA_FLAGS": flags.QUICK} | settings
    settings["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    script = CONFIG.parents[2] / "launch" / "accelerator.sh"
    return subprocess.run([script, folder], env=os.environ | settings, capture_output=True, text=True, check=False)


def test_the_accelerators_script_leaves_out_parts_for_which_no_time_is_left(tmp_path):
    run = accelerator(tmp_path, SECONDS_IN_ALL="9", PARTS="bandwidth profile")
    assert run.returncode == 1
    assert run.stdout.splitlines() == [
        f"{part}: left out, the 9 s of all parts are over" for part in ("bandwidth", "profile")
    ]


def test_without_an_accelerator_the_script_says_what_to_install(tmp_path):
    run = accelerator(tmp_path, SMOKE="", JAX_PLATFORMS="cpu")
    assert run.returncode == 2 and "JAX finds no GPU or TPU" in run.stderr


@pytest.mark.slow
@pytest.mark.thorough
def test_the_accelerators_script_leaves_a_record_of_every_part(tmp_path):
    """Of two parts; tests/test_smoke.py runs all tables of the script in one process."""
    parts = ["bandwidth", "greedy_identity"]
    run = accelerator(tmp_path, SCALE="5", PARTS=" ".join(parts))
    assert run.returncode == 0, run.stdout + run.stderr
    assert [line.split(":")[0] for line in run.stdout.splitlines()] == parts
    rows = {name: json.loads((tmp_path / f"{name}.json").read_text())["rows"] for name in parts}
    assert all(rows.values())
    assert rows["greedy_identity"][0]["equal"] == rows["greedy_identity"][0]["of"]


def test_a_table_that_outgrows_the_device_ends_with_a_line_and_the_next_one_runs(tmp_path, monkeypatch, caplog):
    def outgrows(config):
        yield {"model": "small", "seconds": 1.0}
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 99 bytes.")

    fits = lambda config: [{"model": "next", "seconds": 2.0}]
    monkeypatch.setattr(benchmark, "BENCHMARKS", {"outgrows": outgrows, "fits": fits})
    config = smoke()
    config.tables = ("outgrows", "fits")
    rows = benchmark.run(config, tmp_path)["rows"]
    assert [row["model"] for row in rows] == ["small", "next"]
    assert "the device has no memory" in caplog.text


def test_the_minimal_loop_emits_what_ours_emits():
    model, params = tiny.decoder()
    prompts, lengths = tiny.prompts(0, 1, 5, 24)
    plan = tiny.plan(model, gamma=0, slots=5, max_new=9, greedy=True)
    ours = tiny.decode(plan, params, None, prompts, lengths, 9)
    keys = jax.random.split(jax.random.key(0), 1)
    state = loop.prefill(plan, params, None, prompts, lengths, keys)
    _, tokens, length = benchmark._minimal_loop(model, 9, params, state.target_cache, state.tokens, state.lengths[0])
    np.testing.assert_array_equal(length, ours.lengths[0])
    np.testing.assert_array_equal(tokens[0, :length], ours.tokens[0, :length])


def test_the_bare_product_reads_every_matrix_of_a_step():
    model, params = tiny.decoder()
    kernels = benchmark._kernels(params)
    norms = model.config.layers * 2 + 1
    assert sum(kernel.size for kernel in kernels) == model.num_step_params - norms * model.config.width
    x = jnp.ones((1, model.config.width))
    reference = benchmark._matvec_loop(1, kernels, x)
    assert reference.shape == x.shape and bool(jnp.all(jnp.isfinite(reference)))
    for number in range(len(kernels)):
        changed = [kernel.at[0].multiply(-3) if i == number else kernel for i, kernel in enumerate(kernels)]
        assert not np.allclose(benchmark._matvec_loop(1, changed, x), reference)


@pytest.mark.slow
@pytest.mark.standard_promotion
def test_heads_in_chunks_need_a_chunks_logits_and_all_at_once_those_of_all_positions():
    config = configs.load(f"{CONFIG.with_name('distillation_memory.py')}:smoke")
    case = {role: config.models[role].to_dict() | {"vocab_size": 8192} for role in ("draft", "target")}
    case |= {"batch_size": 4, "sequence_length": 64, "divergence": "forward_kl", "seed": 0}
    used = {chunk: benchmark_memory.measured({**case, "chunk": chunk}) for chunk in (16, 256)}
    logits = 4 * 8192 * 256
    assert used[256]["compiled"] - used[16]["compiled"] > 2 * logits
    for chunk, counts in used.items():
        paper = benchmark_memory.on_paper(chunk, 8192, config.models.draft.width)
        assert paper < counts["compiled"] < 3 * paper + 2e6


@pytest.mark.slow
def test_a_step_that_does_not_end_is_named_with_what_to_lower():
    config = configs.load(f"{CONFIG.with_name('distillation_memory.py')}:smoke")
    config.memory.divergence = "forward"
    with pytest.raises(UserError, match="vocabulary of 4096 and chunks of 16 .*there is no divergence.*lower memory"):
        benchmark.distillation_memory(config)
    config.memory.draft = "drafd"
    with pytest.raises(UserError, match='describes no model "drafd"; did you mean "draft"'):
        benchmark.distillation_memory(config)


def loading_config(**mesh):
    config = configs.load(f"{CONFIG.with_name('loading.py')}:smoke")
    config.mesh.update(mesh)
    return config


def test_each_rank_of_a_loading_mesh_reads_its_share(tmp_path):
    config = loading_config(fsdp=2, tensor=2, data=2)
    config.loading.directory = str(tmp_path)
    rows = benchmark.loading(config)
    assert [row["cache"] for row in rows] == ["cold", "warm"]
    for row in rows:
        assert row["files"] > 1 and row["devices"] == 8
        assert 1 / 4 <= row["most_gigabytes_of_a_rank"] / (row["parameters"] * 2 / 1e9) < 1 / 3
        assert row["array_gigabytes"] == pytest.approx(row["most_gigabytes_of_a_rank"] * 8)
        assert row["seconds"] > 0 and row["export_seconds"] > 0
    assert list(tmp_path.iterdir()) == []


def test_the_peak_of_a_loading_sees_memory_that_is_let_go_again():
    before = process_memory.resident()
    process_memory.reset_peak()
    np.ones(20_000_000)
    assert process_memory.peak() - before > 150e6
    process_memory.reset_peak()
    assert process_memory.peak() - before < 50e6


def test_a_disk_without_room_for_the_checkpoint_is_named(tmp_path):
    config = loading_config()
    config.loading.directory = str(tmp_path)
    config.models.large.vocab_size = 10**12
    with pytest.raises(UserError, match=f"{tmp_path}.* GB free and the checkpoint takes 1280.*loading.directory"):
        benchmark.loading(config)


def test_a_benchmark_that_is_not_there_or_not_for_a_mesh_is_refused(tmp_path):
    config = smoke()
    config.tables = ("contxt",)
    with pytest.raises(UserError, match='there is no benchmark "contxt"; did you mean "context"'):
        benchmark.run(config, tmp_path)
    config.tables, config.mesh.data = ("context", "loading"), 8
    with pytest.raises(UserError, match="all benchmarks but loading are of one device"):
        benchmark.run(config, tmp_path)


def test_a_model_that_is_not_described_is_named():
    config = smoke()
    config.plain.models = ("wied",)
    with pytest.raises(UserError, match='describes no model "wied"; did you mean "wide"'):
        benchmark.plain_decoding(config)


def test_a_text_that_does_not_fit_its_cache_is_refused():
    config = smoke()
    config.context.contexts = (64,)
    with pytest.raises(UserError, match="a context of 64 tokens and 1 more do not fit a capacity of 32"):
        benchmark.context(config)


def test_measurements_are_taken_in_turns_and_the_first_round_is_left_out():
    calls = []
    cases = [(lambda: jnp.zeros(()), lambda x, name=name: calls.append(name)) for name in "ab"]
    seconds = timed_steps.in_turns(cases, 2)
    assert [len(case) for case in seconds] == [2, 2]
    assert calls == ["a", "b", "b", "a", "a", "b"]


def test_programs_that_are_let_go_of_leave_room_for_others_to_be_mapped():
    mapped = lambda: len(Path("/proc/self/maps").read_text().splitlines())
    functions = [jax.jit(lambda x, k=k: jnp.tanh(x + k) @ x) for k in range(20)]
    before = mapped()
    for function in functions:
        function(jnp.ones((4, 4))).block_until_ready()
    full = mapped()
    jax.clear_caches()
    assert full - before >= 20 and mapped() - before < (full - before) / 2
    assert crowded(0.0) and not crowded(1.0)


@pytest.mark.slow
def test_a_sparse_targets_verification_is_predicted_from_the_timed_numbers_of_tokens():
    rows = benchmark.experts(configs.load(f"{CONFIG.with_name('experts.py')}:smoke"))
    assert [row["tokens"] for row in rows] == [1, 2, 3]
    assert rows[0]["experts"] == pytest.approx(8, abs=1e-3)
    assert rows[0]["experts"] < rows[1]["experts"] < rows[2]["experts"] < 24
    assert rows[0]["ratio"] == pytest.approx(1) == rows[2]["ratio"]
