"""Attention inside segments against the formula, one query and one segment after the other, in fp64.

On a GPU (`--device cuda`) the kernels are FlashAttention in bf16, and torch's efficient one in fp32.
"""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from visionloom.model.kernels.attention import Segments, attend

TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1.5e-2}
"""Largest error relative to the largest number of the result. bf16 has 8 bits: 0.4 % a rounding, of which there are several."""


@dataclass(frozen=True)
class Case:
    """Segments, heads and head dim."""

    queries: tuple[int, ...]
    keys: tuple[int, ...] | None = None
    """None: each segment sees itself."""
    heads: int = 4
    groups: int = 4
    dim: int = 64
    causal: bool = True


CASES = {
    "one": Case((37,)),
    "equal": Case((16, 16, 16)),
    "unequal": Case((5, 1, 64, 5, 23)),
    "empty ones": Case((0, 5, 0, 7)),
    "a pack": Case((300, 84, 128), heads=8, groups=2, dim=128),
    "everything visible": Case((9, 130, 9), causal=False),
    "grouped queries": Case((33, 8), heads=8, groups=2, dim=128),
    "vision of 4B": Case((24, 96), dim=64, causal=False),
    "vision of 8B": Case((24, 96, 24), dim=72, causal=False),
    "head dim 80": Case((40,), dim=80),
    "last rows of longer segments": Case((8, 8, 20, 20), (8, 64, 20, 160), heads=8, groups=2),
    "keys without queries": Case((8, 0, 20), (16, 30, 20)),
    "more keys, all visible": Case((3, 8), (16, 30), causal=False),
}


def formula(query: Tensor, key: Tensor, value: Tensor, case: Case) -> Tensor:
    """The definition, in fp64."""
    parts = []
    keys = case.keys or case.queries
    for q, k, v in zip(
        query.double().split(list(case.queries)),
        key.double().split(list(keys)),
        value.double().split(list(keys)),
        strict=True,
    ):
        group = case.heads // case.groups
        scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, 1)) * case.dim**-0.5
        if case.causal:
            # Query i of L sees the keys up to M - L + i.
            seen = torch.arange(len(k), device=q.device) <= (
                torch.arange(len(q), device=q.device)[:, None] + len(k) - len(q)
            )
            scores = scores.masked_fill(~seen, float("-inf"))
        parts.append(
            torch.einsum("hqk,khd->qhd", scores.softmax(-1), v.repeat_interleave(group, 1))
        )
    return torch.cat(parts)


def bounds(lengths: tuple[int, ...]) -> Tensor:
    """Where segments of these lengths begin and end."""
    return torch.tensor([0, *lengths]).cumsum(0)


def error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference relative to the largest number."""
    return float((ours.double() - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_attention_is_the_formula(device: torch.device, name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    if device.type == "cuda" and dtype == torch.float64:
        pytest.skip("no kernel of a GPU computes attention in fp64")
    keys = case.keys or case.queries
    draw = torch.Generator().manual_seed(0)

    def drawn(rows: int, heads: int) -> Tensor:
        values = torch.randn(rows, heads, case.dim, generator=draw, dtype=torch.float64)
        return values.to(device, dtype).requires_grad_()

    query = drawn(sum(case.queries), case.heads)
    key, value = drawn(sum(keys), case.groups), drawn(sum(keys), case.groups)
    segments = Segments.build(
        bounds(case.queries), device, bounds(case.keys) if case.keys else None
    )
    output = attend(query, key, value, segments, causal=case.causal)
    gradient = torch.randn(output.shape, generator=draw, dtype=torch.float64).to(device, dtype)
    made = torch.autograd.grad(output, (query, key, value), gradient)

    expected = formula(query, key, value, case)
    wanted = torch.autograd.grad(expected, (query, key, value), gradient.double())
    assert output.dtype == dtype and output.is_contiguous()
    worst = max(
        error(a, b.detach().double())
        for a, b in zip((output, *made), (expected, *wanted), strict=True)
    )
    assert worst <= TOLERANCES[dtype]


def test_parts_of_a_joined_tensor_are_taken(device: torch.device) -> None:
    """Query, key and value are views of one product in the model; no copy of them may be needed."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    joined = torch.randn(40, 3, 4, 72, device=device, dtype=dtype)
    segments = Segments.build(bounds((16, 24)), device)
    query, key, value = joined.unbind(1)
    whole = attend(query.contiguous(), key.contiguous(), value.contiguous(), segments, causal=False)
    assert torch.equal(attend(query, key, value, segments, causal=False), whole)


def test_neighbours_do_not_matter(device: torch.device) -> None:
    """The control: other keys in another segment leave the bits of this one; other keys in this one do not."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    query, key, value = (torch.randn(40, 4, 64, device=device, dtype=dtype) for _ in range(3))
    segments = Segments.build(bounds((16, 24)), device)
    before = attend(query, key, value, segments, causal=True)
    changed = key.clone()
    changed[20] += 1
    after = attend(query, changed, value, segments, causal=True)
    assert torch.equal(before[:20], after[:20])
    assert not torch.equal(before[20:], after[20:])
