"""Continues a prompt, or keeps a conversation; prints text as it is decoded, each token in the colour of its origin.

python -m specjax.generate --config=configs/generate.py [--workdir=DIR] [--config.section.key=value ...]
"""

import contextlib
import functools
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from specjax import api
from specjax.decoding.drafters.base import DrafterOptions
from specjax.decoding.drafters.table import make_options
from specjax.hub import model as hub_model
from specjax.reporting import records, tables
from specjax.runtime import cli, processes
from specjax.runtime import config as configs
from specjax.runtime import mesh as meshes
from specjax.runtime.errors import UserError

# Terminal colours of the origins; a plain token has none.
_COLOURS = {"accepted": "32", "recovered": "31", "bonus": "34"}

# Attributes of `api.Stats` in a row of results.json.
_FIGURES = ("emitted_tokens", "target_calls", "block_efficiency", "acceptance_rate")
_FIGURES += ("tokens_per_second", "compile_seconds")

# A line of a conversation that starts a new one.
_RESET = "/reset"


def run(config: Any, workdir: str | Path) -> dict:
    """Prints text to stdout as it is decoded, and figures to stderr; returns the content of results.json.

    With `config.chat` and an empty prompt it reads lines from stdin, and answers each in one conversation.

    Raises:
      UserError: for invalid models, settings or prompts.
    """
    mesh = meshes.make_mesh(config.mesh)
    _check(config)
    options = _options(config.drafter)
    load = hub_model.loader(config, mesh)
    target = load(config.target)
    drafter = _drafter(config.drafter, options, target, load)
    write = lambda rows: records.write_results(
        Path(workdir) / "results.json", binary="generate", config=configs.to_plain(config), rows=rows
    )
    writer = _Writer(config, target, drafter)
    if config.chat and not config.prompt:
        return _converse(writer, write)
    if config.chat:
        ids = target.tokenizer.apply_chat(writer.asked([], config.prompt))
    else:
        ids = target.tokenizer.encode_prompt(config.prompt)
    row = writer.write(config.prompt, ids)
    if config.compare:
        row |= writer.plain(ids, row)
    if processes.first():
        print(_summary(row, writer.colours), file=sys.stderr)
    return write([row])


def _check(config: Any) -> None:
    for key, value in (("target", config.target), ("prompt", config.prompt or config.chat)):
        if not value:
            raise UserError(f"config.{key} is empty; give --config.{key}=...")
    if config.system and not config.chat:
        raise UserError("config.system is for a chat; add --config.chat=true")
    if config.colours not in ("auto", "always", "never"):
        raise UserError(f'config.colours is "{config.colours}"; it is auto, always or never')
    if config.chat and not config.prompt:
        processes.refuse_several("a conversation")
        for key, neutral in (("samples", 1), ("logprobs", False), ("compare", False)):
            if config[key] != neutral:
                raise UserError(f"config.{key} is for one prompt and not for a conversation; leave it at {neutral}")


def _options(section: Any) -> DrafterOptions | None:
    """The options in a drafter's section, checked; those with value 0 or () are left out. None for no drafter."""
    if section.kind == "none":
        return None
    values = {key: value for key, value in section.items() if key not in ("kind", "path", "param_dtype") and value}
    options = make_options(section.kind, values, "drafter.")
    if options.loads and not section.path:
        raise UserError("config.drafter.path is empty; name the draft's directory, or another drafter.kind")
    return options


def _drafter(
    section: Any, options: DrafterOptions | None, target: hub_model.Model, load: Callable[[str], hub_model.Model]
) -> Any:
    """The `drafter` argument of `api.generate`, with what its path names."""
    if options is None or not options.loads:
        return options
    if options.loads == "model":
        loaded = load(section.path, **({"param_dtype": section.param_dtype} if section.param_dtype else {}))
    else:
        loaded = api.load_adapter(section.path, target, states_after=options.states_after)
    return api.Draft(loaded, options)


class _Writer:
    """Continues prompts with the settings of a config, and prints the text as it is decoded."""

    def __init__(self, config: Any, target: hub_model.Model, drafter: Any):
        self.config, self.target, self.drafter = config, target, drafter
        self.colours = sys.stdout.isatty() if config.colours == "auto" else config.colours == "always"
        keys = ("temperature", "top_k", "top_p", "min_p", "sampling", "max_new_tokens", "seed", "samples")
        self._settings = {key: config[key] for key in keys} | {"batch_size": max(config.samples, 1)}

    def asked(self, earlier: Sequence[Mapping[str, str]], text: str) -> list[Mapping[str, str]]:
        """The messages of a conversation in which the user wrote `text` last."""
        system = [{"role": "system", "content": self.config.system}] if self.config.system and not earlier else []
        return [*system, *earlier, {"role": "user", "content": text}]

    def write(self, prompt: str, ids: Sequence[int], stopped: Callable[[], Any] = lambda: False, **more: Any) -> dict:
        """Prints the continuation of token ids. Returns the row of results.json.

        Args:
          prompt: what the user wrote.
          stopped: whether to end the text; asked between blocks.
          more: arguments of `api.generate` that replace those of the config.
        """
        config, tokenizer = self.config, self.target.tokenizer
        pieces = functools.partial(tokenizer.pieces, after=self.target.context(ids))
        printer = _Printer(pieces, self.colours)

        def on_text(text: api.Generation) -> bool:
            printer(text)
            return bool(stopped())

        settings = self._settings | dict(
            drafter=self.drafter,
            gamma=config.gamma,
            rule=config.rule if not config.lenience else api.Lossy(config.rule, config.lenience),
            stop=config.stop,
            logprobs=config.logprobs,
            blocks_at_once=config.blocks_at_once,
            on_text=on_text,
        )
        out = api.generate(self.target, [ids], **settings | more)
        printer.end(out)
        return {
            "prompt": prompt,
            "prompt_tokens": len(ids),
            "rule": config.rule,
            "lenience": config.lenience if out.lossy else None,
            "text": out.texts[0],
            "tokens": list(zip(pieces(out.tokens[0]), out.origins[0], strict=True)),
            **{name: getattr(out.stats, name) for name in _FIGURES},
            "samples": out.texts,
            "logprobs": out.logprobs and out.logprobs[0],
        }

    def plain(self, ids: Sequence[int], row: Mapping[str, Any]) -> dict:
        """The speed of plain decoding of as many tokens from the same prompt, and the speed-up over it."""
        same = {"max_new_tokens": max(row["emitted_tokens"] // self.config.samples, 1), "eos_ids": ()}
        speed = api.generate(self.target, [ids], **self._settings | same).stats.tokens_per_second
        return {"plain_tokens_per_second": speed, "speedup": row["tokens_per_second"] / speed}


def _converse(writer: _Writer, write: Callable[[list[dict]], dict]) -> dict:
    """Answers lines of stdin in one conversation, whose caches are kept; Ctrl-C ends an answer, Ctrl-D the program."""
    config, tokenizer = writer.config, writer.target.tokenizer
    positions = writer.target.decoder.config.max_positions
    tokenizer.apply_chat(writer.asked([], "."))  # raises what is wrong with the template before anything is typed
    messages, rows, caches = [], [], api.Conversation()
    results = write(rows)
    for line in _lines():
        if line == _RESET:
            messages = []
            continue
        asked = writer.asked(messages, line)
        ids = tokenizer.apply_chat(asked)
        room = positions - len(ids)
        if room < 1:
            full = f"the conversation has {len(ids)} tokens and the model {positions} positions"
            print(f"{full}; write {_RESET} to start anew", file=sys.stderr)
            continue
        more = {"max_new_tokens": min(room, config.max_new_tokens), "seed": (config.seed + len(rows)) % 2**32}
        with _interruptible() as interrupted:
            try:
                row = writer.write(line, ids, lambda received=interrupted: received, conversation=caches, **more)
            except KeyboardInterrupt:  # a second Ctrl-C; the turn is dropped
                print(flush=True)
                continue
        messages, row["cached_tokens"] = [*asked, {"role": "assistant", "content": row["text"]}], caches.reused[0]
        print(_summary(row, writer.colours), file=sys.stderr)
        rows.append(row)
        results = write(rows)
    return results


def _lines() -> Iterator[str]:
    """Lines of stdin without empty ones; on a terminal each is asked for, and Ctrl-C asks again."""
    asks = sys.stdin.isatty()
    if asks:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  lets `input` edit lines

        print(f"Ctrl-C ends an answer, {_RESET} the conversation, Ctrl-D the program.", file=sys.stderr)
    while True:
        try:
            line = input("> " if asks else "").strip()
        except KeyboardInterrupt:
            print()
            continue
        except EOFError:
            if asks:
                print()
            return
        if line:
            yield line


@contextlib.contextmanager
def _interruptible() -> Iterator[list[int]]:
    """A context in which the first Ctrl-C fills the list that it yields, and the second raises KeyboardInterrupt."""
    received: list[int] = []

    def handle(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = signal.signal(signal.SIGINT, handle)
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, before)


class _Printer:
    """Prints the tokens that were emitted since the last call."""

    def __init__(self, pieces: Callable[[Sequence[int]], list[str]], colours: bool):
        self._pieces, self._colours = pieces, colours
        self._printed = 0

    def __call__(self, text: api.Generation) -> None:
        pieces = self._pieces(text.tokens[0])
        settled = len(pieces)
        # Hold back tokens of a character that is not complete yet.
        while settled > self._printed and (not pieces[settled - 1] or pieces[settled - 1].endswith("\ufffd")):
            settled -= 1
        self._print(pieces[:settled], text.origins[0])

    def end(self, text: api.Generation) -> None:
        """Prints the tokens that were held back, and ends the line."""
        self._print(self._pieces(text.tokens[0]), text.origins[0])
        sys.stdout.write("\n")
        sys.stdout.flush()

    def _print(self, pieces: list[str], origins: list[str]) -> None:
        if not processes.first():
            return
        for piece, origin in list(zip(pieces, origins, strict=False))[self._printed :]:
            colour = _COLOURS.get(origin) if self._colours else None
            sys.stdout.write(f"\033[{colour}m{piece}\033[0m" if colour else piece)
        self._printed = len(pieces)
        sys.stdout.flush()


def _summary(row: Mapping[str, Any], colours: bool) -> str:
    """The figures of a row on one line."""
    parts = [
        f"{row['emitted_tokens']} tokens in {row['target_calls']} target calls",
        f"{row['block_efficiency']:.2f} tokens a call",
    ]
    if row["acceptance_rate"] is not None:
        parts.append(f"{row['acceptance_rate']:.0%} of the drafted tokens accepted")
    parts.append(f"{row['tokens_per_second']:.1f} tokens/s")
    if "speedup" in row:
        parts[-1] += f", {row['speedup']:.2f} times the plain {row['plain_tokens_per_second']:.1f}"
    if row["compile_seconds"] >= 0.05:
        parts.append(f"{row['compile_seconds']:.1f} s of compiling before")
    if row.get("cached_tokens"):
        parts.append(f"{row['cached_tokens']} of {row['prompt_tokens']} prompt tokens were in the cache")
    if row["lenience"] is not None:
        parts.append(f"{tables.rule_label(row)}: not the target's distribution")
    if colours:
        parts.append(", ".join(f"\033[{colour}m{origin}\033[0m" for origin, colour in _COLOURS.items()))
    return "; ".join(parts)


if __name__ == "__main__":
    cli.leave(cli.launch(run, "specjax.generate", needs_workdir=False))
