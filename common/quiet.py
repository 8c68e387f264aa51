"""Keep what libraries say about themselves off the user's screen: absent accelerators, old syntax, planned removals.

And what is said must not give orders to a terminal: messages of `logging`, warnings, tracebacks and the errors of argparse hold
names from data, and are escaped as everything that visionloom prints. Only warnings are held back, never errors. What `python -W` or PYTHONWARNINGS say about warnings goes before this file.
"""

import argparse
import logging
import os
import sys
import threading
import traceback
import warnings
from types import TracebackType
from typing import IO, Any

from visionloom.common.text import printable, say, warn

OURS = r"visionloom\.|__main__"
# megatron announces its defaults and planned removals, the second says at import that there is no GPU.
TALKATIVE_LOGGERS = ("megatron", "torch.utils.cpp_extension")


def quiet_libraries() -> None:
    """Show only warnings that arise in visionloom's own modules; call it before torch is imported."""
    escape_messages()
    if not sys.warnoptions:
        # A SyntaxWarning names its file instead of its module, so libraries cannot be told by name: all but ours are meant.
        warnings.filterwarnings("ignore", module=rf"(?!{OURS})")
    for name in TALKATIVE_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    # gloo and NCCL print their connections at a lower level.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def escape_messages() -> None:
    """Show messages of any logger, warnings and tracebacks with escapes for what a terminal would obey."""
    # The record and not a handler: whoever formats it gets the escaped text.
    logging.setLogRecordFactory(_Record)
    warnings.showwarning = _show_warning
    sys.excepthook = _show_exception
    threading.excepthook = _show_exception_of_thread


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors, which repeat words of the command line, are escaped."""

    def _print_message(self, message: str, file: Any = None) -> None:
        if message:
            say(message.removesuffix("\n"), file=file or sys.stderr)


class _Record(logging.LogRecord):
    """A message of `logging`, whoever formats it."""

    def __init__(self, *values: Any, **named: Any) -> None:
        super().__init__(*values, **named)
        if self.exc_info and self.exc_info[0]:
            self.exc_text = printable(logging.Formatter().formatException(self.exc_info))

    def getMessage(self) -> str:
        """Return the message with its arguments."""
        return printable(super().getMessage())


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: IO[str] | None = None,
    line: str | None = None,
) -> None:
    text = warnings.formatwarning(message, category, filename, lineno, line)
    stream: Any = file or sys.stderr
    say(text.removesuffix("\n"), file=stream)


def _show_exception_of_thread(ended: threading.ExceptHookArgs) -> None:
    error = ended.exc_value or ended.exc_type()
    _show_exception(ended.exc_type, error, ended.exc_traceback)


def _show_exception(
    kind: type[BaseException], error: BaseException, where: TracebackType | None
) -> None:
    if issubclass(kind, KeyboardInterrupt):
        # Python's own hook ends the process as a shell expects after Ctrl-C.
        sys.__excepthook__(kind, error, where)
        return
    warn("".join(traceback.format_exception(kind, error, where)).removesuffix("\n"))
