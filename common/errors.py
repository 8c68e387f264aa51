"""The errors that visionloom raises on purpose."""

import difflib
import os
from collections.abc import Iterable, Sequence
from typing import Final, Literal

from visionloom.common.text import one_line

SHOWN: Final = 40
"""Characters of a wrong value in a message."""


class UserError(ValueError):
    """The user's configuration or input is at fault: one line a fault names the option and the fix (exit code 2).

    Names from data are part of these lines, so that a newline in one would forge another line: it is shown as an escape.
    """

    def __init__(self, *faults: str) -> None:
        super().__init__(*faults)

    @property
    def lines(self) -> list[str]:
        """Return one line for each fault."""
        lines = [one_line(str(fault)) for fault in self.args]
        return lines or [type(self).__name__]

    def __str__(self) -> str:
        return "\n".join(self.lines)


class MachineError(RuntimeError):
    """The machine failed, and not what the user gave: one line that says where, exit code 1; the same command may work later."""


class EarlyEnd(RuntimeError):
    """A run that ends before its last step, though neither the user nor the program made a mistake: one line says why."""

    def __init__(self, cause: str, code: int, hint: str) -> None:
        """`code`: exit code, by which a script knows whether to start the run again; `hint`: the same for a person."""
        super().__init__(cause)
        self.code = code
        self.hint = hint

    @property
    def state(self) -> Literal["stopped", "failed"]:
        """Return what status.json calls it: `stopped`, where the same command may go on, or `failed`."""
        return "stopped" if self.code == os.EX_TEMPFAIL else "failed"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of a line about an unknown name: the nearest known one in brackets, or nothing if none is near."""
    names = list(known)
    # A shortened name is meant as one, though another may have more letters in common: a100 is no h100.
    longer = [each for each in names if name and each.startswith(name)]
    close = longer or difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def unknown(option: str, value: str, known: Sequence[str]) -> str:
    """Return the line for an option whose value is not among the known ones."""
    if len(value) > SHOWN:
        value = f"{value[:SHOWN]}..."
    shown = one_line(value)
    return f"{option}={shown} is unknown{did_you_mean(shown, known)}: use one of {', '.join(known)}"
