"""Sorting and moving a mixture's rows. References: a loop over rows, torch's autograd; the plain twins for the kernels."""

import pytest
import torch
from torch import Tensor

from visionloom.model.kernels import permute
from visionloom.model.kernels.permute import (
    block_of,
    combine_rows,
    count_rows,
    permute_rows,
    sort_chunks,
    sort_rows,
)
from visionloom.tests.model.kernels.triton_process import compiling, interpreted, stack_bytes

EXPERTS = 7
CHOICES = {
    "any": torch.rand(300, EXPERTS, generator=torch.Generator().manual_seed(0)).topk(3).indices,
    "one expert has all": torch.full((11, 1), 4),
    "an expert has none": torch.tensor([[0, 6], [6, 2], [2, 0]]),
    "no token": torch.zeros(0, 2, dtype=torch.int64),
}


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_rows_are_sorted_by_expert_and_number(choice: Tensor) -> None:
    experts = choice.int()
    order, places, totals, ends = sort_rows(experts, count_rows(experts, EXPERTS))
    flat = experts.flatten().tolist()
    expected = sorted(range(len(flat)), key=lambda row: (flat[row], row))
    assert order.tolist() == expected
    assert [places.flatten().tolist()[row] for row in expected] == list(range(len(flat)))
    assert totals.tolist() == [flat.count(expert) for expert in range(EXPERTS)]
    assert ends.tolist() == totals.cumsum(0).tolist()


def test_blocks_are_few_and_hold_all() -> None:
    assert [block_of(rows) for rows in (0, 256 * 512, 256 * 512 + 1)] == [256, 256, 512]


@pytest.mark.parametrize("shape", [(1, 2, 4), (2, 3, 5), (1, 4, 1)])
def test_received_rows_are_sorted_by_expert_and_source(shape: tuple[int, int, int]) -> None:
    counts = torch.randint(0, 4, shape, generator=torch.Generator().manual_seed(1)).int()
    counts[0, 0, 0] = 0
    flat = counts.flatten().tolist()
    experts = [chunk % shape[2] for chunk, length in enumerate(flat) for _ in range(length)]
    expected = sorted(range(len(experts)), key=lambda row: (experts[row], row))
    order, places, ends = sort_chunks(counts, len(experts))
    assert order.tolist() == expected
    assert places.flatten()[order].tolist() == list(range(len(experts)))
    assert ends.tolist() == [sum(e <= expert for e in experts) for expert in range(shape[2])]


def sorted_rows() -> tuple[Tensor, Tensor]:
    experts = CHOICES["any"].int()
    order, places, *_ = sort_rows(experts, count_rows(experts, EXPERTS))
    return order, places


def test_moving_and_adding_are_each_others_gradients() -> None:
    order, places = sorted_rows()
    x, y = (torch.randn(len(x), 5, dtype=torch.float64) for x in (places, order))
    moved, added = x.clone().requires_grad_(), y.clone().requires_grad_()
    rows = permute_rows(moved, order, places)
    sums = combine_rows(added, order, places)
    assert torch.equal(rows, x[order // 3])
    torch.testing.assert_close(sums, y[places.long()].sum(1), rtol=1e-6, atol=1e-6)
    (rows * y).sum().backward()
    (sums * x).sum().backward()
    torch.testing.assert_close(moved.grad, y[places.long()].sum(1), rtol=1e-6, atol=1e-6)
    assert added.grad is not None
    assert torch.equal(added.grad, x[order // 3])


def test_what_nobody_reads_passes_gradients() -> None:
    order, places = sorted_rows()
    added = torch.randn(len(order), 5).requires_grad_()
    combine_rows(added, order, places, read=False).backward(torch.ones(len(places), 5))
    assert added.grad is not None
    assert torch.equal(added.grad, torch.ones_like(added))


def kernels_equal_their_twins() -> None:
    """In a process where Triton is interpreted."""
    from visionloom.model.kernels import permute_triton

    for choice in CHOICES.values():
        experts = choice.int()
        counts = permute_triton.count_rows(experts, EXPERTS)
        assert torch.equal(counts, permute._count(experts, EXPERTS))
        twin = permute._sort(experts, counts)
        for own, other in zip(permute_triton.sort_rows(experts, counts), twin, strict=True):
            assert torch.equal(own, other)
    for shape in ((1, 2, 4), (2, 3, 5), (1, 1, 1)):
        # As the dispatch gives it: the ranks of the tensor axis are next to each other.
        counts = torch.randint(0, 4, shape).int().transpose(0, 1).contiguous().transpose(0, 1)
        rows = int(counts.sum())
        chunks = permute._sort_chunks(counts, rows)
        for own, other in zip(permute_triton.sort_chunks(counts, rows), chunks, strict=True):
            assert torch.equal(own, other)

    order, places = sorted_rows()
    for dtype, width in ((torch.float32, 1), (torch.bfloat16, 33), (torch.float32, 2100)):
        x, y = (torch.randn(len(x), width).to(dtype) for x in (places, order))
        assert torch.equal(permute_triton.permute_rows(x, order, 3), permute._permute(x, order, 3))
        own, other = permute_triton.combine_rows(y, places), permute._combine(y, places)
        # The interpreter cuts bf16 off where a GPU rounds.
        torch.testing.assert_close(own, other, rtol=0.0 if width != 33 else 2**-7, atol=0.0)


def test_kernels_equal_their_twins() -> None:
    interpreted(kernels_equal_their_twins)


def kernels_fit_into_registers() -> None:
    """In a process where Triton compiles; sizes of the published mixtures."""
    from visionloom.model.kernels import permute_triton as kernels

    tables = ("experts", "counts", "order", "places", "totals", "ends")
    numbers = ("rows", "blocks", "tokens", "width", "by_tensor", "by_rank")
    types = dict.fromkeys(tables, "*i32") | dict.fromkeys(numbers, "i32")
    types |= {"x": "*bf16", "result": "*bf16"}
    chunk = kernels._chunk(128)
    sorts = {"COUNT": 128, "BLOCK": 256, "CHUNK": chunk, "COLUMNS": 128}
    chunks = {"RANKS": 8, "SOURCES": 8, "EXPERTS": 16, "ROWS": chunk, "CHUNKS": 128}
    moves = {"EACH": 8, "ROWS": 1, "COLUMNS": 2048}
    for gpu in (80, 90, 100):
        assert stack_bytes(kernels._count, types, sorts, gpu) == 0
        assert stack_bytes(kernels._sort, types, sorts, gpu) == 0
        assert stack_bytes(kernels._sort_chunks, types, chunks, gpu) == 0
        assert stack_bytes(kernels._permute, types, moves, gpu) == 0
        assert stack_bytes(kernels._combine, types, moves, gpu) == 0


def test_kernels_fit_into_registers() -> None:
    compiling(kernels_fit_into_registers)
