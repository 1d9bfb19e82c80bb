"""The Cloud TPU launcher, run for real against a gcloud that only writes down what it is asked."""

import os
import shlex
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "launch" / "tpu_vm.sh"
PLACE = ["--project=p", "--zone=z"]
GIVEN = ("--project=p", "--zone=z", "--type=v5litepod-8", "--runtime=r", "--config=configs/a.py")
LOCAL = (*GIVEN, "--workdir=runs/a")

# Separates the words of a call by a character that none of them has.
GCLOUD = r"""#!/usr/bin/env bash
printf '%s\x1f' "$@" >>calls
echo >>calls
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


class Cloud:
    """A checkout with the launcher in it, and a gcloud and a sleep of its own on the PATH."""

    def __init__(self, root):
        self.root = root
        shutil.copytree(SCRIPT.parent, root / "launch")
        for name in ("specjax/main.py", "configs/a.py", "pyproject.toml", "requirements.txt", "README.md"):
            (root / name).parent.mkdir(exist_ok=True)
            (root / name).touch()
        for name, text in (("gcloud", GCLOUD), ("sleep", "#!/bin/sh\n")):
            path = root / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            path.chmod(0o755)

    def launch(self, *arguments, states=("absent", "ACTIVE"), run=0, fetch=0):
        (self.root / "states").write_text("".join(f"{state}\n" for state in states))
        path = f"{self.root / 'bin'}{os.pathsep}{os.environ['PATH']}"
        environment = {"PATH": path, "TMPDIR": str(self.root), "RUN_CODE": str(run), "FETCH_CODE": str(fetch)}
        command = ["bash", str(self.root / "launch" / "tpu_vm.sh"), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)

    def calls(self):
        path = self.root / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line.split("\x1f")[:-1] for line in lines]

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


def test_every_host_joins_the_run_and_gets_the_overrides_as_they_were_given(cloud):
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
    assert "error: the run did not end well; what it left is in runs/a" in done.stderr
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
