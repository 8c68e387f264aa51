"""AdamW with moments in bf16, one kernel a stretch: they are read, advanced and used in fp32, and rounded once when they are stored.

Rounding to the nearest loses what a step adds to a mean of squares, 1 - beta2 of it, where that is below half a unit in the
last place. Stochastic rounding goes up or down with probabilities that make the mean right. Its random numbers are a hash of a
number's place in the whole tensor and of a key for the tensor and the step, so no layout and no resumption changes them.
Shapes: a stretch of n numbers.
"""

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from visionloom.model.kernels.library import define, in_triton

FACTORS: Final = (0x7FEB352D, 0x846CA68B)
"""Of the 32-bit hash `lowbias32` (nullprogram.com/blog/2018/07/31), whose output bits are nearly independent."""
WORD: Final = 0xFFFFFFFF


@dataclass(frozen=True)
class TensorPlace:
    """Where the numbers of a stretch are in the whole flattened tensor: runs of the parameter are apart there."""

    begin: int
    """First number of the stretch, in the parameter of this rank."""
    run: int
    """Numbers of the parameter that follow each other in the whole tensor too."""
    distance: int
    """Numbers from the beginning of one run to the next, in the whole tensor."""
    first: int
    """Place of the parameter's first number in the whole tensor."""


def hashed(values: Tensor) -> Tensor:
    """Return a hash of 32-bit numbers, int64 in and out."""
    for shift, factor in zip((16, 15), FACTORS, strict=True):
        values = values ^ (values >> shift)
        values = (values * factor) & WORD
    return values ^ (values >> 16)


def random_bits(count: int, key: int, place: list[int], device: torch.device) -> Tensor:
    """Return 32 random bits for each number of a stretch, int64 [n]."""
    begin, run, distance, first = place
    index = torch.arange(begin, begin + count, device=device)
    whole = index // run * distance + first + index % run
    # Twice, with the key between: else two keys would give the same numbers in another order.
    return hashed(hashed(whole & WORD) ^ key)


def rounded(values: Tensor, bits: Tensor) -> Tensor:
    """Return fp32 values in bf16, rounded away from zero where 16 random bits exceed what is cut off."""
    # What overflows the lower half is one unit in bf16's last place.
    lifted = values.view(torch.int32) + bits.to(torch.int32)
    return (lifted & -65536).view(torch.float32).to(torch.bfloat16)


def _adamw(
    weights: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    factors: list[float],
    place: list[int],
) -> None:
    beta1, beta2, epsilon, kept, rate, root = factors
    new_mean = mean.float() * beta1 + gradient * (1.0 - beta1)
    new_square = square.float() * beta2 + gradient * gradient * (1.0 - beta2)
    weights.mul_(kept).sub_(new_mean / (new_square.sqrt() * root + epsilon) * rate)
    if not place:
        mean.copy_(new_mean)
        square.copy_(new_square)
        return
    key, *where = place
    bits = random_bits(len(weights), key, where, weights.device)
    mean.copy_(rounded(new_mean, bits & 0xFFFF))
    square.copy_(rounded(new_square, bits >> 16))


def _nothing(*_: Any) -> None:
    """Change nothing: tensors on `meta` have no content."""


_ADAMW = define(
    "adamw_bf16_(Tensor(a!) weights, Tensor gradient, Tensor(b!) mean, Tensor(c!) square,"
    " float[] factors, int[] place) -> ()",
    cpu=_adamw,
    cuda=in_triton("moments_triton", "adamw_bf16_", __package__),
    meta=_nothing,
)


def adamw_bf16_(
    weights: Tensor,
    gradient: Tensor,
    moments: list[Tensor],
    factors: list[float],
    place: TensorPlace | None,
    key: int,
) -> None:
    """Update a stretch of weights, fp32 [n], and its moments, bf16 [n].

    Args:
        weights: of a stretch.
        gradient: fp32 [n].
        moments: means of gradients and of their squares.
        factors: beta1, beta2, epsilon, what the decay leaves of a weight, the step size over the first mean's correction, and
            one over the root of the second one's.
        place: of the numbers, None: moments are rounded to the nearest.
        key: of the tensor and the step, 32 bits.
    """
    where: list[int] = []
    if place is not None:
        where = [key, place.begin, place.run, place.distance, place.first]
    mean, square = moments
    _ADAMW(weights, gradient, mean, square, factors, where)
