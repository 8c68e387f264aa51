"""Triton kernels: numbers by Triton's interpreter against the plain twins, and compilation for GPUs that are not here.

Reference of the numbers: the twins, which test_twins.py compares with torch and transformers.
"""

import importlib
from typing import Any

import pytest
import torch

from visionloom.launch.check_parts.operation_calls import calls, error
from visionloom.tests.model.kernels.triton_process import compiled, compiling, interpreted

# The interpreter rounds to bf16 in its own way: two units in the last place of the largest value.
TOLERANCES = {"float32": 1e-5, "bfloat16": 2**-6}


def kernels_equal_their_twins() -> None:
    """In a process where Triton is interpreted."""
    from visionloom.model.kernels import norm_triton, rotary_triton

    # Few programs, so that each has several rows or tokens.
    norm_triton.MULTIPROCESSORS = 1
    rotary_triton.PROGRAMS = 2
    wrong = {}
    for name, module, operation, arguments in calls():
        kernels = importlib.import_module(f"visionloom.model.kernels.{module}_triton")
        twin = getattr(torch.ops.visionloom, operation)
        worst = error(getattr(kernels, operation)(*arguments), twin(*arguments))
        if worst > TOLERANCES[name.split()[-2]]:
            wrong[name] = worst
    assert wrong == {}


def test_kernels_equal_their_twins() -> None:
    interpreted(kernels_equal_their_twins)


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
IN_FP32 = {"mean", "deviation", "rotation", "partial", "row_weights", "by_weight"}
NUMBERS = {"rows", "tokens", "row_stride", "token_stride", "group_stride"}

COMPILED: dict[str, tuple[str, str, dict[str, Any], int, int]] = {
    "norm 4096": (
        "norm",
        "forward_kernel",
        {"SIZE": 4096, "BLOCK": 4096, "ROWS": 1, "CENTRED": False},
        8,
        64,
    ),
    "norm 12288": (
        "norm",
        "forward_kernel",
        {"SIZE": 12288, "BLOCK": 16384, "ROWS": 1, "CENTRED": False},
        16,
        80,
    ),
    "norm backward 4096": (
        "norm",
        "backward_kernel",
        {"SIZE": 4096, "BLOCK": 4096, "ROWS": 1, "PASSES": True, "CENTRED": False},
        8,
        112,
    ),
    "norm backward 12288": (
        "norm",
        "backward_kernel",
        {"SIZE": 12288, "BLOCK": 16384, "ROWS": 1, "PASSES": True, "CENTRED": False},
        16,
        128,
    ),
    "layer norm": (
        "norm",
        "forward_kernel",
        {"SIZE": 1152, "BLOCK": 2048, "ROWS": 1, "CENTRED": True},
        4,
        64,
    ),
    "layer norm backward": (
        "norm",
        "backward_kernel",
        {"SIZE": 1152, "BLOCK": 2048, "ROWS": 1, "PASSES": False, "CENTRED": True},
        4,
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


def kernels_do_not_spill() -> None:
    """In a process where Triton compiles."""
    wrong = {}
    for name, (module, function, sizes, warps, registers) in COMPILED.items():
        code = importlib.import_module(f"visionloom.model.kernels.{module}_triton")
        kernel = getattr(code, function)
        types = {argument: type_of(argument) for argument in kernel.arg_names}
        for gpu in (80, 90, 100):
            made = compiled(kernel, types, sizes, gpu, warps)
            # Of bf16 a thread reads and writes at least two at a time: eight but for halves of 36.
            wide = "ld.global.v4.b32" if "vision" not in name else "ld.global.v2.b32"
            is_wide = wide in made.ptx and "st.global.b16" not in made.ptx
            if made.spilled or not 0 < made.registers <= registers or not is_wide:
                wrong[name, gpu] = made.spilled, made.registers, is_wide
    assert wrong == {}


def test_kernels_compile_without_spilling() -> None:
    compiling(kernels_do_not_spill)


def type_of(argument: str) -> str:
    """The type of a kernel's argument in training in bf16."""
    if argument in NUMBERS:
        return "i32"
    if argument == "epsilon":
        return "fp32"
    return FP32 if argument in IN_FP32 else BF16
