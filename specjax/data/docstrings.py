"""A summarisation task that needs no download: functions of the Python standard library and their docstrings."""

import ast
import collections
import textwrap
import warnings
from collections.abc import Iterator

from specjax.data import corpora
from specjax.runtime.errors import UserError

Pairs = tuple[tuple[str, str], ...]


def stdlib_docstrings() -> tuple[Pairs, Pairs]:
    """Returns (source, first line of the docstring) of the standard library's functions, (training, validation).

    The source is the function's text from `def` on, without docstring and indentation. Files are split as in
    `stdlib_files`, and functions ordered by a hash of their source. Duplicate sources are removed, first from training.
    Functions are skipped if the docstring is their whole body or shares a line with code.

    Raises UserError if this Python is installed without its sources, or without docstrings.
    """
    training, validation = (
        dict(pair for _, text in files for pair in _pairs(text)) for files in corpora.stdlib_files()
    )
    training = {source: line for source, line in training.items() if source not in validation}
    if not training or not validation:
        raise UserError("the standard library's sources hold no docstrings; use another task than `stdlib_docstrings`")
    return _ordered(training), _ordered(validation)


def _ordered(pairs: dict[str, str]) -> Pairs:
    return tuple(sorted(pairs.items(), key=lambda pair: corpora.stable_hash(pair[0])))


def _pairs(text: str) -> Iterator[tuple[str, str]]:
    """The (source, first docstring line) of a file's functions; none if this Python cannot parse the file."""
    # Split lines as the parser does; splitlines() would also split at form feeds.
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated escape sequences
        try:
            tree = ast.parse("\n".join(lines))
        except (SyntaxError, ValueError):
            return
    for node in _statements(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring and _has_own_lines(node, lines):
                yield _without_docstring(node, lines), docstring.split("\n")[0].strip()


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """Like ast.walk without expressions, which contain no function definitions and are 90% of the nodes."""
    nodes = collections.deque([tree])
    while nodes:
        node = nodes.popleft()
        for field in ("body", "handlers", "orelse", "finalbody", "cases"):
            nodes.extend(getattr(node, field, ()))
        yield node


def _has_own_lines(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> bool:
    """Whether the docstring shares no line with code, and code follows it."""
    docstring = node.body[0]
    before = lines[docstring.lineno - 1].encode()[: docstring.col_offset]
    return len(node.body) > 1 and node.body[1].lineno > docstring.end_lineno and before.isspace()


def _without_docstring(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str:
    docstring = node.body[0]
    code = lines[node.lineno - 1 : docstring.lineno - 1] + lines[docstring.end_lineno : node.end_lineno]
    return textwrap.dedent("\n".join(code))
