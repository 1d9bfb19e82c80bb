"""The command line of every binary: reads --config and --workdir, runs, tells a mistake in one sentence."""

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from specjax.runtime import config as configs
from specjax.runtime import processes, stopping
from specjax.runtime.errors import UserError, nearest

_USAGE = """python -m {module} --config=FILE[:variant] --workdir=DIR [--config.section.key=value ...]

  --config   a config file, such as configs/quickstart.py; ":smoke" runs it in seconds
  --workdir  where results, checkpoints and the report go; the same command again resumes
  --config.section.key=value overrides one key; the file says what each key means
  --plan=CHIP (of specjax.main) compiles the steps for chips that need not be there, and says what they take

Of a run of several processes each is started so; Cloud TPU, GKE and Slurm tell the rest, elsewhere each is given:

{flags}

Exit codes: 0 done, 2 a mistake in what was asked for, 75 told to stop (SIGTERM) and saved, 130 interrupted
"""


def asks_for_plan(argument: str) -> bool:
    """Whether this argument is `--plan` or `--plan=CHIP`."""
    return argument.partition("=")[0] == "--plan"


def launch(run: Callable[[ConfigDict, str], Any], module: str, argv: Sequence[str] | None = None) -> int:
    """Runs a binary and returns its exit code: 0, 2 for a mistake of the user's, 75 for SIGTERM, 130 for an interrupt.

    Args:
      run: the binary, `run(config, workdir)`.
      module: its name, for the usage.
      argv: the arguments without the program's name; those of the process by default.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if any(argument in ("-h", "-help", "--help") for argument in argv):
        flags = "\n".join(f"  {name:14} {what}" for name, what in processes.FLAGS.items())
        print(_USAGE.format(module=module, flags=flags), end="")
        return 0
    try:
        joining, argv = processes.parse(argv)
        config, workdir = parse(argv)
        processes.start(joining, os.environ)
        with stopping.stoppable():
            _begin(config, workdir)
            run(config, workdir)
        processes.meet("the end")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        processes.leave(2)
        return 2
    except stopping.Stopped:
        print("stopped as asked (SIGTERM); the same command goes on from what was saved", file=sys.stderr)
        return stopping.STOPPED
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        processes.leave(130)
        return 130
    except Exception as error:
        if jax.process_count() == 1:
            raise
        traceback.print_exc()
        if processes.lost_another(error):
            print(
                "error: another process of this run is gone, or cannot be reached; start all of them again: the same "
                "command goes on from the last checkpoint",
                file=sys.stderr,
            )
        processes.leave(1)
    return 0


def _begin(config: ConfigDict, workdir: str) -> None:
    """What has to be right in all processes before any of them begins. Raises UserError in all where it is not."""
    processes.check_alike(configs.to_plain(config), workdir)
    processes.check_shared(workdir)
    configs.assert_same_run(config, workdir)


def parse(argv: Sequence[str], *, needs_workdir: bool = True) -> tuple[ConfigDict, str]:
    """The locked config with its overrides, and the workdir: "" where it is left out and not needed.

    Raises:
      UserError: for anything missing, misspelt or of the wrong type.
    """
    given: dict[str, str] = {}
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
        given[name] = value
    for name in ("--config", "--workdir") if needs_workdir else ("--config",):
        if not given.get(name):
            raise UserError(f"{name} is missing; see --help")
    config = configs.load(given.pop("--config")).lock()
    workdir = given.pop("--workdir", "")
    for name, text in given.items():
        _override(config, name.removeprefix("--config."), text)
    configs.check_given(config)
    return config, workdir


def _override(config: ConfigDict, key: str, text: str) -> None:
    configs.refuse_renamed(key)
    holder, old = config, config
    for name in key.split("."):
        if not isinstance(old, ConfigDict):
            raise UserError(f'config.{key} does not exist: "{name}" is asked of a value that has no keys')
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
    """The value that `text` writes, of the type of `like`. Raises ValueError where it writes none."""
    if like is None:
        return None if text in ("", "None") else text
    if isinstance(like, bool):
        if text.lower() not in ("true", "false"):
            raise ValueError(text)
        return text.lower() == "true"
    if isinstance(like, (tuple, list)):
        parts = [part.strip(" \"'") for part in text.strip("()[] ").split(",")]
        # "(3,)" and "" end in nothing.
        parts = parts if parts[-1] else parts[:-1]
        return type(like)(_value(part, like[0]) if like else _number_or_text(part) for part in parts)
    return type(like)(text)


def _number_or_text(text: str) -> int | float | str:
    """An element of a list that is empty in the config, and so does not say what its elements are."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text
