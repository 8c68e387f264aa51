"""Text on the screen: one way out, so that names from data cannot give orders to a terminal."""

import contextlib
import os
import re
import sys
from typing import Final, TextIO

_ORDERS: Final = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Control characters but for tabs and newlines, marks that turn the direction of text, and halves of surrogate pairs."""


def printable(text: str) -> str:
    """Return the text with what a terminal would obey, or cannot show, written as an escape (`\\x1b`); newlines and tabs stay."""
    return _ORDERS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def one_line(text: str) -> str:
    """Return a name from data as part of a line: as `printable`, and newlines and tabs are escaped too."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def encodable(text: str, encoding: str) -> str:
    """Return the text with what an encoding lacks written as an escape."""
    return text.encode(encoding, "backslashreplace").decode(encoding)


def first_line(error: BaseException) -> str:
    """Return the text of an error in one line; its type if it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def say(*lines: object, file: TextIO | None = None) -> None:
    """Print lines at once; what the stream's encoding lacks is escaped too.

    Where nobody reads standard output any more, as in `--help | head`, nothing more is shown there.

    Args:
        lines: one or more, printed one below the other.
        file: None: standard output as it is now.
    """
    # Looked up now: tests and notebooks put another stream in its place.
    stream = file or sys.stdout
    text = printable("\n".join(map(str, lines)))
    # Flushed: a rank that is killed would take lines that are not written yet with it.
    try:
        print(encodable(text, stream.encoding or "utf-8"), file=stream, flush=True)
    except BrokenPipeError:
        if stream is not sys.stdout:
            raise
        # The stream keeps what it could not write, and Python would try again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def warn(*lines: object) -> None:
    """Print lines on standard error; where they cannot be written, there is nobody to tell."""
    with contextlib.suppress(OSError):
        say(*lines, file=sys.stderr)
