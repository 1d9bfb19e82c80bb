"""Writes the tables of the pages from the committed records, so that no number is typed by hand.

    python -m configs.records.sync README.md configs/*/README.md configs/records

A table is written between `<!-- table:NAME -->` and `<!-- /table -->`, on the page that has these marks. A `page.py`
next to the page lists its functions: `TABLES`, by the name of the record `NAME.json`; `FIGURES`, which are drawn as
`NAME.png` next to the page, by the same names; and `CLAIMS`, lists of claims by the name of their table. A table whose
record does not exist is left as it is.
"""

import importlib
import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.records import claims
from configs.records.claims import Claim
from specjax.evaluation.rows import metrics_table
from specjax.runtime import files
from specjax.runtime.errors import UserError

_PAGES = [
    importlib.import_module(f"configs.{path.parent.name}.page")
    for path in sorted(Path(__file__).resolve().parents[1].glob("*/page.py"))
]
TABLES: dict[str, Callable[[Mapping], str]] = {name: write for page in _PAGES for name, write in page.TABLES.items()}
FIGURES: dict[str, Callable] = {name: draw for page in _PAGES for name, draw in page.FIGURES.items()}
CLAIMS: dict[str, Sequence[Claim]] = {name: listed for page in _PAGES for name, listed in page.CLAIMS.items()}
# The marker before a generated table in a Markdown page.
OPENING = "<!-- table:{name} -->"
# Tables that come from the code and need no record.
GENERATED: dict[str, Callable[[], str]] = {"metrics": metrics_table}


def synced(text: str, directory: str | Path) -> str:
    """A page's text with its tables updated from the records in `directory`.

    Raises:
      UserError: for a damaged record, a record without the values of its table, and marks that are not closed.
    """
    directory, written = Path(directory), {}
    for name, write in TABLES.items():
        path = directory / f"{name}.json"
        if _has_table(text, name) and path.is_file():
            written[name] = _picture(name) + _of_record(write, path)
    for name, listed in CLAIMS.items():
        if _has_table(text, name):
            paths = {claim.record: directory / f"{claim.record}.json" for claim in listed}
            existing = {record: _read(path) for record, path in paths.items() if path.is_file()}
            written[name] = claims.claims_table(listed, existing)
    written |= {name: write() for name, write in GENERATED.items() if _has_table(text, name)}
    return sync_readme(text, written)


def sync_readme(readme_text: str, written: Mapping[str, str]) -> str:
    """Replaces what is between `<!-- table:NAME -->` and `<!-- /table -->` in a text with the table of this name.

    Raises UserError if a table's markers are missing or not closed before the next table.
    """
    for name, table in written.items():
        opening, closing = OPENING.format(name=name), "<!-- /table -->"
        if opening not in readme_text:
            raise UserError(f"the README has no marker {opening}; add it, and {closing} below it")
        before, _, rest = readme_text.partition(opening)
        body, end, after = rest.partition(closing)
        if not end or "<!-- table:" in body:
            raise UserError(f"the README's marker {opening} is never closed; add {closing} below it")
        readme_text = f"{before}{opening}\n{table.strip()}\n{closing}{after}"
    return readme_text


def draw_figures(page: Path, directory: str | Path) -> None:
    """Draws the figure of every record in `directory` whose table is on the page, next to the page.

    Raises:
      UserError: as `synced` does.
    """
    text = page.read_text(encoding="utf-8")
    for name, draw in FIGURES.items():
        path = Path(directory) / f"{name}.json"
        if _has_table(text, name) and path.is_file():
            _of_record(lambda record, draw=draw, name=name: draw(record, page.parent / f"{name}.png"), path)


def _picture(name: str) -> str:
    """The lines that show a record's figure above its table; nothing for a record without a figure."""
    if name not in FIGURES:
        return ""
    caption = inspect.getdoc(FIGURES[name]).splitlines()[0].replace('"', "'")
    dark = f'<source media="(prefers-color-scheme: dark)" srcset="{name}.dark.png">'
    return f'<picture>{dark}<img src="{name}.png" alt="{caption}"></picture>\n\n'


def _has_table(text: str, name: str) -> bool:
    return OPENING.format(name=name) in text


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}); write the record again") from error


def _of_record(write: Callable[[Mapping], Any], path: Path) -> Any:
    record = _read(path)
    try:
        return write(record)
    except KeyError as error:
        raise UserError(f"{path} lacks {error}, which its table shows; write the record again") from error


def main(arguments: Sequence[str]) -> int:
    """Rewrites the pages; returns the exit code, 2 for a mistake of the user's."""
    if len(arguments) < 2:
        print("error: give the pages, such as README.md, and then the folder of the records", file=sys.stderr)
        return 2
    *pages, directory = map(Path, arguments)
    code = 0
    for path in pages:
        try:
            files.write_atomically(path, synced(path.read_text(encoding="utf-8"), directory))
            draw_figures(path, directory)
        except (OSError, UserError) as error:
            missing = f"{path} cannot be rewritten ({error}); name a README that exists"
            print(f"error: {missing if isinstance(error, OSError) else error}", file=sys.stderr)
            code = 2
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
