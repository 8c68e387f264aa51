"""Triton's kernels without a GPU: interpreted by numpy, or compiled for a GPU that is not there, in one process each.

Triton reads TRITON_INTERPRET when it is imported, so both cannot be in one process.
"""

import importlib
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

_PROCESSES: dict[str, ProcessPoolExecutor] = {}
"""By the value of TRITON_INTERPRET; each imports the model once for all tests."""


def interpreted(check: Callable[[], None]) -> None:
    """Run a function of a test module where Triton's kernels are interpreted."""
    _process("1").submit(_call, check.__module__, check.__name__).result()


def compiling(check: Callable[[], None]) -> None:
    """Run a function of a test module where Triton's kernels are compiled."""
    _process("0").submit(_call, check.__module__, check.__name__).result()


def _call(module: str, function: str) -> None:
    # Pytest knows test modules by names that begin at the repository's root.
    name = "visionloom." + module.removeprefix("visionloom.")
    getattr(importlib.import_module(name), function)()


def _process(interpret: str) -> ProcessPoolExecutor:
    if interpret not in _PROCESSES:
        one = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        with patch.dict(os.environ, TRITON_INTERPRET=interpret):
            one.submit(os.getpid).result()  # begins the process, which takes over the environment
        _PROCESSES[interpret] = one
    return _PROCESSES[interpret]


@dataclass(frozen=True)
class Compiled:
    """A kernel compiled for a GPU."""

    registers: int
    """Of a thread."""
    spilled: int
    """Bytes of a thread that do not fit into registers."""
    ptx: str
    shared: int
    """Bytes of shared memory of a program."""


def compiled(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], gpu: int, warps: int = 4
) -> Compiled:
    """Compile a kernel for sm_`gpu`, with addresses and strides aligned as torch's are; resources are cuobjdump's."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, values, aligned = {}, {}, {}
    for number, name in enumerate(kernel.arg_names):
        kind = signature[name] = "constexpr" if name in constants else types[name]
        if name in constants:
            values[(number,)] = constants[name]
        if kind.startswith("*") or name.endswith("stride"):
            aligned[(number,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, values, aligned)
    target = GPUTarget("cuda", gpu, 32)
    result = triton.compile(source, target=target, options={"num_warps": warps})

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    counts = {name: int(count) for name, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    spilled = counts["STACK"] + counts["LOCAL"]
    return Compiled(counts["REG"], spilled, result.asm["ptx"], result.metadata.shared)
