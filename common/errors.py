"""The errors that visionloom raises on purpose."""


class UserError(ValueError):
    """The user's configuration or input is at fault: the message names the option and the fix (exit code 2)."""


class MachineError(RuntimeError):
    """The machine failed, and not what the user gave: one line that says where, exit code 1; the same command may go on."""
