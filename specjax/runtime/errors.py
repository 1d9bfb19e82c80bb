"""The exception for mistakes of a user, as opposed to bugs, and helpers for error messages."""

import contextlib
import difflib
import errno
import logging
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path


class UserError(Exception):
    """A mistake in the command, the config or the input: one sentence that names the problem and the remedy.

    The command line prints it as one `error:` line and exits with code 2. Any other exception is a bug.
    """


class InexactText(UserError):
    """Text that an exact rule must repeat differs from plain decoding's. It is raised after records are written."""


@contextlib.contextmanager
def prefixed(where: str) -> Iterator[None]:
    """A context that puts `where` before the message of any UserError raised inside it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}{error}") from None


@contextlib.contextmanager
def writing(place: str | Path) -> Iterator[None]:
    """A context that turns the errors of a full disk into one UserError, also those of checkpointing threads."""
    for name in ("absl", "asyncio"):  # each thread would log its traceback, some as late as at the end
        logging.getLogger(name).addFilter(_is_news)
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or not _is_full_disk(error):
            raise
        raise UserError(
            f"{place} cannot be written (no space left on the device, or a file exceeds the size limit); make room, "
            "and the same command resumes from what was saved"
        ) from None


def _is_news(record: logging.LogRecord) -> bool:
    return not (record.exc_info and _is_full_disk(record.exc_info[1]))


def _is_full_disk(error: BaseException | None) -> bool:
    """Whether the error, or the one that it followed from, is that of a full disk or a quota or limit (`ulimit -f`)."""
    if error is None:
        return False
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    full |= any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EFBIG))  # of another library
    return full or _is_full_disk(error.__cause__ or error.__context__)


def note(text: str) -> None:
    """Prints a line for something that a user should know and that is no mistake."""
    print(f"note: {text}", file=sys.stderr)


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
