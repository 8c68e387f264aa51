"""AdamW with moments in bf16: the plain twin against torch's AdamW, the Triton kernel against the twin, compiled for absent GPUs."""

from typing import Any

import pytest
import torch
from torch import Tensor

from visionloom.tests.model.kernels.triton_process import compiled, compiling, interpreted
from visionloom.train.optim import moments  # noqa: F401  it defines the operation

FACTORS = [0.9, 0.95, 1e-8, 1.0 - 1e-3 * 0.05, 1e-3 / (1 - 0.9**3), (1 - 0.95**3) ** -0.5]
PLACES: dict[str, list[int]] = {
    "nearest": [],
    "stochastic": [0xDEADBEEF, 70, 64, 256, 5_000_000_000],
}


def drawn(count: int) -> list[Tensor]:
    """Weights, gradient and moments of a stretch."""
    generator = torch.Generator().manual_seed(count)
    weights, gradient, mean, square = (torch.randn(count, generator=generator) for _ in range(4))
    return [weights, gradient, mean.bfloat16(), square.abs().bfloat16()]


def updated(operation: Any, count: int, place: list[int]) -> list[Tensor]:
    tensors = drawn(count)
    operation(*tensors, FACTORS, place)
    return tensors


def test_the_twin_is_torchs_adamw() -> None:
    weights, gradient, mean, square = drawn(1000)
    expected = weights.clone()
    expected.grad = gradient.clone()
    optimizer = torch.optim.AdamW([expected], lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05)
    state = {"exp_avg": mean.float(), "exp_avg_sq": square.float(), "step": torch.tensor(2.0)}
    optimizer.state[expected] = state
    optimizer.step()
    ours = updated(torch.ops.visionloom.adamw_bf16_, 1000, [])
    torch.testing.assert_close(ours[0], expected.data, rtol=1e-6, atol=1e-6)
    assert torch.equal(ours[2], state["exp_avg"].bfloat16())
    torch.testing.assert_close(ours[3], state["exp_avg_sq"].bfloat16(), rtol=2**-7, atol=0)


def kernel_equals_its_twin() -> None:
    """In a process where Triton is interpreted: rounded alike but where fp32 differs in its last bit."""
    from visionloom.train.optim import moments_triton

    for place in PLACES.values():
        for count in (0, 1, 1500):
            ours = updated(moments_triton.adamw_bf16_, count, place)
            theirs = updated(torch.ops.visionloom.adamw_bf16_, count, place)
            torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=1e-6)
            for own, other in zip(ours[2:], theirs[2:], strict=True):
                torch.testing.assert_close(own, other, rtol=2**-7, atol=1e-6)
                # The interpreter rounds to the nearest bf16 in its own way; stochastic rounding leaves it nothing to round.
                assert not place or int((own != other).sum()) <= count // 100


@pytest.mark.parametrize("wrong", [False, True])
def test_places_and_keys_matter(wrong: bool) -> None:
    """The control: another key rounds many numbers otherwise; the same one none."""
    place = PLACES["stochastic"]
    other = [place[0] ^ wrong, *place[1:]]
    ours, theirs = (
        updated(torch.ops.visionloom.adamw_bf16_, 1500, each) for each in (place, other)
    )
    assert (int((ours[2] != theirs[2]).sum()) > 300) == wrong


def test_the_kernel_equals_its_twin() -> None:
    interpreted(kernel_equals_its_twin)


def test_on_meta_nothing_happens() -> None:
    there = [tensor.to("meta") for tensor in drawn(8)]
    assert torch.ops.visionloom.adamw_bf16_(*there, FACTORS, []) is None


def the_kernel_does_not_spill() -> None:
    """In a process where Triton compiles."""
    from visionloom.train.optim import moments_triton

    kernel = moments_triton.adamw_kernel
    types = dict.fromkeys(kernel.arg_names, "fp32")
    types |= {"weights": "*fp32", "gradient": "*fp32", "mean": "*bf16", "square": "*bf16"}
    types |= dict.fromkeys(["key", "begin", "run", "distance", "first"], "i64")
    for stochastic in (False, True):
        # A count that 16 divides, as those of nearly all stretches: Triton compiles a kernel for these.
        sizes = {"count": 1 << 20, "BLOCK": moments_triton.BLOCK, "STOCHASTIC": stochastic}
        for gpu in (80, 90, 100):
            made = compiled(kernel, types, sizes, gpu)
            assert not made.spilled and 0 < made.registers <= 128, (made.spilled, made.registers)
            assert "ld.global.v4.b32" in made.ptx and "st.global.b16" not in made.ptx


def test_the_kernel_compiles_without_spilling() -> None:
    compiling(the_kernel_does_not_spill)
