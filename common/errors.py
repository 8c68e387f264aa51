"""The errors that visionloom raises on purpose."""


class UserError(ValueError):
    """The user's configuration or input is at fault: the message names the option and the fix (exit code 2)."""
