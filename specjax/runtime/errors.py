"""The one exception that is meant for the person at the keyboard."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in what was asked for: one sentence that names the thing and the remedy.

    The command line prints it as one `error:` line with exit code 2; anything else that is raised is a bug.
    """


def nearest(name: str, options: Iterable[str]) -> str:
    """The tail of an error sentence: the option closest to `name`, or all options if none is close."""
    names = sorted(str(option) for option in options)
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.6)
    if close:
        return f'; did you mean "{close[0]}"?'
    if not names:
        return "; there is nothing to choose from"
    return "; the options are " + ", ".join(names)
