"""On a GPU (`--device cuda`): every operation by its kernel against the same operation on the CPU, and gradients after a move."""

from typing import Any

import pytest
import torch
from torch import Tensor

from visionloom.model.kernels.cross_entropy import row_sums, to_gradient_
from visionloom.model.kernels.permute import combine_rows, count_rows, permute_rows, sort_rows
from visionloom.model.kernels.product import add_product_
from visionloom.model.kernels.routing import choose_experts, weigh_experts
from visionloom.tests.model.kernels.cases import Draw, calls, error, tensors_of

HOST = torch.device("cpu")
TOLERANCES = {"float32": 2e-5, "bfloat16": 1.6e-2}


@pytest.fixture(scope="module", autouse=True)
def on_gpu(device: torch.device) -> None:
    """Nothing here is about a CPU; Triton's interpreter has tests of its own."""
    if device.type != "cuda":
        pytest.skip("needs a GPU")


def there(value: Any, device: torch.device) -> Any:
    """The same with tensors on the device, views with the gaps that they had."""
    if isinstance(value, list):
        return [there(each, device) for each in value]
    if not isinstance(value, Tensor):
        return value
    moved = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
    return moved.copy_(value)


def test_kernels_are_their_twins(device: torch.device) -> None:
    wrong = {}
    for name, _module, operation, arguments in calls():
        made = getattr(torch.ops.visionloom, operation)
        expected = made(*arguments)
        results = tensors_of(made(*there(arguments, device)))
        worst = error([each.cpu() for each in results], expected)
        kind = "bfloat16" if "bfloat16" in name else "float32"
        if worst > TOLERANCES[kind]:
            wrong[name] = worst
    assert not wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [50, 4096, 151_936])
def test_cross_entropy(device: torch.device, columns: int, dtype: torch.dtype) -> None:
    draw = Draw(dtype)
    logits, weights = draw(37, columns) * 4, draw.wide(37).abs()
    # Some targets are other ranks'.
    targets = torch.randint(-columns // 4, columns + columns // 4, (37,), generator=draw.generator)
    sums = row_sums(logits, targets)
    own = row_sums(logits.to(device), targets.to(device))
    torch.testing.assert_close(own.cpu(), sums, rtol=1e-5, atol=1e-5)

    moved = logits.to(device)
    others = [each.to(device) for each in (targets, sums[0], sums[1], weights)]
    to_gradient_(moved, *others)
    to_gradient_(logits, targets, sums[0], sums[1], weights)
    tolerance = 1e-6 if dtype == torch.float32 else 8e-3
    torch.testing.assert_close(moved.cpu(), logits, rtol=tolerance, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_are_added_in_fp32(device: torch.device, dtype: torch.dtype) -> None:
    draw = Draw(dtype)
    rows, columns, total = draw(640, 96), draw(640, 160), draw.wide(96, 160) * 100
    expected = total.double() + rows.double().t() @ columns.double()
    moved = total.to(device)
    add_product_(moved, rows.to(device), columns.to(device))
    torch.testing.assert_close(moved.cpu().double(), expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("tokens", [1, 7, 1000, 8192])
def test_rows_of_a_mixture(device: torch.device, tokens: int) -> None:
    """Choice, weights, counts, order and sums, forward and backward."""
    experts, each, width = 128, 8, 256
    draw = Draw(torch.float32)
    logits, x = draw(tokens, experts), draw(tokens, width).bfloat16()
    results = []
    for place in (HOST, device):
        # Copies: what is marked on the host would be marked for the GPU's copy too, which then is no leaf.
        own_logits = logits.to(place, copy=True).requires_grad_()
        own = x.to(place, copy=True).requires_grad_()
        chosen = choose_experts(own_logits.detach(), each)
        tally = torch.zeros(experts + 2, dtype=torch.int64, device=place)
        weights = weigh_experts(own_logits, chosen, None, tally)
        counts = count_rows(chosen, experts)
        rows, places, *_ = sort_rows(chosen, counts)
        permuted = permute_rows(own, rows, places)
        combined = combine_rows(permuted * 2, rows, places)
        (combined.float().sum() + (weights * torch.arange(each, device=place)).sum()).backward()
        results.append(
            [
                chosen,
                tally[:experts],
                weights,
                rows,
                places,
                permuted,
                combined,
                own_logits.grad,
                own.grad,
            ]
        )
    for ours, theirs in zip(*results, strict=True):
        assert ours is not None and theirs is not None
        if ours.is_floating_point():
            torch.testing.assert_close(theirs.cpu(), ours, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(theirs.cpu(), ours)
