"""What a machine is: its GPUs and their links, the packages that training on them takes, and what its host has. Imports no torch at once.

Nothing tells whose machine it is: no names of hosts or users, no serial numbers.
"""

import importlib.metadata
import os
import platform
import resource
import shutil
import subprocess
from pathlib import Path
from typing import Any, Final

from visionloom.launch.environment import memory_bytes

GIB: Final = 1 << 30
QUERY: Final = "name,memory.total,driver_version,power.limit,clocks.max.sm,pcie.link.gen.max,pcie.link.width.max"
PACKAGES: Final = (
    "torch",
    "triton",
    "megatron-core",
    "flash-attn",
    "flash-attn-3",
    "flash-attn-4",
    "transformer-engine",
    "liger-kernel",
    "transformers",
    "numpy",
)
SHARED_MEMORY: Final = Path("/dev/shm")
LIMITS_OF_SHELL: Final = {
    "open files": resource.RLIMIT_NOFILE,
    "processes": resource.RLIMIT_NPROC,
    "locked memory": resource.RLIMIT_MEMLOCK,
}


def machine_facts() -> dict[str, Any]:
    """Return what this machine is, by name."""
    import torch

    facts: dict[str, Any] = {
        "gpus": gpus(),
        "links": output_of("nvidia-smi", "topo", "-m"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "packages": {name: version for name in PACKAGES if (version := version_of(name))},
        "torch_cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": None,
        "cpu": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory_bytes() / GIB, 1),
        "shared_memory_gib": None,
        "limits": {name: limit_of(each) for name, each in LIMITS_OF_SHELL.items()},
    }
    if torch.cuda.is_available():
        facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    if SHARED_MEMORY.is_dir():
        facts["shared_memory_gib"] = round(shutil.disk_usage(SHARED_MEMORY).total / GIB, 1)
    return facts


def gpus() -> list[dict[str, str]]:
    """Return what the driver's tool says about each GPU; nothing where it is not there."""
    answer = output_of("nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader")
    names = QUERY.split(",")
    rows = [line.split(", ") for line in (answer or "").splitlines()]
    return [dict(zip(names, line, strict=False)) for line in rows]


def output_of(*command: str) -> str | None:
    """Return what a command prints; None where it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout.strip()


def version_of(package: str) -> str | None:
    """Return the version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """Return the name of the CPU, as Linux has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return platform.machine()
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()


def limit_of(kind: int) -> int | str:
    """Return a soft limit of this process."""
    soft, _ = resource.getrlimit(kind)
    return "unlimited" if soft == resource.RLIM_INFINITY else soft
