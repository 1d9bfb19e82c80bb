"""The exception for mistakes of a user, as opposed to bugs, and helpers for error messages."""

import contextlib
import difflib
from collections.abc import Iterable, Iterator


class UserError(Exception):
    """A mistake in the command, the config or the input: one sentence that names the problem and the remedy.

    The command line prints it as one `error:` line and exits with code 2. Any other exception is a bug.
    """


@contextlib.contextmanager
def prefixed(where: str) -> Iterator[None]:
    """A context that puts `where` before the message of any UserError raised inside it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}{error}") from None


def first_line(error: Exception) -> str:
    """The first line of an error's message, cut to 160 characters, to quote it in another message."""
    return (str(error).strip().splitlines() or [""])[0][:160]


def nearest(name: str, options: Iterable[str]) -> str:
    """The end of an error sentence: suggests the option closest to `name`, or lists all options if none is close."""
    names = sorted(str(option) for option in options)
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.6)
    if close:
        return f'; did you mean "{close[0]}"?'
    if not names:
        return "; there is nothing to choose from"
    return "; the options are " + ", ".join(names)
