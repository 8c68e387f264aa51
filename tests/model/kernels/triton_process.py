"""Triton's kernels without a GPU: interpreted by numpy, or compiled for a GPU that is not there, each in a process of its own.

Triton reads TRITON_INTERPRET when it is imported, so both cannot be in one process.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def interpreted(check: Callable[[], None]) -> None:
    """Run a function of a test module where Triton's kernels are interpreted."""
    _run(check, TRITON_INTERPRET="1")


def compiling(check: Callable[[], None]) -> None:
    """Run a function of a test module where Triton's kernels are compiled."""
    _run(check, TRITON_INTERPRET="0")


def _run(check: Callable[[], None], **variables: str) -> None:
    line = f"from {check.__module__} import {check.__name__} as check; check()"
    done = subprocess.run(
        [sys.executable, "-c", line],
        # The process has the package of this one, wherever it was found.
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@dataclass(frozen=True)
class Compiled:
    """A kernel compiled for a GPU."""

    registers: int
    """Of a thread."""
    spilled: int
    """Bytes of a thread that do not fit into registers."""
    ptx: str


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
    return Compiled(counts["REG"], counts["STACK"] + counts["LOCAL"], result.asm["ptx"])
