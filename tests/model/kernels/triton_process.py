"""Triton's kernels without a GPU: interpreted by numpy, or compiled for a GPU that is not there, each in a process of its own.

Triton reads TRITON_INTERPRET when it is imported, so both cannot be in one process.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
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
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def stack_bytes(kernel: Any, types: dict[str, str], constants: dict[str, Any], gpu: int) -> int:
    """Return the bytes of a thread that do not fit into registers, of a kernel compiled for sm_`gpu`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, values)
    compiled = triton.compile(source, target=GPUTarget("cuda", gpu, 32))
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (size,) = re.findall(r"STACK:(\d+)", usage)
    return int(size)
