"""Sorting and moving a mixture's rows. References: a loop over rows, torch's autograd; the plain twins for the kernels."""

import pytest
import torch
from torch import Tensor

from visionloom.model.kernels import permute
from visionloom.model.kernels.permute import (
    block_of,
    combine_rows,
    count_rows,
    keep_first,
    permute_rows,
    sort_rows,
)
from visionloom.tests.model.kernels.triton_process import compiled, compiling, interpreted

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


def test_a_key_is_kept_where_it_comes_first() -> None:
    keys = torch.randint(0, 4, (50, 5), generator=torch.Generator().manual_seed(1)).int()
    expected = [
        [9 if key in row[:slot] else key for slot, key in enumerate(row)] for row in keys.tolist()
    ]
    assert keep_first(keys, 9).tolist() == expected


def sorted_rows() -> tuple[Tensor, Tensor]:
    """The order of the slots and the places of all; those of the last expert have no row."""
    experts = CHOICES["any"].int()
    order, places, totals, _ = sort_rows(experts, count_rows(experts, EXPERTS))
    assert int(totals[-1]) > 0
    return order[: len(order) - int(totals[-1])], places


def sums_of(y: Tensor, places: Tensor) -> Tensor:
    """The sum of each token's rows, by zeros where a slot has none."""
    rows = torch.cat([y, y.new_zeros(1, y.shape[1])])
    return rows[places.long().clamp_max(len(y))].sum(1)


def test_moving_and_adding_are_each_others_gradients() -> None:
    order, places = sorted_rows()
    x, y = (torch.randn(len(x), 5, dtype=torch.float64) for x in (places, order))
    moved, added = x.clone().requires_grad_(), y.clone().requires_grad_()
    rows = permute_rows(moved, order, places)
    sums = combine_rows(added, order, places)
    assert torch.equal(rows, x[order // 3])
    torch.testing.assert_close(sums, sums_of(y, places), rtol=1e-6, atol=1e-6)
    (rows * y).sum().backward()
    (sums * x).sum().backward()
    torch.testing.assert_close(moved.grad, sums_of(y, places), rtol=1e-6, atol=1e-6)
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
        own = permute_triton.keep_first(experts // 2, 9)
        assert torch.equal(own, permute._keep_first(experts // 2, 9))

    order, places = sorted_rows()
    sizes = ((torch.float32, 1), (torch.float32, 8), (torch.bfloat16, 33), (torch.float32, 2100))
    numbers = torch.randint(0, 128, (len(places), 8), dtype=torch.int32)
    assert torch.equal(
        permute_triton.permute_rows(numbers, order, 3), permute._permute(numbers, order, 3)
    )
    for dtype, width in sizes:
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

    tables = ("experts", "keys", "counts", "order", "places", "totals", "ends")
    numbers = ("rows", "blocks", "tokens", "width", "other")
    types = dict.fromkeys(tables, "*i32") | dict.fromkeys(numbers, "i32")
    types |= {"x": "*bf16", "result": "*bf16"}
    chunk = kernels._chunk(128)
    sorts = {"COUNT": 128, "BLOCK": 256, "CHUNK": chunk, "COLUMNS": 128}
    moves = {"EACH": 8, "ROWS": 1, "COLUMNS": 2048}
    for gpu in (80, 90, 100):
        assert compiled(kernels._count, types, sorts, gpu).spilled == 0
        assert compiled(kernels._sort, types, sorts, gpu).spilled == 0
        firsts = types | {"result": "*i32"}
        assert compiled(kernels._keep_first, firsts, {"EACH": 8, "BLOCK": 256}, gpu).spilled == 0
        assert compiled(kernels._permute, types, moves, gpu).spilled == 0
        numbers = types | {"x": "*i32", "result": "*i32"}
        narrow = {"EACH": 8, "ROWS": 256, "COLUMNS": 8}
        assert compiled(kernels._permute, numbers, narrow, gpu).spilled == 0
        assert compiled(kernels._combine, types, moves, gpu).spilled == 0


def test_kernels_fit_into_registers() -> None:
    compiling(kernels_fit_into_registers)
