"""Products of groups that are added to sums of their own. Reference: a loop over the groups in fp64."""

import itertools
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from visionloom.model.kernels.product import add_grouped_product_
from visionloom.tests.model.kernels.triton_process import compiled, compiling, interpreted

COUNTS = [[3, 0, 5, 1], [0, 0, 9, 0], [0, 0], [70, 0, 130, 64]]
"""Tokens of each group; 64 are as many as a program takes at a time."""
SIZES = [(1, 1), (37, 70), (128, 256), (136, 264)]
"""Widths of output and input; 128 and 256 are a program's tile."""
DTYPES = [torch.float32, torch.bfloat16]
BEHIND = 5
"""Rows behind the last group."""


def case(
    counts: list[int], size: tuple[int, int], dtype: torch.dtype
) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
    """Sums that are not zero, and three parts of rows, columns and ends; behind the last group are no numbers."""
    generator = torch.Generator().manual_seed(sum(counts))
    parts = []
    for own in (counts, counts[::-1], [0, *counts[1:]]):
        rows, columns = (
            torch.randn(sum(own) + BEHIND, width, generator=generator).to(dtype) for width in size
        )
        rows[sum(own) :] = columns[sum(own) :] = torch.nan
        parts.append((rows, columns, torch.tensor(own).cumsum(0).int()))
    return torch.randn(len(counts), *size, generator=generator), parts


def looped(total: Tensor, parts: list[Any]) -> Tensor:
    sums = total.double()
    for rows, columns, ends in parts:
        for group, end in enumerate(ends.tolist()):
            own = slice(int(ends[group - 1]) if group else 0, end)
            sums[group] += rows[own].double().t() @ columns[own].double()
    return sums


def check(own: Tensor, before: Tensor, parts: list[Any], close: float) -> None:
    expected = looped(before, parts)
    torch.testing.assert_close(own.double(), expected, rtol=close, atol=close * 10)
    rows = sum(torch.diff(ends, prepend=ends.new_zeros(1)) for _, _, ends in parts)
    for group, count in enumerate(rows.tolist()):
        assert count or torch.equal(own[group], before[group])


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_are_those_of_a_loop(counts: list[int], dtype: torch.dtype) -> None:
    for size in SIZES:
        total, parts = case(counts, size, dtype)
        for some in (parts[:1], parts):
            own = total.clone()
            add_grouped_product_(own, some)
            check(own, total, some, 1e-5)


def widened_products() -> Any:
    """Let Triton's interpreter multiply bf16 as fp32; that of 3.9 multiplies the bits as integers."""
    from triton.language import bfloat16, float32
    from triton.runtime.interpreter import InterpreterBuilder

    multiply = InterpreterBuilder.create_dot

    def widened(builder: Any, left: Any, right: Any, *others: Any) -> Any:
        wide = [
            builder.cast_impl(each, float32) if each.dtype.scalar == bfloat16 else each
            for each in (left, right)
        ]
        return multiply(builder, *wide, *others)

    return mock.patch.object(InterpreterBuilder, "create_dot", widened)


def kernel_is_a_loop() -> None:
    """In a process where Triton is interpreted; in bf16 too the sums are fp32's."""
    from visionloom.model.kernels import linear_triton

    # The tallest of the matrices has three tiles one below the other.
    linear_triton.NEIGHBOURS = 2
    cases = [(counts, size, dtype) for counts in COUNTS for size in SIZES for dtype in DTYPES]
    with widened_products():
        for counts, size, dtype in cases:
            total, parts = case(counts, size, dtype)
            for some in (parts[:1], parts):
                factors = map(list, zip(*some, strict=True))
                own = linear_triton.add_grouped_product_(total.clone(), *factors)
                check(own, total, some, 1e-5)


def test_kernel_is_a_loop() -> None:
    interpreted(kernel_is_a_loop)


COMPILED = [
    ("*bf16", torch.bfloat16, 4096, 1536),
    ("*bf16", torch.bfloat16, 8, 8),
    ("*fp32", torch.float32, 1536, 2048),
]
"""Sizes of the published mixtures, and the smallest that is allowed."""


def kernel_does_not_spill() -> None:
    """In a process where Triton compiles."""
    from visionloom.model.kernels.linear_triton import NEIGHBOURS, TILES, grouped_product_kernel

    products = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
    # Two or three tiles of 64 rows of both factors: an A100 has the third turn in registers.
    shared = {80: 2, 90: 3, 100: 3}
    wrong = {}
    for kind, dtype, height, width in COMPILED:
        sizes, warps = TILES[dtype]
        types = {"total": "*fp32", "rows": kind, "columns": kind, "ends": "*i32"}
        types |= {"more_rows": kind, "more_columns": kind, "more_ends": "*i32"}
        constants = {**sizes, "OUT": height, "IN": width, "NEIGHBOURS": NEIGHBOURS}
        for (gpu, product), twice in itertools.product(products.items(), (False, True)):
            constants["TWICE"] = twice
            made = compiled(grouped_product_kernel, types, constants, gpu, warps)
            # Tensor cores round fp32.
            is_fast = "cp.async.cg" in made.ptx and (product in made.ptx) == (kind == "*bf16")
            if kind == "*bf16":
                is_fast = is_fast and made.shared >= shared[gpu] * 64 * (128 + 256) * 2
            if made.spilled or not 0 < made.registers <= 255 or not is_fast:
                wrong[kind, height, width, gpu, twice] = made.spilled, made.registers, is_fast
    assert wrong == {}


def test_kernel_compiles_without_spilling() -> None:
    compiling(kernel_does_not_spill)
