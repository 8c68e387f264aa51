"""What a rank is: its device, memory and driver, and the kernels that it will train with."""

import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch

from visionloom.common.ranks import ranks_here
from visionloom.launch.check_parts.machine_facts import processor, version_of
from visionloom.launch.check_parts.results import MeasuredSpeed
from visionloom.launch.environment import memory_bytes
from visionloom.model.kernels import flash

GIB: Final = 1 << 30
DRIVER: Final = Path("/proc/driver/nvidia/version")
"""Where NVIDIA's module says its version: reading it takes no second, as nvidia-smi does."""
VERSION: Final = re.compile(r"Kernel Module(?: for \S+)?\s+([\d.]+)")


@dataclass
class RankFacts:
    """What one rank is and how fast, as it is sent to rank 0."""

    rank: int
    host: str
    device: str
    memory_gib: float
    """Of a GPU, or this rank's share of the host's."""
    driver: str = ""
    """Version of the GPU's; empty on a CPU."""
    software: str = ""
    """Versions that must be the same on all ranks."""
    kernels: dict[str, str] = field(default_factory=dict)
    """By what they compute."""
    speeds: list[MeasuredSpeed] = field(default_factory=list)
    transports: list[str] = field(default_factory=list)
    """Ways that collectives take from this rank to others."""
    clock_seconds: float = 0.0
    """How far its clock is ahead of rank 0's."""
    fault: str = ""
    """Why it could not be measured; empty if it could."""


def facts_of(rank: int, device: torch.device, dtype: torch.dtype) -> RankFacts:
    """Return what a rank is; nothing is measured yet. `dtype`: in which it will train."""
    name, memory = f"cpu, {processor()}", memory_bytes() // ranks_here()
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        name, memory = card.name, card.total_memory
    facts = RankFacts(rank, socket.gethostname(), name, round(memory / GIB, 1))
    # Another driver on one machine is a cause of faults that nobody looks for.
    facts.driver = driver_version() if device.type == "cuda" else ""
    facts.software = ", ".join(versions(device))
    facts.kernels = kernels_of(device, dtype)
    return facts


def versions(device: torch.device) -> Iterator[str]:
    """Yield what ranks must have in common, with its version."""
    yield f"torch {torch.__version__}"
    yield f"megatron-core {version_of('megatron-core')}"
    if device.type == "cuda":
        yield f"CUDA {torch.version.cuda}"
        # As torch runs it, which need not be the package beside it.
        yield f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"


def driver_version(path: Path = DRIVER) -> str:
    """Return the version of NVIDIA's kernel module; empty if there is none."""
    try:
        version = VERSION.search(path.read_text(errors="replace"))
    except OSError:
        return ""
    return version[1] if version else ""


def kernels_of(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Name the kernels that a rank trains with, by what they compute."""
    # The tower embeds patches by a Linear, which a convolution with stride = kernel is: cuDNN has no part in it.
    patches = "a product, no convolution"
    if device.type == "cpu":
        plain = "plain torch"
        return {"attention": plain, "norms": plain, "experts": "grouped_mm", "patches": patches}
    attention = "torch, memory-efficient (fp32)"
    if dtype != torch.float32:
        attention = {"torch": "torch, FlashAttention"}.get(flash.chosen(), flash.chosen())
    triton = f"Triton {version_of('triton') or 'missing'}"
    return {"attention": attention, "norms": triton, "experts": "grouped_mm", "patches": patches}
