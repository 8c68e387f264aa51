"""How a command ends on a user's error: one line, from one rank, exit code 2, no traceback.

torchrun ends all ranks as soon as one has failed. So the rank that speaks leaves at once, and the others wait to be ended:
a rank that left first would have the speaker killed before it has spoken.
"""

import atexit
import contextlib
import ctypes
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from visionloom.common.errors import EarlyEnd, UserError
from visionloom.common.ranks import STORE_THREAD
from visionloom.common.text import one_line, printable, warn
from visionloom.train.observe import status, stopping

FAILURE = status.FAILURE
CANNOT_RUN = 1
"""Of a plan that was made and says that the run does not fit; USER_ERROR is that none could be made."""
USER_ERROR = 2
INTERRUPTED = 128 + signal.SIGINT
PR_SET_PDEATHSIG = 1
"""From Linux's <sys/prctl.h>."""
SECONDS_UNTIL_ENDED = 10.0
"""Longest wait of a silent rank; torchrun looks for failed ranks every 0.1 s."""


def exit_with(error: Exception, folder: str = "", everywhere: bool = False) -> NoReturn:
    """Print the user's error and end this process with exit code 2.

    Exactly one rank of a machine prints. Set `everywhere` where all ranks are sure to find the same error (a wrong key):
    then rank 0 alone prints. Otherwise any rank may be the only one in trouble, and the first one to claim it prints.
    The rank that prints also writes the cause to `status.json`: of the run that has begun, or in `folder`, if that exists.

    Args:
        error: its message is one line a fault, each naming the option and the fix.
        folder: of the run, if it has not begun yet.
        everywhere: whether all ranks raise this same error.
    """
    if _may_speak(everywhere):
        lines = [one_line(str(error)) or type(error).__name__]
        if isinstance(error, UserError):
            lines = error.lines
        # What was printed before comes first, also where both streams go to one file.
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        warn(*(f"error: {line}" for line in lines))
        hint = "change what the cause names and start the same command again"
        if folder:
            status.refused(Path(folder), USER_ERROR, str(error), hint)
        else:
            status.current.failed(USER_ERROR, str(error), hint)
    else:
        time.sleep(SECONDS_UNTIL_ENDED)
    keep_code(USER_ERROR)
    sys.exit(USER_ERROR)


def keep_code(code: int) -> None:
    """Have this process end with an exit code once nobody catches what ends it, where process groups are open.

    Threads of gloo go on while the interpreter is taken down, and were seen to end it by SIGSEGV in place of the code.
    """
    distributed = sys.modules.get("torch.distributed")
    is_open = (
        distributed is not None and distributed.is_available() and distributed.is_initialized()
    )
    # One that is held in torch's store ends the interpreter by SIGABRT when its connection goes.
    is_held = any(thread.name == STORE_THREAD for thread in threading.enumerate())
    # A traceback alone ends a process with 1.
    if is_open or is_held or code == status.GAVE_UP:
        atexit.register(end_process, code)


def end_process(code: int) -> NoReturn:
    """End this process with an exit code, what it has printed shown; threads that write or wait are not waited for."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def exit_interrupted(hint: str = stopping.RESUME) -> NoReturn:
    """End on Ctrl-C as a shell counts it, with one line that ends in a hint and no traceback; status.json says so."""
    # Whoever presses it twice does not want to see where it fell.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    status.current.failed(INTERRUPTED, "interrupted (Ctrl-C)", hint)
    if _may_speak(everywhere=False):
        warn(f"interrupted; {hint}")
    end_process(INTERRUPTED)


def exit_stopped(reason: str) -> NoReturn:
    """End a run on a signal while no phase trains: what is saved is whole, and there is no more to save."""
    hint = stopping.RESUME
    code = status.current.ended("stopped", status.STOPPED, reason, hint)
    if code is not None and _may_speak(everywhere=False):
        warn(f"{reason} between the steps of phases; {hint}")
    end_process(code or status.STOPPED)


def exit_early(end: EarlyEnd) -> NoReturn:
    """End a run that ends early on all ranks: one line, and the exit code that the end asks for.

    torchrun takes any code but 0 for a fault, and would begin a run that was stopped anew if it may (`--max-restarts`).
    """
    # Where all ranks end together, the main rank has told of it.
    code = status.current.ended(end.state, end.code, str(end), end.hint)
    if code is not None:
        warn(f"{one_line(str(end))}; {end.hint}")
    is_restarted = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    code = 0 if is_restarted and end.state == "stopped" else code or end.code
    keep_code(code)
    sys.exit(code)


def code_of(run: Callable[[], int]) -> int:
    """Run a command that has nothing to resume and return its exit code; what ends it early is said in one line."""
    try:
        return run()
    except UserError as error:
        exit_with(error)
    except KeyboardInterrupt:
        exit_interrupted("start the same command again")
    except OSError as error:
        warn(f"error: {one_line(str(error))}")
        return FAILURE


def end_with_parent() -> None:
    """Let the kernel end this rank if torchrun's agent dies: ranks that outlive a killed agent would hold the GPUs."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == 1:
        # It died before the kernel was told.
        sys.exit(FAILURE)


def record_for_torchrun(error: Exception) -> None:
    """Leave this rank's traceback where torchrun looks for it, so that its summary shows the cause and not `error_file: <N/A>`."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)
        _escape(Path(os.environ.get("TORCHELASTIC_ERROR_FILE", "")))


def _escape(record: Path) -> None:
    """Take what a terminal would obey out of a traceback that torchrun will show: messages hold names from data."""

    def escaped(value: object) -> object:
        if isinstance(value, dict):
            return {key: escaped(each) for key, each in value.items()}
        return printable(str(value))

    try:
        record.write_text(json.dumps(escaped(json.loads(record.read_text()))))
    except (OSError, ValueError):
        return  # no file, which torchrun says


def _may_speak(everywhere: bool) -> bool:
    """Return whether this rank is the one to print."""
    return os.environ.get("RANK", "0") == "0" if everywhere else is_first("error")


def is_first(what: str) -> bool:
    """Return whether this rank is the first of its machine to ask, by a file of that name; torchrun makes the folder anew for each start."""
    attempt = attempt_folder()
    if attempt is None:
        return True
    try:
        (attempt / f"visionloom.{what}").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        # A full disk: several ranks may speak, which is better than none.
        return True
    return True


def attempt_folder() -> Path | None:
    """Return the folder that torchrun makes anew for each start of this machine's ranks; None without one.

    torchrun gives each rank a file `<attempt>/<local rank>/error.json`.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE", "")
    attempt = Path(error_file).parents[1] if error_file else None
    return attempt if attempt is not None and attempt.is_dir() else None
