"""Cross-entropy of columns that may be split over ranks. References: torch's cross_entropy and autograd; the plain twins for the kernels."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from visionloom.model.kernels import cross_entropy
from visionloom.model.kernels.cross_entropy import row_sums, to_gradient_
from visionloom.tests.model.kernels.triton_process import compiled, compiling, interpreted

ROWS = 7
COLUMNS = (50, 4096, 4097)
"""Less than a program takes at a time, as many, and one more."""


def inputs(columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Logits whose rows have gaps between them, targets of which some are other ranks', and weights."""
    generator = torch.Generator().manual_seed(columns)
    logits = 4 * torch.randn(ROWS, columns + 8, generator=generator)
    targets = torch.tensor([0, columns - 1, -1, columns, -3 * columns, 2 * columns, 7])
    return logits.to(dtype), targets, torch.rand(ROWS, generator=generator)


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_make_torchs_loss_and_gradient(ranks: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(ROWS, 50, generator=generator, requires_grad=True)
    targets = torch.randint(0, 50, (ROWS,), generator=generator)
    weights = torch.rand(ROWS, generator=generator)
    losses = F.cross_entropy(logits, targets, reduction="none")
    (losses * weights).sum().backward()

    parts = [part.clone() for part in logits.detach().chunk(ranks, 1)]
    begins = [50 // ranks * rank for rank in range(ranks)]
    own = [row_sums(part, targets - begin) for part, begin in zip(parts, begins, strict=True)]
    largest = torch.stack([sums[0] for sums in own]).amax(0)
    total = sum(sums[1] * (sums[0] - largest).exp() for sums in own)
    assert isinstance(total, Tensor)
    of_target = sum(sums[2] for sums in own)
    torch.testing.assert_close(total.log() + largest - of_target, losses.detach())
    for part, begin in zip(parts, begins, strict=True):
        to_gradient_(part, targets - begin, largest, total, weights)
    torch.testing.assert_close(torch.cat(parts, 1), logits.grad)


def kernels_equal_their_twins() -> None:
    """In a process where Triton is interpreted."""
    from visionloom.model.kernels import cross_entropy_triton as kernels

    for columns in COLUMNS:
        for dtype in (torch.float32, torch.bfloat16):
            wide, targets, weights = inputs(columns, dtype)
            sums = cross_entropy._row_sums_cpu(wide[:, :columns], targets)
            own_sums = kernels.row_sums(wide[:, :columns], targets)
            torch.testing.assert_close(own_sums, sums, rtol=1e-5, atol=1e-5)

            own, twin = wide.clone(), wide.clone()
            others = targets, sums[0], sums[1], weights
            kernels.to_gradient_(own[:, :columns], *others)
            cross_entropy._to_gradient_cpu(twin[:, :columns], *others)
            # The interpreter cuts bf16 off where a GPU rounds.
            close = 1e-5 if dtype == torch.float32 else 2**-7
            torch.testing.assert_close(own, twin, rtol=close, atol=1e-7)
            assert torch.equal(own[:, columns:], wide[:, columns:]), "the gaps are others' memory"


def test_kernels_equal_their_twins() -> None:
    interpreted(kernels_equal_their_twins)


def kernels_fit_into_registers() -> None:
    """In a process where Triton compiles."""
    from visionloom.model.kernels import cross_entropy_triton as kernels

    types = dict.fromkeys(("sums", "largest", "total", "weights"), "*fp32")
    types |= dict.fromkeys(("rows", "columns", "stride"), "i32") | {"targets": "*i64"}
    sizes = {"BLOCK": kernels.COLUMNS}
    for gpu in (80, 90, 100):
        for dtype in ("*bf16", "*fp32"):
            types["logits"] = dtype
            for kernel in (kernels.sums_kernel, kernels.gradient_kernel):
                assert compiled(kernel, types, sizes, gpu, kernels.WARPS).spilled == 0


def test_kernels_fit_into_registers() -> None:
    compiling(kernels_fit_into_registers)
