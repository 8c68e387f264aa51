"""Work for other processes; here, where they find it."""

import os
import signal


def square(number: int) -> int:
    """Return the square."""
    return number * number


def fail_at_three(number: int) -> int:
    """Raise ValueError for 3."""
    if number == 3:
        raise ValueError("three")
    return number


def vanish_at_three(number: int) -> int:
    """Kill the own process for 3, as the kernel does for want of memory."""
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number
