"""The command line of every binary: --config, --workdir and overrides; prints one error line for a UserError."""

import ast
import contextlib
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
from ml_collections import ConfigDict

from specjax.runtime import checks, errors, processes, program_cache, stopping
from specjax.runtime import config as configs
from specjax.runtime.errors import UserError, nearest

_USAGE = """\
usage: python -m {module} --config=FILE[:VARIANT] --workdir=DIR [--config.SECTION.KEY=VALUE ...]

Runs what a config file describes and writes the results to a folder.

  --config=FILE[:VARIANT]     the config, such as configs/quickstart.py; most have a variant ":smoke" that takes seconds
  --workdir=DIR               the folder for results, checkpoints and report; the same command resumes a stopped run
  --config.SECTION.KEY=VALUE  replaces one value of the config; comments in the config file explain every key
  --plan[=CHIP]               runs nothing; compiles every step for CHIP (v5e, v5p:2x2x4, h100, ...), which need not be
                              there, and prints memory, work and the least possible time (specjax.main only)

example: python -m specjax.main --config=configs/quickstart.py:smoke --workdir=runs/smoke

A run of several processes starts the same command on every host. Cloud TPU, GKE, Slurm and Open MPI are detected;
anywhere else, add:

{flags}

exit codes: 0 finished, 1 failed, 2 mistake in command or config, 75 stopped by SIGTERM and resumable, 130 interrupted
"""


def asks_for_plan(argument: str) -> bool:
    """Whether this argument is `--plan` or `--plan=CHIP`."""
    return argument.partition("=")[0] == "--plan"


def launch(
    run: Callable[[ConfigDict, str], Any],
    module: str,
    argv: Sequence[str] | None = None,
    *,
    needs_workdir: bool = True,
) -> int:
    """Parses a command line, runs a binary and returns its exit code, one of those in `--help`.

    Args:
      run: the binary's function `run(config, workdir)`.
      module: name of the binary's module, for `--help`.
      argv: arguments without the program's name; `sys.argv[1:]` by default.
      needs_workdir: whether --workdir is required; without it, results go to a folder that is removed at the end.

    Raises:
      Exception: for a bug, in a run of one process. With several processes, this one prints the traceback and exits.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if any(argument in ("-h", "-help", "--help") for argument in argv):
        flags = "\n".join(f"  {name:26}  {what}" for name, what in processes.FLAGS.items())
        print(_USAGE.format(module=module, flags=flags), end="")
        return 0
    try:
        joining, argv = processes.parse(argv)
        config, workdir = parse(argv, needs_workdir=needs_workdir)
        program_cache.start()
        processes.start(joining, os.environ)
        folder = contextlib.nullcontext(workdir) if workdir else tempfile.TemporaryDirectory()
        with stopping.stoppable(), folder as workdir, configs.typed_keys(config), errors.writing(workdir):
            processes.check_same_command(configs.to_plain(config), workdir)
            processes.check_shared(workdir)
            with configs.claimed(config, workdir):
                run(config, workdir)
        processes.meet("the end")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        processes.leave(2)
        return 2
    except stopping.Stopped:
        print("stopped by SIGTERM; the same command resumes from what was saved", file=sys.stderr)
        return stopping.STOPPED
    except KeyboardInterrupt:
        print("interrupted; the same command resumes from the last checkpoint", file=sys.stderr)
        processes.leave(130)
        return 130
    except Exception as error:
        if jax.process_count() == 1:
            raise
        traceback.print_exc()
        if processes.lost_another(error):
            print(
                "error: another process of this run ended or cannot be reached; start all of them again with the same "
                "command to resume from the last checkpoint",
                file=sys.stderr,
            )
        processes.leave(1)
    return 0


def leave(code: int) -> NoReturn:
    """Exits with a code; if the run was stopped, at once, because Python may crash at its end in a half-done import."""
    if code == stopping.STOPPED:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def parse(argv: Sequence[str], *, needs_workdir: bool = True) -> tuple[ConfigDict, str]:
    """Returns the locked config with the overrides applied, and the workdir ("" if it is missing and not needed).

    Raises:
      UserError: for an argument that is missing, unknown or of the wrong type.
    """
    values: dict[str, str] = {}
    arguments = list(argv)
    while arguments:
        name, equals, value = arguments.pop(0).partition("=")
        if name in ("--config", "--workdir") and not equals and arguments:
            value = arguments.pop(0)
        elif not equals or not (name in ("--config", "--workdir") or name.startswith("--config.")):
            raise UserError(
                f'"{name}{equals}{value}" is not understood; arguments are --config=FILE, --workdir=DIR and '
                "--config.section.key=value"
            )
        values[name] = value
    for name in ("--config", "--workdir") if needs_workdir else ("--config",):
        if not values.get(name):
            raise UserError(f"{name} is missing; see --help")
    config = configs.load(values.pop("--config")).lock()
    workdir = values.pop("--workdir", "")
    for name, text in values.items():
        _override(config, name.removeprefix("--config."), text)
    configs.check_required(config)
    for key, value in configs.leaves(configs.to_plain(config)):
        if key.rpartition(".")[2] == "seed" and value is not None:
            checks.seed(f"config.{key}", value)
    return config, workdir


def _override(config: ConfigDict, key: str, text: str) -> None:
    configs.refuse_renamed(key)
    holder, old = config, config
    for name in key.split("."):
        if not isinstance(old, ConfigDict):
            raise UserError(f'config.{key} does not exist: the value in which "{name}" is looked up has no keys')
        if name not in old:
            raise UserError(f"config.{key} does not exist{nearest(name, old.keys())}")
        holder, old = old, old[name]
    if isinstance(old, ConfigDict):
        raise UserError(f"config.{key} is a section; override one of its keys: {', '.join(old.keys())}")
    try:
        holder[name] = _value(text, old)
    except ValueError as error:
        expected = type(old).__name__
        raise UserError(
            f'config.{key} is of type {expected}, such as {old!r}, and "{text}" is not; give such a value'
        ) from error


def _value(text: str, like: Any) -> Any:
    """Parses `text` as a value of the type of `like`. Raises ValueError if that is not possible."""
    if like is None:
        return None if text in ("", "None") else text
    if isinstance(like, bool):
        if text.lower() not in ("true", "false"):
            raise ValueError(text)
        return text.lower() == "true"
    if isinstance(like, (tuple, list)):
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            items = ast.literal_eval(text)
            if isinstance(items, (tuple, list)) and items and all(isinstance(item, str) for item in items):
                return type(like)(items)  # quoted texts, which may hold spaces, commas and escapes such as "\n"
            nested = isinstance(items, (tuple, list)) and items and all(isinstance(x, (tuple, list)) for x in items)
            if nested and (not like or isinstance(like[0], (tuple, list))):
                return type(like)(map(tuple, items))  # such as pairs of names
        parts = [part.strip(" \"'") for part in text.strip("()[] ").split(",")]
        # The last part of "(3,)" and of "" is empty.
        parts = parts if parts[-1] else parts[:-1]
        of_one_type = len(set(map(type, like))) == 1
        return type(like)(_value(part, like[0]) if of_one_type else _number_or_text(part) for part in parts)
    return type(like)(text)


def _number_or_text(text: str) -> int | float | str:
    """Parses an element of a list whose type is unknown: that in the config is empty or has several types."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text
