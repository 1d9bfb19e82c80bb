"""The house against its plan: imports point one way, the core imports alone, configs and files keep rules."""

import ast
import collections
import functools
import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import flags
import pytest
from ml_collections import ConfigDict

from specjax.runtime import config as configs

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "specjax").rglob("*.py"))
FLOORS = (
    ("runtime",),
    ("models",),
    ("hub",),
    ("decoding", "data", "reporting"),
    ("evaluation",),
    ("distillation", "draft_design"),
    ("distill", "choose_layers", "evaluate", "api", "questions", "target_text"),
    ("design", "generate", "spec_bench", "planning"),
    ("plan",),
    ("main",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def room_of(path):
    return path.relative_to(ROOT / "specjax").with_suffix("").parts[0]


def named(path):
    return str(path.relative_to(ROOT))


def imported_rooms(path):
    """The rooms that a file imports anywhere, in its functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} is a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("specjax."))


def upward_imports(path):
    room = room_of(path)
    return [
        f"{room} imports {other}"
        for other in imported_rooms(path)
        if other != room and FLOOR_OF[other] >= FLOOR_OF[room]
    ]


@pytest.mark.parametrize("path", [p for p in SOURCES if room_of(p) != "__init__"], ids=named)
def test_imports_only_go_down(path):
    assert upward_imports(path) == []


def test_an_import_that_goes_up_or_sideways_is_seen(monkeypatch, tmp_path):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "specjax" / "data" / "file.py"
    path.parent.mkdir(parents=True)
    inside = "def f():\n    from specjax import distill\n"
    path.write_text("from specjax.hub import load\n" + inside + "import specjax.decoding.loop\n")
    assert upward_imports(path) == ["data imports decoding", "data imports distill"]


def test_the_library_imports_nothing_of_configs():
    pattern = re.compile(r"^\s*(from|import) configs\b", re.MULTILINE)
    assert [str(path) for path in SOURCES if pattern.search(path.read_text(encoding="utf-8"))] == []


def test_every_init_is_empty():
    assert [str(p) for p in SOURCES if p.name == "__init__.py" and p.stat().st_size] == []


def test_no_file_and_no_function_is_too_long():
    long = [f"{path}: {count} lines" for path in SOURCES if (count := len(path.read_text().splitlines())) > 400]
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and (count := node.end_lineno - node.lineno + 1) > 70:
                long.append(f"{path}:{node.lineno} {node.name}: {count} lines")
    assert long == []


CORE = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ImportError(name + " is not for the core")
sys.meta_path.insert(0, Blocked())
import specjax.decoding.loop, specjax.models.decoder, specjax.distillation.divergences
"""
HEAVY = {
    *("matplotlib", "transformers", "tensorflow_datasets", "grain", "tokenizers", "jinja2", "tensorboardX"),
    *("orbax", "tqdm", "torch", "sentencepiece", "google", "rouge_score", "sacrebleu"),
}


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


def test_the_core_imports_with_jax_flax_and_numpy_alone():
    done = run_python(CORE.replace("{blocked}", repr(HEAVY)))
    assert done.returncode == 0, done.stderr


def test_the_import_blocker_blocks():
    done = run_python(CORE.replace("{blocked}", "{'numpy'}"))
    assert "numpy is not for the core" in done.stderr


def tracked_files():
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.splitlines() if (ROOT / name).is_file()]


def test_no_file_names_a_path_of_one_machine():
    pattern = re.compile(
        "|".join((r"(?<![\w.])/" + root) for root in ("work/", "tmp/", "root/", r"home/\w", r"Users/\w"))
    )
    result = []
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        result += [f"{path}: {match.group()}" for match in pattern.finditer(text)]
    assert result == []


CONFIGS = sorted((ROOT / "configs").rglob("*.py"))
# The keys of these sections are names that the config itself gives.
NAMING = ("drafters", "drafts", "models")


def keys_of(config, path=""):
    """The keys that code has to read: not the names of stages and drafters, nor keys that others take values from."""
    given = set(config["stages"]) if "stages" in config else set()
    if not path:
        fields = list(configs._fields(config))  # all of them, since an id is given again once its object is gone
        times = collections.Counter(id(configs._root(field)) for _, field in fields)
        given |= {key for key, field in fields if "." not in key and times[id(configs._root(field))] > 1}
    for key, value in config.items():
        if key not in given and path.split(".")[-1] not in NAMING:
            yield key
        if isinstance(value, ConfigDict):
            yield from keys_of(value, f"{path}.{key}")


# What measures, tables and judges next to the configs.
REPRODUCTION = [path for path in CONFIGS if "def get_config" not in path.read_text(encoding="utf-8")]


@functools.cache
def names_read():
    """Every attribute and every string in the package and the reproduction: what a config key may be read by."""
    names = set()
    for path in [*SOURCES, *REPRODUCTION]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                names.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                names.add(node.value)
            elif isinstance(node, (ast.arg, ast.keyword)):
                names.add(node.arg)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names.add(node.target.id)
    return names


def is_config(path):
    return "def get_config" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", [p for p in CONFIGS if is_config(p)], ids=named)
def test_every_config_key_is_read_by_something(path):
    unread = set(keys_of(configs.load(str(path)))) - names_read()
    assert unread == set()


def test_no_config_key_has_a_default_in_code():
    pattern = re.compile(r"config\w*(\.\w+)*\.get\(")
    assert [str(p) for p in SOURCES if pattern.search(p.read_text(encoding="utf-8"))] == []


def test_what_is_imported_is_required():
    """Each third-party import of the package has its line in requirements.txt."""
    listed = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    required = {re.split(r"[<>=]", line)[0].lower().replace("-", "_") for line in listed.splitlines()}
    named_otherwise = {"absl": "absl_py", "orbax": "orbax_checkpoint"}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in (full.split(".")[0] for full in names):
                if name not in sys.stdlib_module_names and name != "specjax":
                    assert named_otherwise.get(name, name).lower() in required, f"{path} imports {name}"


def test_every_module_imports():
    for path in [*SOURCES, *REPRODUCTION]:
        importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))


LAUNCHERS = sorted(path for path in (ROOT / "launch").iterdir() if path.suffix in (".sh", ".sbatch"))


@pytest.mark.parametrize("path", [*LAUNCHERS, ROOT / ".ci" / "run"], ids=named)
def test_shell_scripts_are_clean(path):
    scripts = str(Path(sys.executable).parent)
    shellcheck = shutil.which("shellcheck", path=os.pathsep.join((scripts, os.environ["PATH"])))
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([shellcheck, "--external-sources", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_files_that_count_or_change_compiled_programs_share_none_with_others():
    counted = r"\b(compiled_\w+|_acceptance|_repeat)\._cache_size\(\)"
    changed = r"setattr\((kv_cache|layers|loop|meshes|plan|prefill|sampling|rules|decoder|rotary), "
    files = {
        path.stem for path in (ROOT / "tests").glob("test_*.py") if re.search(f"{counted}|{changed}", path.read_text())
    }
    assert files <= flags.ALONE, f"add {sorted(files - flags.ALONE)} to ALONE in tests/flags.py"
