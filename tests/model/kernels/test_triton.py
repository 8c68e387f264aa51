"""Triton kernels: numbers by Triton's interpreter against the plain twins, and compilation for GPUs that are not here.

Reference of the numbers: the twins, which test_twins.py compares with torch and transformers.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from visionloom.tests.model.kernels.cases import calls, error

triton = pytest.importorskip("triton")

# The interpreter rounds to bf16 in its own way: two units in the last place of the largest value.
TOLERANCES = {"float32": 1e-5, "bfloat16": 2**-6}


def test_kernels_equal_their_twins() -> None:
    command = [sys.executable, "-m", "visionloom.tests.model.kernels.interpreted"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    errors = json.loads(run.stdout.splitlines()[-1])
    assert set(errors) == {name for name, *_ in calls()}
    kinds = {name: name.split()[-2] for name in errors}
    assert {name: e for name, e in errors.items() if e > TOLERANCES[kinds[name]]} == {}


def test_shapes_on_meta_equal_those_of_the_twins() -> None:
    for name, _, operation, arguments in calls():
        operator = getattr(torch.ops.visionloom, operation)
        there = torch.utils._pytree.tree_map_only(torch.Tensor, lambda x: x.to("meta"), arguments)
        made, expected = operator(*there), operator(*arguments)
        shapes = torch.utils._pytree.tree_map(lambda x: (x.shape, x.stride(), x.dtype), made)
        assert shapes == torch.utils._pytree.tree_map(
            lambda x: (x.shape, x.stride(), x.dtype), expected
        ), name


def test_a_difference_is_seen() -> None:
    """The control of `error`: values, shapes and dtypes."""
    x = torch.ones(3, 4)
    assert error(x, x) == 0.0
    assert error(x * 1.1, x) == pytest.approx(0.1)
    assert error(x[:2], x) == error(x.bfloat16(), x) == float("inf")


BF16, FP32 = "*bf16", "*fp32"
TEXT = {"GROUPS": 8, "QUERIES": 4, "KEYS": 1, "HALF": 64, "BLOCK": 64, "HEADS": 16, "NORM": True}
VISION = {"GROUPS": 1, "QUERIES": 16, "KEYS": 16, "HALF": 36, "BLOCK": 64, "HEADS": 16}
VISION["NORM"] = False
IN_FP32 = {"deviation", "rotation", "partial", "row_weights", "by_weight"}
NUMBERS = {"rows", "tokens", "row_stride", "token_stride", "group_stride"}

COMPILED: dict[str, tuple[str, str, dict[str, Any], int, int]] = {
    "norm 4096": (
        "norm",
        "forward_kernel",
        {"SIZE": 4096, "BLOCK": 4096, "ROWS": 1, "ADD": False},
        8,
        64,
    ),
    "add norm 12288": (
        "norm",
        "forward_kernel",
        {"SIZE": 12288, "BLOCK": 16384, "ROWS": 1, "ADD": True},
        16,
        80,
    ),
    "norm backward 4096": (
        "norm",
        "backward_kernel",
        {"SIZE": 4096, "BLOCK": 4096, "ROWS": 1, "PASSES": True},
        8,
        112,
    ),
    "norm backward 12288": (
        "norm",
        "backward_kernel",
        {"SIZE": 12288, "BLOCK": 16384, "ROWS": 1, "PASSES": True},
        16,
        128,
    ),
    "text": ("rotary", "forward_kernel", TEXT, 4, 64),
    "text backward": ("rotary", "backward_kernel", TEXT, 4, 168),
    "vision": ("rotary", "forward_kernel", VISION, 4, 64),
    "vision backward": ("rotary", "backward_kernel", VISION, 4, 96),
    "swiglu": (
        "activation",
        "swiglu_kernel",
        {"WIDTH": 12288, "BLOCK": 1024, "WEIGHTED": True},
        4,
        48,
    ),
    "swiglu backward": (
        "activation",
        "swiglu_backward_kernel",
        {"WIDTH": 12288, "BLOCK": 1024, "WEIGHTED": True},
        4,
        64,
    ),
}
"""Module, kernel, sizes, warps, and the registers a thread may have: those of 3.9 and 3.6 and some room."""


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("name", COMPILED)
def test_a_kernel_compiles_without_spilling(name: str, capability: int, tmp_path: Path) -> None:
    module, kernel, sizes, warps, registers = COMPILED[name]
    resources, ptx = compiled(module, kernel, sizes, warps, capability, tmp_path)
    assert resources["STACK"] == resources["LOCAL"] == 0
    assert 0 < resources["REG"] <= registers
    # Of bf16 a thread reads and writes at least two at a time: eight but for halves of 36.
    assert "st.global.b16" not in ptx
    assert ("ld.global.v4.b32" if "vision" not in name else "ld.global.v2.b32") in ptx


def compiled(
    module: str, kernel: str, sizes: dict[str, Any], warps: int, capability: int, folder: Path
) -> tuple[dict[str, int], str]:
    """Compile a kernel of bf16 tensors, aligned as torch's are; return its resources by cuobjdump, and its PTX."""
    code = __import__(f"visionloom.model.kernels.{module}_triton", fromlist=["_"])
    function = getattr(code, kernel)
    signature, aligned = {}, {}
    for number, name in enumerate(function.arg_names):
        kind = "constexpr" if name in sizes else FP32 if name in IN_FP32 else BF16
        if name in NUMBERS or name == "epsilon":
            kind = "fp32" if name == "epsilon" else "i32"
        signature[name] = kind
        if kind.startswith("*") or name.endswith("stride"):
            aligned[(number,)] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(function, signature, sizes, aligned)
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    result = triton.compile(source, target=target, options={"num_warps": warps})

    cubin = folder / "kernel.cubin"
    cubin.write_bytes(result.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    dump = subprocess.run(
        [tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    counts = re.findall(r"(REG|STACK|LOCAL):(\d+)", dump)
    return {name: int(count) for name, count in counts}, result.asm["ptx"]
