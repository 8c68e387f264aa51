"""The errors that visionloom raises on purpose."""

from visionloom.common.text import one_line


class UserError(ValueError):
    """The user's configuration or input is at fault: one line a fault names the option and the fix (exit code 2).

    Names from data are part of these lines, so that a newline in one would forge another line: it is shown as an escape.
    """

    def __init__(self, *faults: str) -> None:
        super().__init__(*faults)

    @property
    def lines(self) -> list[str]:
        """One for each fault."""
        return [one_line(str(fault)) for fault in self.args] or [type(self).__name__]

    def __str__(self) -> str:
        return "\n".join(self.lines)


class MachineError(RuntimeError):
    """The machine failed, and not what the user gave: one line that says where, exit code 1; the same command may go on."""
