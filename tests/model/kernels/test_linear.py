"""Linear layers whose gradients are added in the product. References: torch's nn.Linear, and autograd's own gradients."""

import pytest
import torch
from torch import Tensor, nn

from visionloom.model.kept import kept
from visionloom.model.kernels.linear import Linear, column_sums, wide_linear
from visionloom.tests.model.kernels.triton_process import compiled, compiling, interpreted


def pair(device: torch.device) -> tuple[Linear, nn.Linear, Tensor]:
    """Ours, torch's with the same weights, and an input."""
    torch.manual_seed(0)
    ours, theirs = Linear(24, 40, device=device), nn.Linear(24, 40, device=device)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs, torch.randn(37, 24, device=device)


def test_gradients_are_torchs(device: torch.device) -> None:
    ours, theirs, x = pair(device)
    results = []
    for layer in (ours, theirs):
        own = x.clone().requires_grad_()
        output = layer(own)
        output.square().sum().backward()
        results.append([output, own.grad, layer.weight.grad, layer.bias.grad])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("made_again", [False, True])
def test_weight_gradients_of_micro_batches_are_added_in_main_grad(
    device: torch.device, made_again: bool
) -> None:
    """As in Megatron-core's DDP: the flag says that its hook has nothing to add; also where autograd keeps other tensors."""
    ours, theirs, x = pair(device)
    main_grad = torch.zeros(40, 24, device=device)
    ours.weight.main_grad = main_grad  # type: ignore[assignment]
    for scale in (1.0, 2.0):
        with kept(cheap_again=made_again, in_host_memory=False):
            output = ours(x * scale)
        output.square().sum().backward()
        theirs(x * scale).square().sum().backward()
    assert ours.weight.grad_added_to_main_grad
    torch.testing.assert_close(main_grad, theirs.weight.grad)
    torch.testing.assert_close(ours.bias.grad, theirs.bias.grad)


def test_frozen_parts_have_no_gradient(device: torch.device) -> None:
    ours, _, x = pair(device)
    ours.requires_grad_(False)
    x.requires_grad_()
    ours(x).sum().backward()
    assert ours.weight.grad is None and ours.bias.grad is None
    torch.testing.assert_close(x.grad, ours.weight.sum(0).expand(37, 24))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("summed", [False, True])
def test_wide_results_and_gradients_are_those_of_fp64(
    dtype: torch.dtype, summed: bool, device: torch.device
) -> None:
    """Of inputs in bf16 too nothing is rounded to it, but for gradients that have its type; `summed`: into `main_grad`."""
    torch.manual_seed(0)
    sizes = [(5, 1, 300), (16, 300)]
    x, weight = (torch.randn(size).to(device, dtype).requires_grad_() for size in sizes)
    gradient = torch.randn(5, 1, 16).to(device)
    total = torch.ones(16, 300, device=device)
    if summed:
        weight.main_grad = total  # type: ignore[attr-defined]
    own = wide_linear(x, weight)
    own.backward(gradient)

    wide, matrix = (each.detach().double().requires_grad_() for each in (x, weight))
    expected = wide @ matrix.t()
    expected.backward(gradient.double())
    assert own.dtype == torch.float32 and own.shape == (5, 1, 16)
    close = {"rtol": 1e-5, "atol": 1e-4}
    torch.testing.assert_close(own.double(), expected, **close)
    rounded = {"rtol": 1e-5 if dtype == torch.float32 else 2**-7, "atol": 1e-4}
    torch.testing.assert_close(x.grad.double(), wide.grad, **rounded)  # type: ignore[union-attr]
    if summed:
        # Two parts of bf16 keep 16 bits of the gradient: one would be 2e-3 off.
        torch.testing.assert_close(total.double(), matrix.grad + 1.0, **close)  # type: ignore[operator]
    else:
        torch.testing.assert_close(weight.grad.double(), matrix.grad, **rounded)  # type: ignore[union-attr]


def test_sums_of_columns(device: torch.device) -> None:
    """Odd sizes, a view with gaps between rows, and no row at all."""
    for rows, columns in ((1, 1), (37, 72), (1000, 4304), (0, 5)):
        x = torch.randn(rows, columns + 3, device=device)[:, 1:-2]
        torch.testing.assert_close(column_sums(x), x.sum(0), rtol=1e-5, atol=1e-4)


def kernel_is_its_twin() -> None:
    """In a process where Triton is interpreted; few programs, so that each has several rows."""
    from visionloom.model.kernels import linear_triton

    linear_triton.PROGRAMS = 4
    for rows, columns in ((1, 1), (37, 72), (300, 130), (0, 5)):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(rows, columns + 3).to(dtype)[:, 1:-2]
            made, expected = linear_triton.column_sums(x), column_sums(x.float())
            tolerance = 1e-4 if dtype == torch.float32 else 0.2
            torch.testing.assert_close(made.float(), expected, rtol=1e-2, atol=tolerance)


def test_kernel_is_its_twin() -> None:
    interpreted(kernel_is_its_twin)


def kernel_does_not_spill() -> None:
    """In a process where Triton compiles."""
    from visionloom.model.kernels.linear_triton import COLUMNS, ROWS, sums_kernel

    numbers = dict.fromkeys(("rows", "columns", "stride", "share"), "i32")
    types = {"x": "*bf16", "sums": "*fp32"} | numbers
    for gpu in (80, 90, 100):
        made = compiled(sums_kernel, types, {"ROWS": ROWS, "COLUMNS": COLUMNS}, gpu)
        assert made.spilled == 0 and 0 < made.registers <= 128, (gpu, made.registers)


def test_kernel_compiles_without_spilling() -> None:
    compiling(kernel_does_not_spill)
