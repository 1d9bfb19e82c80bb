"""Runs of several processes on this machine: the same end as one process, whatever happens on the way.

Every process is started by `launch/local_processes.sh`, stays on loopback, and is killed where it takes too long.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import flags
import forked
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file

from specjax import api
from specjax.hub.tokenizer import train_byte_bpe
from specjax.reporting import records

ROOT = Path(__file__).resolve().parents[1]
TEXT = "".join(f"def add_{i}(x):\n    return x + {i}\n\n\n" for i in range(300))
STEPS = 6
# Of a run, from its start to its end.
SECONDS = 150

CONFIG = """
from ml_collections import ConfigDict
from specjax.runtime import config as configs

def get_config():
    whole = configs.load("{root}/configs/quickstart.py:smoke")
    config = ConfigDict()
    config.stages, config.seed = ("draft", "evaluation"), 0
    config.draft, config.evaluation = whole.distilled, whole.evaluation
    for section in (config.draft, config.evaluation):
        section.mesh.update({{"data": 2, "tensor": 2}})
        section.task.update({{"name": "text", "path": "{home}/text.py", "size": 0}})
        section.target = "{home}/target"
    draft, evaluation = config.draft, config.evaluation
    draft.tokenizer.path, draft.model.init = "{home}/target", "random"
    draft.model.update({{"kv_heads": 2, "head_size": 8, "width": 16, "mlp_width": 32}})
    draft.data.update({{"batch_size": 4, "sequence_length": 24, "fixed": 0.5, "draft": 0.5}})
    draft.data.generation.max_new_tokens = 8
    draft.train.update({{"steps": {steps}, "log_every": 3, "eval_every": 2, "checkpoint_every": 2}})
    draft.speculative_eval.every = 0
    evaluation.drafters = {{"draft": {{"kind": "model", "path": "stage:draft", "rules": {{"lossless": (2,)}}}}}}
    evaluation.temperatures, evaluation.compare = (1.0,), ()
    evaluation.selection.count, evaluation.batch_sizes = 3, (2,)
    return config
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a target, a text, and a config of two stages: a draft on its own text, and its evaluation."""
    home = tmp_path_factory.mktemp("home")
    tokenizer = train_byte_bpe([TEXT], 280)
    target, params = tiny.decoder(0, vocab_size=tokenizer.vocab_size, kv_heads=2, max_positions=96)
    api.save(api.Model(target, params, tokenizer), home / "target")
    (home / "text.py").write_text(TEXT)
    (home / "config.py").write_text(CONFIG.format(root=ROOT, home=home, steps=STEPS))
    return home


class Run:
    """Processes of one run, and what they write to stderr."""

    def __init__(self, home, workdir, processes, devices, *overrides):
        arguments = [f"--processes={processes}", f"--devices={devices}", f"--python={sys.executable}"]
        arguments += [f"--config={home / 'config.py'}", f"--workdir={workdir}", "--", *overrides]
        environment = {**os.environ, **quick(home)}
        self._log = workdir.parent / f"{workdir.name}.{time.monotonic_ns()}.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                ["bash", str(ROOT / "launch" / "local_processes.sh"), *arguments],
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def log_text(self):
        return self._log.read_text(errors="replace")

    def wait_for(self, path):
        """Until the path is there; fails where the run ends before it."""
        deadline = time.monotonic() + SECONDS
        while not path.exists():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.end()
                pytest.fail(f"{path} never came:\n{self.log_text}")
            time.sleep(0.02)

    def send(self, number, process=None):
        """A signal to one of the processes, or to the launcher."""
        pids = dict(re.findall(r"process (\d+) is (\d+)", self.log_text))
        os.kill(self._process.pid if process is None else int(pids[str(process)]), number)

    def end(self):
        """The exit code; what still runs after the longest time is killed."""
        try:
            return self._process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            return "too long"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)


def quick(home):
    """What keeps tiny programs from taking long: compiled once for several runs, and not optimised."""
    return {
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(home / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "XLA_FLAGS": f"{flags.THREADS} {flags.QUICK}",
        "SPECJAX_GRACE_SECONDS": "5",
    }


@pytest.fixture(scope="module")
def alone(home):
    """The workdir of one process that was never disturbed, on the mesh of the others."""
    run = Run(home, home / "alone", 1, 4)
    assert run.end() == 0, run.log_text
    return home / "alone"


# What depends on the clock, and on how many processes there were.
TIMED = re.compile("second|speed|mbsu|_ratio$|clock|serving")


def assert_same_end(workdir, reference):
    """The same parameters, but for the order of sums, and the same records, but for times."""
    mine, theirs = (load_file(where / "draft" / "export" / "model.safetensors") for where in (workdir, reference))
    assert mine.keys() == theirs.keys()
    for name, values in theirs.items():
        np.testing.assert_allclose(mine[name], values, rtol=1e-4, atol=1e-6, err_msg=name)
    lines = [records.read_metrics(where / "draft" / "metrics.jsonl") for where in (workdir, reference)]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]
    rows = [records.read_results(where / "results.json")["rows"] for where in (workdir, reference)]
    for mine, theirs in [*zip(*lines, strict=True), *zip(*rows, strict=True)]:
        assert mine.keys() == theirs.keys()
        untimed = [key for key in theirs if not TIMED.search(key) and key != "config"]
        assert any(isinstance(theirs[key], float) for key in untimed)
        for key in untimed:
            assert_close(mine[key], theirs[key], key)


def assert_close(mine, theirs, where):
    if isinstance(theirs, dict):
        assert mine.keys() == theirs.keys(), where
        for key in theirs:
            assert_close(mine[key], theirs[key], f"{where}.{key}")
    elif isinstance(theirs, list):
        assert len(mine) == len(theirs), where
        for index, pair in enumerate(zip(mine, theirs, strict=True)):
            assert_close(*pair, f"{where}[{index}]")
    elif isinstance(theirs, float):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6), where
    else:
        assert mine == theirs, where


@pytest.mark.slow
@pytest.mark.thorough
def test_a_process_killed_mid_run_and_all_started_again_end_as_one_process_does(home, alone):
    workdir = home / "killed"
    run = Run(home, workdir, 2, 2)
    run.wait_for(workdir / "draft" / "checkpoints" / "2")
    run.send(signal.SIGKILL, process=1)
    assert run.end() not in (0, "too long"), run.log_text
    assert not (workdir / "draft" / "results.json").exists(), "it was killed before its end"
    again = Run(home, workdir, 2, 2)
    assert again.end() == 0, again.log_text
    assert_same_end(workdir, alone)


@pytest.fixture(scope="module")
def stopped(home):
    """The workdir of four processes that were asked to stop."""
    workdir = home / "stopped"
    run = Run(home, workdir, 4, 1)
    run.wait_for(workdir / "draft" / "checkpoints" / "2")
    run.send(signal.SIGTERM)
    assert run.end() == 75, run.log_text
    assert not (workdir / "draft" / "results.json").exists()
    assert run.log_text.count("stopped by SIGTERM") == 4
    return workdir


@pytest.mark.slow
@pytest.mark.thorough
def test_four_stopped_processes_resume_and_end_as_one_process_does(home, alone, stopped):
    workdir = home / "continued"
    shutil.copytree(stopped, workdir)
    again = Run(home, workdir, 4, 1)
    assert again.end() == 0, again.log_text
    assert_same_end(workdir, alone)
    records_of = {path.name for path in workdir.glob("*")}
    assert records_of == {"config.json", "data.json", "results.json", "report.html", "figures", "draft", "evaluation"}


@pytest.mark.slow
@pytest.mark.thorough
def test_a_checkpoint_of_four_processes_resumes_in_one_on_another_mesh(home, alone, stopped):
    workdir = home / "elsewhere"
    shutil.copytree(stopped, workdir)
    meshes = [f"--config.{stage}.mesh.{axis}={n}" for stage in ("draft", "evaluation") for axis, n in NARROW.items()]
    again = Run(home, workdir, 1, 2, *meshes)
    assert again.end() == 0, again.log_text
    assert_same_end(workdir, alone)
    assert json.loads((workdir / "config.json").read_text())["draft"]["mesh"] == NARROW


NARROW = {"data": 1, "fsdp": 2, "tensor": 1}


def start(home, log, *arguments, folder=ROOT):
    """A process and the file of what it prints; it is forked, as its imports would take longest."""
    command = [f"--config={home / 'config.py'}", *arguments]
    return forked.start(command, log, {**quick(home), "JAX_PLATFORMS": "cpu"}, folder), log


def endings(started):
    """Exit codes and the last message of each process; all have to end within a minute."""
    result = []
    for process, log in started:
        process.join(timeout=60)
        if process.exitcode is None:
            process.kill()
            process.join()
        message = log.read_text(errors="replace")
        lines = [line for line in message.splitlines() if line.startswith("error: ")]
        result.append((process.exitcode, lines[-1] if lines else message))
    return result


def pair(home, port, *arguments):
    joining = [f"--coordinator=127.0.0.1:{port}", "--processes=2", "--join_seconds=30"]
    return [[*joining, f"--process_id={number}", *arguments] for number in range(2)]


@pytest.mark.slow
def test_processes_started_with_different_configs_are_named(home, tmp_path):
    one, other = pair(home, 20711, f"--workdir={tmp_path / 'w'}")
    started = [start(home, tmp_path / "0", *one), start(home, tmp_path / "1", *other, "--config.draft.seed=7")]
    for code, message in endings(started):
        assert code == 2
        assert "process 1 (config.draft.seed: 0 there, 7 here) differ from process 0" in message
    assert not (tmp_path / "w").exists()


@pytest.mark.slow
def test_a_workdir_that_the_hosts_do_not_share_is_refused(home, tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    # A file system is given 20 seconds to show what another host wrote.
    hurry = "\nfrom specjax.runtime import processes\nprocesses._VISIBLE_SECONDS = 2\n"
    (tmp_path / "config.py").write_text((home / "config.py").read_text() + hurry)
    arguments = pair(home, 20721, "--workdir=w", f"--config={tmp_path / 'config.py'}")
    started = [
        start(home, folder / "log", *each, folder=folder) for each, folder in zip(arguments, folders, strict=True)
    ]
    for code, message in endings(started):
        assert code == 2
        assert "process 0: " in message and "does not see what process 1 wrote to w" in message
        assert "let --workdir be a folder that all hosts share" in message


@pytest.mark.slow
def test_a_workdir_that_cannot_be_written_is_refused_by_all(home, tmp_path):
    (tmp_path / "file").touch()
    arguments = pair(home, 20731, f"--workdir={tmp_path / 'file' / 'w'}")
    started = [start(home, tmp_path / str(number), *each) for number, each in enumerate(arguments)]
    for code, message in endings(started):
        assert code == 2
        assert "process 0: " in message and "cannot be written" in message


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_a_process_that_finds_no_others_says_what_to_check(home, tmp_path, number):
    given = pair(home, 20741 + number, f"--workdir={tmp_path / 'w'}")[number]
    [(code, message)] = endings([start(home, tmp_path / "log", *given, "--join_seconds=2")])
    assert code == 2
    assert f"process {number} of 2 did not find the others within 2 s" in message
    assert f"process 0 listens at 127.0.0.1:{20741 + number}" in message and "port" in message
