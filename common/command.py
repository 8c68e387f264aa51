"""Run a program that the user named: without a shell, its output in a file, for a limited time, and no longer than this process."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NoReturn

OF_A_RANK: Final = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")
"""Beginnings of the variables by which torchrun tells a rank of the others."""
TAIL_BYTES: Final = 4096
TAIL_LINES: Final = 3
TAIL_CHARACTERS: Final = 300
"""Of one line."""


def run_program(words: Sequence[str], log: Path, seconds: float) -> int | None:
    """Run a program to its end.

    Args:
        words: the program and its arguments.
        log: new file for its output and errors.
        seconds: longest time.

    Returns:
        its exit code, negative if a signal ended it; None if its time was over: then it was killed, with its children.

    Raises:
        OSError: if the program cannot be started, or the file is there already.
    """
    with open(log, "xb") as output, _exit_when_terminated():
        process = subprocess.Popen(
            words,
            # a question would wait for an answer until the time is over
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment_alone(),
            process_group=0,  # so that its children can be ended with it
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def environment_alone() -> dict[str, str]:
    """Return this process's environment without what makes it a rank: a program that uses torch would wait for the others."""
    return {name: value for name, value in os.environ.items() if not name.startswith(OF_A_RANK)}


def last_lines(log: Path) -> str:
    """Return the end of a program's output in one line."""
    with open(log, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TAIL_BYTES))
        text = file.read().decode(errors="replace")
    lines = [line.strip()[:TAIL_CHARACTERS] for line in text.splitlines() if line.strip()]
    return " | ".join(lines[-TAIL_LINES:])


@contextmanager
def _exit_when_terminated() -> Iterator[None]:
    """Let SIGTERM, by which torchrun ends a rank, end it as an exception would: the program is ended too."""

    def leave(number: int, frame: object) -> NoReturn:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
