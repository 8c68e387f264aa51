"""What the shell hands over: variables that tell of other ranks, true only where torchrun started this process, and its ~.

torch waits in silence, for half an hour, for the ranks of a WORLD_SIZE that nobody has started.
"""

import os
import re
import socket
from pathlib import Path

from visionloom.common.errors import UserError
from visionloom.common.ranks import ranks_here

TORCHRUN = "TORCHELASTIC_RUN_ID"
"""Set by torchrun for every rank, and not a name that people export; another launcher that gives each rank all of the
variables below may set it too."""
ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
"""What they are for one process, whoever set them."""
RENDEZVOUS = ("MASTER_ADDR", "MASTER_PORT")
THREADS = "OMP_NUM_THREADS"


def check_environment() -> None:
    """Refuse variables that tell of ranks that do not exist, before anything waits for them.

    Raises:
        UserError: one line with the variables, their values and the `unset` that removes them.
    """
    # OpenMP takes a list too, a number for each level of nesting; torch fails on other texts far from here.
    threads = os.environ.get(THREADS, "")
    if not re.fullmatch(r"\s*([1-9]\d*\s*(,\s*[1-9]\d*\s*)*)?", threads):
        raise UserError(
            f"{THREADS}={threads} is not a number of threads: unset {THREADS}, or export a whole number above 0"
        )

    given = {name: os.environ[name] for name in ALONE if name in os.environ}
    # One process runs by these values also where nobody has set them.
    if given.items() <= ALONE.items():
        return
    if TORCHRUN in os.environ and _is_a_rank(given):
        return
    shown = ", ".join(f"{name}={value}" for name, value in given.items())
    names = " ".join(name for name in (*ALONE, *RENDEZVOUS, TORCHRUN) if name in os.environ)
    raise UserError(
        f"{shown} in the environment, but not from a torchrun that started this process: for one process, unset {names};"
        " for several, start it with torchrun --standalone --nproc-per-node N"
    )


def record_collectives(folder: str) -> None:
    """Let torch keep the last collectives of each rank, and write them into a run's folder if one waits too long.

    Their comparison tells which rank called what. What the user has exported stays.
    """
    # 20,000 are some ten micro-batches of a deep model with tensor parallelism; torch's own 2,000 may be less than one.
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "20000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    # A file a rank; torch would write them below the home folder, which containers throw away.
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", f"{folder}/collectives-")


def log_transports(folder: Path | None) -> None:
    """Let NCCL of this process write into a folder how it reaches other ranks; where the user has it write elsewhere, or more, that stays.

    Source: NCCL's documentation of NCCL_DEBUG_FILE, in which %p is the number of the process.
    """
    # WARN, which scripts of clusters set, is part of INFO: `last_warning_of_nccl` reads it from the file.
    quiet = os.environ.get("NCCL_DEBUG", "WARN") == "WARN" and "NCCL_DEBUG_FILE" not in os.environ
    if folder is not None and quiet:
        os.environ["NCCL_DEBUG"] = "INFO"
        os.environ["NCCL_DEBUG_FILE"] = f"{folder}/nccl-%p"


def log_of_nccl() -> Path | None:
    """Return the file that NCCL of this process writes to; None if it writes to none."""
    pattern = os.environ.get("NCCL_DEBUG_FILE", "")
    if not pattern:
        return None
    names = {"%h": socket.gethostname(), "%p": str(os.getpid())}
    return Path(re.sub("%[hp]", lambda match: names[match[0]], pattern))


def last_warning_of_nccl() -> str:
    """Return the last warning that NCCL of this process has written to its file; empty without one."""
    path = log_of_nccl()
    if path is None or not path.is_file():
        return ""
    warnings = re.findall("NCCL WARN (.+)", path.read_text(errors="replace"))
    return warnings[-1].strip() if warnings else ""


def machines() -> int:
    """Return the machines of the whole run, by the ranks of this one."""
    return -(-world_size() // ranks_here())


def set_up_gpus(tensor: int) -> None:
    """Set what CUDA and torch read once, when they start; what the user has exported stays.

    `tensor`: the largest tensor-parallel degree of the run.
    """
    # Each pack has other sizes: blocks of memory must be able to grow, or they cannot be used for the next one.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    # With one queue a collective that was launched before a product starts before it; else the product may take all
    # multiprocessors first, and what Megatron-core means to overlap waits. Without tensor parallelism copies would suffer.
    if tensor > 1:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def check_home(option: str, value: str) -> None:
    """Refuse a ~ or a $HOME that the shell has left in an option's value: what is written would go to a folder of that name.

    Raises:
        UserError: one line with the word to write instead.
    """
    if value == "~" or value.startswith("~/"):
        raise UserError(
            f'{option}={value}: the shell has not replaced ~ by your home folder: write "{option}=$HOME{value[1:]}" with the'
            " double quotes (a folder of that name is ./~)"
        )
    if left := re.match(r"\$[A-Za-z_]\w*(?=/|$)", value):
        raise UserError(
            f'{option}={value}: the shell has not replaced {left[0]}: write "{option}={value}" with the double quotes, not with'
            f" single ones (a folder of that name is ./{left[0]})"
        )


def _is_a_rank(given: dict[str, str]) -> bool:
    """Return whether the variables name one rank of a world that can be met."""
    numbers = [int(value) for value in given.values() if re.fullmatch(r"\d+", value)]
    if len(numbers) < len(ALONE):
        return False
    # In the order of ALONE, which `given` keeps.
    rank, world_size, *_ = numbers
    return rank < world_size and set(RENDEZVOUS) <= set(os.environ)


def memory_bytes() -> int:
    """Return the memory in bytes of this machine, not of its GPUs."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def world_size() -> int:
    """Return the ranks of the whole run: WORLD_SIZE, or 1. Raises UserError if it is not a number."""
    value = os.environ.get("WORLD_SIZE", "1")
    if not re.fullmatch(r"[1-9]\d*", value):
        raise UserError(
            f"WORLD_SIZE={value} in the environment is not a number of ranks: unset WORLD_SIZE"
        )
    return int(value)


def trains_on_gpus(device: str) -> bool:
    """Return whether a run with this run.device trains on GPUs: `auto` does so where this machine has one."""
    has_gpu = any(Path("/dev").glob("nvidia[0-9]*"))
    return device == "cuda" or (device == "auto" and has_gpu)
