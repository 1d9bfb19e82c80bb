"""Continues one prompt and prints the text as it is decoded, each token in the colour of its origin.

python -m specjax.generate --config=configs/generate.py --workdir=DIR [--config.section.key=value ...]
"""

import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from specjax import api
from specjax.decoding.drafters.table import make_options
from specjax.hub.model import Model
from specjax.reporting import records, tables
from specjax.runtime import cli, processes
from specjax.runtime import config as configs
from specjax.runtime import mesh as meshes
from specjax.runtime.errors import UserError

# Terminal colours of the origins; a plain token has none.
_COLOURS = {"accepted": "32", "recovered": "31", "bonus": "34"}


def run(config: Any, workdir: str | Path) -> dict:
    """Prints the text to stdout as it is decoded, and statistics to stderr; returns the content of results.json.

    Raises:
      UserError: for invalid models, settings or prompts.
    """
    mesh = meshes.make_mesh(config.mesh)
    dtypes = {"param_dtype": config.param_dtype, "compute_dtype": config.compute_dtype}
    for key, value in (("target", config.target), ("prompt", config.prompt)):
        if not value:
            raise UserError(f"config.{key} is empty; give --config.{key}=...")
    target = api.load(config.target, mesh=mesh, **dtypes)
    drafter = _drafter(config.drafter, target, lambda path: api.load(path, mesh=mesh, **dtypes))
    if config.chat:
        prompt = target.tokenizer.apply_chat([{"role": "user", "content": config.prompt}])
    else:
        prompt = target.tokenizer.encode_prompt(config.prompt)
    pieces = functools.partial(target.tokenizer.pieces, after=target.context(prompt))
    printer = _Printer(pieces, config.colours)
    out = api.generate(
        target,
        [prompt],
        drafter=drafter,
        gamma=config.gamma,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
        rule=config.rule if not config.lenience else api.Lossy(config.rule, config.lenience),
        max_new_tokens=config.max_new_tokens,
        batch_size=max(config.samples, 1),
        seed=config.seed,
        stop=config.stop,
        samples=config.samples,
        logprobs=config.logprobs,
        sampling=config.sampling,
        blocks_at_once=config.blocks_at_once,
        on_text=printer,
    )
    printer.end(out)
    row = {
        "prompt": config.prompt,
        "rule": config.rule,
        "lenience": config.lenience if out.lossy else None,
        "text": out.texts[0],
        "tokens": list(zip(pieces(out.tokens[0]), out.origins[0], strict=True)),
        "emitted_tokens": out.stats.emitted_tokens,
        "target_calls": out.stats.target_calls,
        "block_efficiency": out.stats.block_efficiency,
        "acceptance_rate": out.stats.acceptance_rate,
        "tokens_per_second": out.stats.tokens_per_second,
        "samples": out.texts,
        "logprobs": out.logprobs and out.logprobs[0],
    }
    if processes.first():
        print(_summary(row, printer.colours), file=sys.stderr)
    path = Path(workdir) / "results.json"
    return records.write_results(path, binary="generate", config=configs.to_plain(config), rows=[row])


def _drafter(section: Any, target: Model, load: Callable[[str], Model]) -> Any:
    """The `drafter` argument of `api.generate` for a config section; options with value 0 or () are not passed."""
    if section.kind == "none":
        return None
    values = {key: value for key, value in section.items() if key not in ("kind", "path") and value}
    options = make_options(section.kind, values, "drafter.")
    if not options.loads:
        return options
    if not section.path:
        raise UserError("config.drafter.path is empty; name the draft's directory, or another drafter.kind")
    loaded = load(section.path) if options.loads == "model" else api.load_adapter(section.path, target)
    return api.Draft(loaded, options)


class _Printer:
    """Prints the tokens that were emitted since the last call."""

    def __init__(self, pieces: Callable[[Sequence[int]], list[str]], colours: str):
        if colours not in ("auto", "always", "never"):
            raise UserError(f'config.colours is "{colours}"; it is auto, always or never')
        self.colours = sys.stdout.isatty() if colours == "auto" else colours == "always"
        self._pieces = pieces
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
            colour = _COLOURS.get(origin) if self.colours else None
            sys.stdout.write(f"\033[{colour}m{piece}\033[0m" if colour else piece)
        self._printed = len(pieces)
        sys.stdout.flush()


def _summary(row: dict, colours: bool) -> str:
    parts = [
        f"{row['emitted_tokens']} tokens in {row['target_calls']} target calls",
        f"{row['block_efficiency']:.2f} tokens a call",
    ]
    if row["acceptance_rate"] is not None:
        parts.append(f"{row['acceptance_rate']:.0%} of the drafted tokens accepted")
    parts.append(f"{row['tokens_per_second']:.1f} tokens/s, compiling included")
    if row["lenience"] is not None:
        parts.append(f"{tables.rule_label(row)}: not the target's distribution")
    if colours:
        parts.append(", ".join(f"\033[{colour}m{origin}\033[0m" for origin, colour in _COLOURS.items()))
    return "; ".join(parts)


if __name__ == "__main__":
    raise SystemExit(cli.launch(run, "specjax.generate"))
