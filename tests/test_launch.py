"""The launchers, run for real against a gcloud, an xpk and an srun that only write down what they are asked."""

import os
import shlex
import shutil
import signal
import subprocess
import tarfile
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "launch" / "tpu_vm.sh"
PLACE = ["--project=p", "--zone=z"]
GIVEN = ("--project=p", "--zone=z", "--type=v5litepod-8", "--runtime=r", "--config=configs/a.py")
LOCAL = (*GIVEN, "--workdir=runs/a")

# Separates the words of a call by a character that none of them has.
GCLOUD = r"""#!/usr/bin/env bash
printf '%s\x1f' "$@" >>"$CALLS"
echo >>"$CALLS"
case "$*" in
  *describe*)
    state=$(head -n 1 states)
    sed -i 1d states
    [[ $state != absent ]] || exit 1
    echo "$state"
    ;;
  *specjax.main*) exit "$RUN_CODE" ;;
  *--recurse*) exit "$FETCH_CODE" ;;
  *specjax.tar.gz*--worker=all*) [[ ! -f $5 ]] || cp "$5" sent.tar.gz ;;
esac
"""


class Fakes:
    """Commands on the PATH of a launcher, `texts` by name, that write down in `calls` what they are asked."""

    def __init__(self, root, texts):
        self.root = root
        for name, text in texts.items():
            path = root / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            path.chmod(0o755)

    def run(self, script, *arguments, **environment):
        path = f"{self.root / 'bin'}{os.pathsep}{os.environ['PATH']}"
        environment = {"PATH": path, "CALLS": str(self.root / "calls"), **environment}
        command = ["bash", str(script), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)

    def calls(self):
        path = self.root / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line.split("\x1f")[:-1] for line in lines]


class Cloud(Fakes):
    """A checkout with the launcher in it, and a gcloud and a sleep of its own on the PATH."""

    def __init__(self, root):
        super().__init__(root, {"gcloud": GCLOUD, "sleep": "#!/bin/sh\n"})
        shutil.copytree(SCRIPT.parent, root / "launch")
        for name in ("specjax/main.py", "configs/a.py", "pyproject.toml", "requirements.txt", "README.md"):
            (root / name).parent.mkdir(exist_ok=True)
            (root / name).touch()

    def launch(self, *arguments, states=("absent", "ACTIVE"), run=0, fetch=0):
        (self.root / "states").write_text("".join(f"{state}\n" for state in states))
        environment = {"TMPDIR": str(self.root), "RUN_CODE": str(run), "FETCH_CODE": str(fetch)}
        return self.run(self.root / "launch" / "tpu_vm.sh", *arguments, **environment)

    def verbs(self):
        """What each call does; polls of the state counted once."""
        verbs = [call[3] for call in self.calls()]
        return [verb for i, verb in enumerate(verbs) if i == 0 or verbs[i - 1] != verb]


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


@pytest.mark.parametrize("dry", [("--dry_run",), ("--dry_run", "--on_demand"), ("--dry_run", "--keep")])
def test_a_dry_run_calls_nothing_and_leaves_nothing(cloud, dry):
    before = {path for path in cloud.root.rglob("*") if path.name != "states"}
    done = cloud.launch(*dry, *LOCAL)
    assert done.returncode == 0, done.stderr
    assert cloud.calls() == []
    assert {path for path in cloud.root.rglob("*") if path.name != "states"} == before


def test_a_dry_run_prints_what_a_run_does(cloud):
    """Line for line, but for the number in the name of the archive and the polls of the state."""

    def commands(done):
        lines = [line for line in done.stderr.splitlines() if line.startswith("+ ")]
        return [" ".join(w for w in line.split() if ".tar.gz" not in w or ":" in w) for line in lines]

    assert commands(cloud.launch("--dry_run", *LOCAL)) == commands(cloud.launch(*LOCAL))


def test_it_asks_waits_copies_installs_runs_fetches_and_gives_back_in_this_order(cloud):
    waiting = ("absent", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    done = cloud.launch(*LOCAL, states=waiting)
    assert done.returncode == 0, done.stderr
    assert cloud.verbs() == ["describe", "create", "describe", "scp", "ssh", "scp", "delete"]
    assert [call[3] for call in cloud.calls()].count("describe") == len(waiting)
    assert all(word in call for call in cloud.calls() for word in PLACE)
    on_hosts = [call for call in cloud.calls() if call[3] == "ssh"]
    assert len(on_hosts) == 2 and all("--worker=all" in call for call in on_hosts)
    fetch = cloud.calls()[-2]
    assert {"--recurse", "specjax:specjax/runs/a", "runs/", "--worker=0"} <= set(fetch)
    assert "--force" in cloud.calls()[-1]
    assert list(cloud.root.glob("specjax*.tar.gz")) == [], "the archive is removed here"


def test_every_host_joins_the_run_and_gets_the_overrides_unchanged(cloud):
    override = "--config.data.path=it's a file; rm -rf $HOME"
    cloud.launch(*LOCAL, "--", override)
    [run] = [call[-1] for call in cloud.calls() if "specjax.main" in call[-1]]
    words = shlex.split(run.removeprefix("--command="))
    assert "SPECJAX_MULTIPROCESS=1" in words
    assert words[words.index("specjax.main") + 1 :] == [
        "--config=configs/a.py",
        "--workdir=runs/a",
        override,
    ]


@pytest.mark.parametrize(("option", "spot"), [((), True), (("--on_demand",), False)])
def test_a_slice_is_spot_unless_it_is_asked_for_on_demand(cloud, option, spot):
    cloud.launch(*LOCAL, *option)
    create = next(call for call in cloud.calls() if call[3] == "create")
    assert ("--spot" in create) == spot
    assert {"--node-id=specjax", "--accelerator-type=v5litepod-8", "--runtime-version=r"} <= set(create)


def test_what_an_earlier_run_fetched_goes_along_so_that_it_resumes(cloud):
    (cloud.root / "runs" / "a").mkdir(parents=True)
    (cloud.root / "runs" / "a" / "config.json").touch()
    (cloud.root / "runs" / "other").mkdir()
    assert cloud.launch(*LOCAL).returncode == 0
    with tarfile.open(cloud.root / "sent.tar.gz") as archive:
        names = archive.getnames()
    assert {"specjax/main.py", "configs/a.py", "requirements.txt", "runs/a/config.json"} <= set(names)
    assert not any("other" in name for name in names)


def test_a_workdir_that_the_hosts_share_is_not_fetched(cloud):
    assert cloud.launch(*GIVEN, "--workdir=/mnt/shared/a").returncode == 0
    assert not any("--recurse" in call for call in cloud.calls())
    assert cloud.verbs()[-1] == "delete"


def test_a_run_that_fails_is_fetched_before_the_slice_is_given_back(cloud):
    done = cloud.launch(*LOCAL, run=1)
    assert done.returncode != 0
    assert "error: the run failed; its results are in runs/a" in done.stderr
    assert "--recurse" in cloud.calls()[-2] and cloud.verbs()[-1] == "delete"


def test_results_that_cannot_be_fetched_keep_the_slice_alive(cloud):
    done = cloud.launch(*LOCAL, fetch=1)
    assert done.returncode != 0
    assert "delete" not in cloud.verbs()
    assert "error: runs/a could not be fetched" in done.stderr
    assert "queued-resources delete specjax" in done.stderr, "how to give it back by hand"


def test_a_preempted_slice_ends_in_one_sentence_and_is_given_back(cloud):
    done = cloud.launch(*LOCAL, states=("absent", "PROVISIONING", "SUSPENDED"))
    assert done.returncode == 2
    assert "error: the slice specjax is SUSPENDED" in done.stderr
    assert cloud.verbs() == ["describe", "create", "describe", "delete"]


def test_a_slice_that_was_there_before_is_used_and_kept(cloud):
    assert cloud.launch(*LOCAL, states=("ACTIVE", "ACTIVE")).returncode == 0
    assert "create" not in cloud.verbs() and "delete" not in cloud.verbs()
    assert cloud.launch(*LOCAL, "--keep").returncode == 0
    assert "create" in cloud.verbs() and "delete" not in cloud.verbs()


@pytest.mark.parametrize("missing", [argument.partition("=")[0] for argument in LOCAL])
def test_each_missing_argument_is_named_in_one_sentence(cloud, missing):
    done = cloud.launch(*(argument for argument in LOCAL if not argument.startswith(missing)))
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {missing} is missing") and done.stderr.count("\n") == 1
    assert cloud.calls() == []


def test_a_misspelt_argument_is_named_in_one_sentence(cloud):
    done = cloud.launch(*LOCAL, "--onn_demand")
    assert done.returncode == 2
    assert "--onn_demand" in done.stderr and done.stderr.count("\n") == 1
    assert cloud.calls() == []


# The other launchers.

TOOL = r"""#!/usr/bin/env bash
printf '%s\x1f' "${0##*/}" "$@" >>"$CALLS"
echo >>"$CALLS"
case "$*" in
  *"workload create"*) exit "${CREATE_CODE:-0}" ;;
  *wait-for-job-completion*) exit "${RUN_CODE:-0}" ;;
  *specjax.main*) exit "${RUN_CODE:-0}" ;;
esac
"""


class Tools(Fakes):
    """xpk, kubectl, srun and scontrol that only write down what they are asked."""

    def __init__(self, root):
        super().__init__(root, dict.fromkeys(("xpk", "kubectl", "srun", "scontrol"), TOOL))

    def launch(self, script, *arguments, **environment):
        return self.run(SCRIPT.parent / script, *arguments, SLURM_JOB_ID="7", **environment)

    def verbs(self):
        return [" ".join(call[:3]) if call[0] == "xpk" else call[0] for call in self.calls()]


@pytest.fixture
def tools(tmp_path):
    return Tools(tmp_path)


XPK = ("--project=p", "--zone=z", "--cluster=c", "--type=v5litepod-16", "--config=configs/a.py", "--workdir=/mnt/a")
SBATCH = ("--config=configs/a.py", "--workdir=/shared/a")
LOCALLY = ("--processes=3", "--config=configs/a.py", "--workdir=runs/a")
OVERRIDE = "--config.data.path=it's a file; rm -rf $HOME"


def printed(done):
    return [line.removeprefix("+ ") for line in done.stderr.splitlines() if line.startswith("+ ")]


@pytest.mark.parametrize(
    ("script", "given"), [("xpk.sh", (*XPK, "--create")), ("slurm.sbatch", SBATCH), ("local_processes.sh", LOCALLY)]
)
def test_every_launcher_prints_in_a_dry_run_what_it_would_do_and_does_nothing(tools, script, given):
    dry = tools.launch(script, *given, "--dry_run", "--", OVERRIDE)
    assert dry.returncode == 0, dry.stderr
    assert tools.calls() == []
    runs = [line for line in printed(dry) if "specjax.main" in line]
    assert len(runs) == (3 if script == "local_processes.sh" else 1)
    for line in runs:
        words = shlex.split(line)
        words = shlex.split(next(word for word in words if "specjax.main" in word)) if script == "xpk.sh" else words
        assert OVERRIDE in words
    if script != "local_processes.sh":
        real = tools.launch(script, *given, "--", OVERRIDE)
        assert real.returncode == 0, real.stderr
        assert printed(real) == printed(dry)
        assert len(tools.calls()) == len(printed(dry))


@pytest.mark.parametrize(
    ("script", "given"), [("xpk.sh", XPK), ("slurm.sbatch", SBATCH), ("local_processes.sh", LOCALLY)]
)
def test_every_launcher_names_what_is_missing_or_misspelt(tools, script, given):
    for argument in given:
        name = argument.partition("=")[0]
        done = tools.launch(script, *(other for other in given if other != argument), "--dry_run")
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: {name} is missing") and done.stderr.count("\n") == 1
    done = tools.launch(script, *given, "--dry_runn")
    assert done.returncode == 2 and "unknown argument --dry_runn" in done.stderr


def test_a_cluster_that_was_made_is_deleted_however_the_run_ends_and_another_is_kept(tools):
    made = ["xpk cluster create", "xpk workload create", "kubectl", "xpk workload list"]
    gone = ["xpk workload delete", "xpk cluster delete"]
    assert tools.launch("xpk.sh", *XPK, "--create").returncode == 0
    assert tools.verbs() == [*made, *gone]
    create = tools.calls()[0]
    assert "--spot" in create and {"--cluster=c", "--project=p", "--zone=z"} <= set(create)
    for ending in ({"RUN_CODE": "125"}, {"CREATE_CODE": "1"}):
        (tools.root / "calls").unlink()
        done = tools.launch("xpk.sh", *XPK, "--create", "--on_demand", **ending)
        assert done.returncode != 0
        assert tools.verbs()[-2:] == gone and "--on-demand" in tools.calls()[0]
    assert "error: the run failed" in tools.launch("xpk.sh", *XPK, RUN_CODE="125").stderr
    (tools.root / "calls").unlink()
    tools.launch("xpk.sh", *XPK, "--slices=4", "--storage=disk")
    assert tools.verbs() == [*made[1:], "xpk workload delete"], "a cluster that was there stays"
    assert {"--num-slices=4", "--storage=disk", "--restart-on-user-code-failure"} <= set(tools.calls()[0])
    (tools.root / "calls").unlink()
    tools.launch("xpk.sh", *XPK, "--create", "--keep")
    assert tools.verbs() == made


def test_pods_need_a_workdir_that_outlives_them(tools):
    done = tools.launch("xpk.sh", *XPK[:-1], "--workdir=runs/a")
    assert done.returncode == 2 and "absolute path" in done.stderr and tools.calls() == []


@pytest.mark.parametrize(("code", "verbs"), [(75, ["srun", "scontrol"]), (0, ["srun"]), (2, ["srun"])])
def test_a_slurm_job_that_receives_sigterm_is_queued_again(tools, code, verbs):
    done = tools.launch("slurm.sbatch", *SBATCH, RUN_CODE=str(code))
    assert done.returncode == code
    assert tools.verbs() == verbs
    if code == 75:
        assert tools.calls()[-1] == ["scontrol", "requeue", "7"]


PYTHON = r"""#!/usr/bin/env bash
case "$*" in
  *--process_id=1*) [[ -z $FAILS ]] || exit 3 ;;
esac
trap 'exit 75' TERM
touch "$STARTED.$$"
for ((i = 0; i < 300; i++)); do sleep 0.1; done
"""


@pytest.fixture
def stand_in(tmp_path):
    path = tmp_path / "python"
    path.write_text(PYTHON)
    path.chmod(0o755)
    return path


def locally(stand_in, fails):
    environment = {
        **os.environ,
        "STARTED": str(stand_in.parent / "started"),
        "FAILS": fails,
        "SPECJAX_GRACE_SECONDS": "1",
    }
    command = ["bash", str(SCRIPT.parent / "local_processes.sh"), *LOCALLY, f"--python={stand_in}"]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def test_a_process_that_fails_takes_the_others_with_it(stand_in):
    done = locally(stand_in, "yes")
    message = done.communicate(timeout=20)[1]
    assert done.returncode == 3
    pids = [int(line.split()[-1]) for line in message.splitlines() if line.startswith("process ")]
    assert len(pids) == 3
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_the_launcher_hands_a_signal_on_to_all_processes(stand_in):
    done = locally(stand_in, "")
    deadline = time.monotonic() + 20
    while len(list(stand_in.parent.glob("started.*"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    done.send_signal(signal.SIGTERM)
    done.communicate(timeout=20)
    assert done.returncode == 75


@pytest.mark.parametrize("count", ["0", "two", "-1"])
def test_a_count_of_processes_is_a_number(tools, count):
    done = tools.launch("local_processes.sh", f"--processes={count}", *LOCALLY[1:])
    assert done.returncode == 2 and f"--processes is {count}" in done.stderr
