"""The command line: overrides, stages, resuming, and one sentence for every mistake."""

import errno
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from specjax import distill, main
from specjax.reporting import records
from specjax.runtime import cli, errors, processes, stopping, timing
from specjax.runtime import config as configs
from specjax.runtime.errors import UserError, nearest

ROOT = Path(__file__).resolve().parents[1]

CONFIG = """
from ml_collections import ConfigDict

def get_config(variant=""):
    config = ConfigDict()
    config.seed = 0
    config.rate = 0.1
    config.gammas = (1, 2)
    config.name = "plain"
    config.wide = False
    config.train = ConfigDict({"steps": 3 if variant == "smoke" else 300})
    return config
"""

STAGES = """
from ml_collections import ConfigDict

def get_config():
    config = ConfigDict({"seed": 0, "stages": ("target", "draft")})
    config.target = ConfigDict({"seed": 0, "binary": "distill", "target": "", "steps": 5})
    config.draft = ConfigDict({"seed": 0, "binary": "distill", "target": "stage:target", "steps": 5})
    return config
"""


def written(path, text):
    path.write_text(text)
    return str(path)


@pytest.fixture
def config_file(tmp_path):
    return written(tmp_path / "some_config.py", CONFIG)


@pytest.fixture
def stages_file(tmp_path):
    return written(tmp_path / "stages.py", STAGES)


def parse(*argv):
    return cli.parse([*argv, "--workdir=here"])[0]


def test_a_variant_and_overrides_of_every_type_reach_the_config(config_file):
    overrides = ["--config.rate=1", "--config.gammas=3,4,5", "--config.name=other", "--config.wide=true"]
    config = parse(f"--config={config_file}:smoke", *overrides, "--config.seed=7")
    assert config.to_dict() == {
        "seed": 7,
        "rate": 1.0,
        "gammas": (3, 4, 5),
        "name": "other",
        "wide": True,
        "train": {"steps": 3},
    }
    assert config.is_locked


@pytest.mark.parametrize(
    ("text", "like", "value"),
    [
        ("3,4", (1, 2), (3, 4)),
        ("(3,)", (1, 2), (3,)),
        ("[3, 4]", (1, 2), (3, 4)),
        ("", (1, 2), ()),
        ("1e-3,1", (0.5,), (0.001, 1.0)),
        ("ngram,none", ("model",), ("ngram", "none")),
        ("('ngram', \"none\")", ("model",), ("ngram", "none")),
        (r'["\n\n", " the", "a, b", "1"]', (), ("\n\n", " the", "a, b", "1")),
        ("4", (), (4,)),
        ("0.5,1,x", (), (0.5, 1, "x")),
        ("1,0.5,-1", (2, 0.5, -1), (1, 0.5, -1)),
        ("None", None, None),
        ("runs/a", None, "runs/a"),
        ("1e3", 0.5, 1000.0),
    ],
)
def test_values_are_written_plainly(text, like, value):
    assert cli._value(text, like) == value


def test_one_parse_leaves_no_state_for_the_next(config_file):
    assert parse(f"--config={config_file}", "--config.seed=7").seed == 7
    assert parse(f"--config={config_file}").seed == 0


BAD_ARGUMENTS = [
    (["--config.trian.steps=3"], 'config.trian.steps does not exist; did you mean "train"?'),
    (["--config.train.stesp=3"], 'config.train.stesp does not exist; did you mean "steps"?'),
    (["--config.seed.more=3"], 'the value in which "more" is looked up has no keys'),
    (["--config.train.steps=abc"], 'config.train.steps is of type int, such as 300, and "abc" is not'),
    (["--config.train.steps=1.5"], 'config.train.steps is of type int, such as 300, and "1.5" is not'),
    (["--config.rate="], 'config.rate is of type float, such as 0.1, and "" is not'),
    (["--config.wide=perhaps"], 'config.wide is of type bool, such as False, and "perhaps" is not'),
    (["--config.train=3"], "config.train is a section; override one of its keys: steps"),
    (["--config.gammas=a,b"], 'config.gammas is of type tuple, such as (1, 2), and "a,b" is not'),
    (["--config.gammas=1,,2"], '"1,,2" is not'),
    (["--confg.seed=3"], '"--confg.seed=3" is not understood'),
    (["--steps=3"], '"--steps=3" is not understood'),
    (["--config.seed", "3"], '"--config.seed" is not understood'),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS)
def test_a_wrong_argument_gets_one_sentence_and_exit_code_2(config_file, tmp_path, capsys, arguments, message):
    argv = [f"--config={config_file}", f"--workdir={tmp_path / 'work'}", *arguments]
    assert cli.launch(lambda config, workdir: pytest.fail("ran"), "specjax.main", argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("{}/some_confg.py", "there is no config file .*did you mean .*some_config.py"),
        ("{}/configs/evaluate/pair.py:smoke", "is an old name; it is now configs/evaluate.py"),
        ("configs/draft_design/advise.py", "is an old name; it is now configs/advise.py"),
        ("{}/some_config.py:nope:", None),
        ("{}/stages.py:smoke", 'has no variants; leave out ":smoke"'),
        ("{}/broken.py", "not valid Python"),
        ("{}/empty.py", "has no get_config function"),
        ("{}/text.txt", "is not a Python file"),
    ],
)
def test_a_wrong_config_file_is_named(config_file, stages_file, tmp_path, argument, message):
    written(tmp_path / "broken.py", "def get_config(:")
    written(tmp_path / "empty.py", "")
    written(tmp_path / "text.txt", "seed: 3")
    if message is None:
        assert configs.load(argument.format(tmp_path)).train.steps == 300
        return
    with pytest.raises(UserError, match=message):
        configs.load(argument.format(tmp_path))


@pytest.mark.parametrize("missing", ["config", "workdir"])
def test_a_missing_flag_is_named(config_file, missing):
    flags = {"config": config_file, "workdir": "here"}
    del flags[missing]
    with pytest.raises(UserError, match=f"--{missing} is missing"):
        cli.parse([f"--{name}={value}" for name, value in flags.items()])


def test_an_interrupt_ends_with_130_and_a_bug_with_its_traceback(config_file, tmp_path):
    argv = [f"--config={config_file}", f"--workdir={tmp_path / 'work'}"]

    def interrupted(config, workdir):
        raise KeyboardInterrupt

    def broken(config, workdir):
        raise ZeroDivisionError

    assert cli.launch(interrupted, "specjax.main", argv) == 130
    with pytest.raises(ZeroDivisionError):
        cli.launch(broken, "specjax.main", argv)


def test_a_changed_config_in_an_old_workdir_is_refused_with_the_difference(config_file, tmp_path):
    config = configs.load(config_file)
    configs.assert_same_run(config, tmp_path)
    configs.assert_same_run(configs.load(config_file), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["gammas"] == [1, 2]
    config.train.steps, config.gammas = 400, (1,)
    with pytest.raises(UserError, match=r"gammas: \[1, 2\] -> \[1\]; train.steps: 300 -> 400"):
        configs.assert_same_run(config, tmp_path)
    del config.name
    with pytest.raises(UserError, match='name: "plain" -> absent'):
        configs.assert_same_run(config, tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        configs.assert_same_run(config, tmp_path)


def test_the_mesh_may_change_from_one_sitting_to_the_next(config_file, tmp_path):
    config = configs.load(config_file)
    config.mesh, config.train.mesh = {"data": 4, "tensor": 1}, {"data": 4, "tensor": 1}
    configs.assert_same_run(config, tmp_path)
    config.train.mesh.data, config.mesh.tensor = 1, 2
    configs.assert_same_run(config, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["train"]["mesh"] == {"data": 1, "tensor": 1}
    config.train.steps = 1
    with pytest.raises(UserError, match=r"another config \(train.steps: 300 -> 1\)"):
        configs.assert_same_run(config, tmp_path)


def test_a_run_that_receives_sigterm_exits_with_its_own_code(config_file, tmp_path, capsys):
    def asked_to_stop(config, workdir):
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("it continues")

    def holds(config, workdir):
        with stopping.holding():
            os.kill(os.getpid(), signal.SIGTERM)
            saved.append(stopping.stop_asked())
        stopping.stop_if_asked()

    saved, argv = [], [f"--config={config_file}", f"--workdir={tmp_path / 'w'}"]
    before = signal.getsignal(signal.SIGTERM)
    for run in (asked_to_stop, holds):
        assert cli.launch(run, "specjax.main", argv) == 75
        assert "the same command resumes from what was saved" in capsys.readouterr().err
    assert saved == [True] and signal.getsignal(signal.SIGTERM) is before
    assert cli.launch(lambda config, workdir: None, "specjax.main", argv) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--coordinator=h:1", "--processes=2"], "--process_id is missing"),
        (["--processes=2", "--process_id=0"], "--coordinator is missing"),
        (["--coordinator=h", "--processes=2", "--process_id=0"], "write --coordinator=HOST:PORT"),
        (["--coordinator=h:1", "--processes=2", "--process_id=2"], "--process_id=2 of --processes=2"),
        (["--coordinator=h:1", "--processes=two", "--process_id=0"], '--processes is "two"'),
        (["--coordinator"], '--coordinator is ""; write --coordinator=HOST:PORT'),
    ],
)
def test_flags_of_several_processes_that_make_no_sense_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        processes.parse(flags)


def test_flags_of_several_processes_are_taken_from_the_others():
    flags = ["--coordinator=[::1]:80", "--processes=4", "--process_id=3", "--join_seconds=9"]
    joining, rest = processes.parse(["--config=a", *flags, "--config.seed=1"])
    assert joining == processes.Joining("[::1]:80", 4, 3, 9)
    assert rest == ["--config=a", "--config.seed=1"]
    assert processes.parse([]) == (processes.Joining(), [])


def test_a_workdir_that_cannot_be_written_is_refused(config_file, tmp_path, capsys):
    (tmp_path / "file").touch()
    argv = [f"--config={config_file}", f"--workdir={tmp_path / 'file' / 'w'}"]
    assert cli.launch(lambda config, workdir: pytest.fail("it began"), "specjax.main", argv) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_references_to_earlier_stages_become_paths(stages_file):
    config = configs.load(stages_file)
    config.draft.others = ("workdir:target", "C:stage", "stage:target/test.jsonl", 3)
    resolved = configs.resolve(config.draft, "runs/a", ("target",))
    assert resolved.target == "runs/a/target/export"
    assert resolved.others == ("runs/a/target", "C:stage", "runs/a/target/export/test.jsonl", 3)
    assert config.draft.target == "stage:target"
    with pytest.raises(UserError, match='names no earlier stage; did you mean "targets"'):
        configs.resolve(config.draft, "runs/a", ("targets",))


@pytest.fixture
def calls(monkeypatch):
    """What the stages were run with; each leaves a result of one row, as a binary does."""
    calls = []

    def run(config, workdir):
        calls.append((Path(workdir).name, config.target))
        if config.steps < 0:
            raise UserError("steps is negative")
        row = {"steps": config.steps}
        records.write_results(workdir / "results.json", binary="distill", config=config.to_dict(), rows=[row])

    monkeypatch.setattr(distill, "run", run)
    return calls


def test_stages_run_in_order_and_finished_ones_are_skipped(stages_file, tmp_path, calls):
    workdir = tmp_path / "work"
    argv = [f"--config={stages_file}", f"--workdir={workdir}"]
    assert cli.launch(main.run, "specjax.main", argv) == 0
    assert calls == [("target", ""), ("draft", f"{workdir}/target/export")]
    results = records.read_results(workdir / "results.json")
    assert results["binary"] == "main"
    assert results["rows"] == [{"stage": "target", "steps": 5}, {"stage": "draft", "steps": 5}]

    assert cli.launch(main.run, "specjax.main", argv) == 0
    assert len(calls) == 2
    (workdir / "draft" / "results.json").unlink()
    assert cli.launch(main.run, "specjax.main", argv) == 0
    assert [name for name, _ in calls] == ["target", "draft", "draft"]


def test_a_workdir_may_be_moved(stages_file, tmp_path, calls):
    assert cli.launch(main.run, "specjax.main", [f"--config={stages_file}", f"--workdir={tmp_path / 'a'}"]) == 0
    (tmp_path / "a").rename(tmp_path / "b")
    (tmp_path / "b" / "draft" / "results.json").unlink()
    assert cli.launch(main.run, "specjax.main", [f"--config={stages_file}", f"--workdir={tmp_path / 'b'}"]) == 0
    assert calls[-1] == ("draft", f"{tmp_path}/b/target/export")


def test_a_stage_that_fails_leaves_the_finished_ones_and_no_result_for_the_whole(stages_file, tmp_path, calls, capsys):
    argv = [f"--config={stages_file}", f"--workdir={tmp_path / 'w'}", "--config.draft.steps=-1"]
    assert cli.launch(main.run, "specjax.main", argv) == 2
    assert "error: steps is negative\n" in capsys.readouterr().err
    assert (tmp_path / "w" / "target" / "results.json").exists()
    assert not (tmp_path / "w" / "results.json").exists()


def reads(config, workdir):
    """A binary that reads the file in `task.path`."""
    if not Path(config.task.path).is_file():
        raise UserError(f"there is no {config.task.path}; set task.path, or config.target, to a file")
    (Path(workdir) / "results.json").write_text("{}")


def config_of(folder, prompts="", stages=False):
    """A config whose sections refer to the key `prompts`; the first of two stages has data of its own."""
    text = f"""
from ml_collections import ConfigDict

def get_config():
    config = ConfigDict({{"prompts": "{prompts}", "target": "", "seed": 0}})
    section = lambda: ConfigDict({{"binary": "", "task": {{"path": config.get_ref("prompts")}}, "steps": 5}})
    if not {stages}:
        config.task = section().task
        return config
    config.first, config.second, config.stages = section(), section(), ("first", "second")
    config.first.task = ConfigDict({{"path": "{folder}/first.txt"}})
    return config
"""
    return written(folder / "c.py", text)


SHARING = """
from ml_collections import ConfigDict

def get_config():
    config = ConfigDict({"questions": "own", "target": "small"})
    config.task = ConfigDict({"path": config.get_ref("questions")})
    config.text = ConfigDict({"task": {"path": config.task.get_ref("path")}, "target": config.get_ref("target")})
    config.evaluation = ConfigDict({"questions": {"path": config.get_ref("questions")}})
    rules = ConfigDict({"gammas": (2, 4)})
    config.first, config.second = ConfigDict({"rules": rules}), ConfigDict({"rules": rules})
    return config
"""


@pytest.mark.parametrize(
    "key, value, changed",
    [
        ("questions", "theirs", {"questions", "task.path", "text.task.path", "evaluation.questions.path"}),
        ("task.path", "theirs", {"task.path", "text.task.path"}),
        ("evaluation.questions.path", "theirs", {"evaluation.questions.path"}),
        ("text.target", "large", {"text.target"}),
        ("first.rules.gammas", "(3,)", {"first.rules.gammas"}),
    ],
)
def test_an_override_changes_its_key_and_the_keys_that_follow_it(tmp_path, key, value, changed):
    before = dict(configs.leaves(configs.load(str(written(tmp_path / "c.py", SHARING))).to_dict()))
    argv = [f"--config={tmp_path / 'c.py'}", f"--workdir={tmp_path}", f"--config.{key}={value}"]
    after = dict(configs.leaves(cli.parse(argv)[0].to_dict()))
    assert {name for name in before if after[name] != before[name]} == changed


def test_a_wrong_path_does_not_block_the_corrected_command(tmp_path, capsys):
    workdir, prompts = tmp_path / "w", written(tmp_path / "prompts.txt", "a")
    command = [f"--config={config_of(tmp_path)}", f"--workdir={workdir}"]
    assert cli.launch(reads, "specjax.evaluate", [*command, f"--config.prompts={tmp_path}/prompt.txt"]) == 2
    assert "prompt.txt; set --config.prompts, or config.target, to a file" in capsys.readouterr().err
    assert list(workdir.iterdir()) == []
    assert cli.launch(reads, "specjax.evaluate", [*command, f"--config.prompts={prompts}"]) == 0
    assert cli.launch(reads, "specjax.evaluate", [*command, f"--config.prompts={tmp_path}/prompt.txt"]) == 2
    assert "belongs to a run with another config (prompts:" in capsys.readouterr().err
    assert cli.launch(reads, "specjax.evaluate", [*command, f"--config.prompts={prompts}"]) == 0


def test_a_wrong_path_of_a_later_stage_can_be_corrected(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(main, "binary", lambda section: reads)
    monkeypatch.setattr(records, "read_results", lambda path: {"rows": []})
    monkeypatch.setattr(records, "write_results", lambda *_, **__: {"rows": []})
    written(tmp_path / "first.txt", "a")
    command = [f"--config={config_of(tmp_path, stages=True)}", f"--workdir={tmp_path / 'w'}"]
    good = [*command, f"--config.prompts={written(tmp_path / 'prompts.txt', 'a')}"]
    wrong = [*command, f"--config.prompts={tmp_path}/prompt.txt", "--config.second.steps=-1"]
    assert cli.launch(main.run, "specjax.main", wrong) == 2
    assert "set --config.prompts, or" in capsys.readouterr().err
    assert cli.launch(main.run, "specjax.main", [*good, "--config.first.steps=6"]) == 2
    assert "first.steps: 5 -> 6" in capsys.readouterr().err
    assert cli.launch(main.run, "specjax.main", good) == 0


def test_a_stopped_process_ends_at_once_and_another_as_python_does(monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    for code in (2, stopping.STOPPED):
        with pytest.raises(SystemExit) as leaving:
            cli.leave(code)
        assert leaving.value.code == code
    assert ended == [stopping.STOPPED]


def test_a_full_disk_is_one_sentence_without_the_tracebacks_of_threads(tmp_path, caplog):
    def fails():
        try:
            raise ValueError("RESOURCE_EXHAUSTED: Failed to write 58403 bytes: No space left on device [28]")
        except ValueError as error:
            logging.getLogger("absl").exception("a thread failed")
            raise RuntimeError("the save failed") from error

    def exceeds_a_limit():
        raise OSError(errno.EFBIG, "File too large")

    for failure in (fails, exceeds_a_limit, lambda: Path("/dev/full").write_text("x" * 99999)):
        said = r"w cannot be written \(no space left on the device, or a file exceeds the size limit\); make room"
        with pytest.raises(UserError, match=said), errors.writing(tmp_path / "w"):
            failure()
    with pytest.raises(ZeroDivisionError), errors.writing(tmp_path):
        _ = 1 / 0
    assert caplog.text == ""


@pytest.mark.parametrize("folder", [False, True])
def test_data_that_changed_since_the_run_began_is_refused(tmp_path, capsys, folder):
    place = tmp_path / "data"
    file = place / "a.txt" if folder else place
    file.parent.mkdir(exist_ok=True)
    written(file, "some text")
    command = [f"--config={config_of(tmp_path, prompts=place)}", f"--workdir={tmp_path / 'w'}"]
    run = lambda config, workdir: (Path(workdir) / "checkpoint").write_text("")
    assert cli.launch(run, "specjax.distill", command) == cli.launch(run, "specjax.distill", command) == 0
    for text, sizes in (("same size", "9 bytes then, 9 now"), ("longer text", "9 bytes then, 11 now")):
        written(file, text)
        assert cli.launch(run, "specjax.distill", command) == 2
        assert f"{place} changed since the run in {tmp_path / 'w'} began ({sizes})" in capsys.readouterr().err
    written(file, "some text")
    assert cli.launch(run, "specjax.distill", command) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--config.draft.binary=destill", 'there is no binary "destill"; did you mean "distill"'),
        (
            "--config.stages=target,drafft",
            'stage "drafft" has no section in the config; did you mean "draft"',
        ),
        ("--config.target.target=stage:draft", '"stage:draft" names no earlier stage'),
        ("--config.target.target=stage:draft/x", '"stage:draft/x" names no earlier stage'),
    ],
)
def test_a_stage_that_cannot_run_is_found_before_the_first_one_starts(
    stages_file, tmp_path, calls, capsys, change, message
):
    argv = [f"--config={stages_file}", f"--workdir={tmp_path / 'w'}", change]
    assert cli.launch(main.run, "specjax.main", argv) == 2
    assert message in capsys.readouterr().err
    assert calls == []


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "8"}, False),  # a shell inside an allocation
        ({"SLURM_STEP_NUM_TASKS": "8"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "t0,t1"}, True),
        ({"TPU_WORKER_HOSTNAMES": "t0", "MEGASCALE_NUM_SLICES": "2"}, True),
        ({"SPECJAX_MULTIPROCESS": "1"}, True),
    ],
)
def test_only_one_of_several_processes_waits_for_others(environment, several):
    assert processes.several(environment) is several


def test_the_module_runs_from_the_command_line(tmp_path):
    def run(*argv):
        command = [sys.executable, "-m", "specjax.main", *argv]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=dict(os.environ))

    shown = run("--help")
    assert shown.returncode == 0 and "--workdir=DIR" in shown.stdout
    refused = run("--config=nowhere.py", f"--workdir={tmp_path / 'w'}")
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].startswith("error: there is no config file nowhere.py")


def test_the_nearest_name_is_offered_or_all_of_them():
    assert nearest("losless", ["lossless", "coupled"]) == '; did you mean "lossless"?'
    assert nearest("xyz", ["lossless", "coupled"]) == "; the options are coupled, lossless"
    assert nearest("xyz", []) == "; there is nothing to choose from"


def test_progress_in_a_log_file_is_whole_lines(capsys):
    assert list(timing.progress(range(3), description="prompts", unit="prompt")) == [0, 1, 2]
    with timing.progress(total=4, description="steps", unit="step") as bar:
        bar.update(4)
    error = capsys.readouterr().err
    assert "\r" not in error
    lines = error.splitlines()
    assert any(line.startswith("prompts: 100%") for line in lines)
    assert any("4/4" in line for line in lines)
    assert all(lines)


def test_a_config_of_a_clone_runs_from_another_directory(tmp_path):
    code = "from specjax.runtime import config; print(config.load(sys.argv[1]).mesh.tensor)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    (tmp_path / "specjax").symlink_to(ROOT / "specjax")  # as installed: the clone itself is not on the path
    command = [sys.executable, "-c", f"import sys; {code}", f"{ROOT}/configs/generate.py:smoke"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.stdout == "1\n", done.stderr
