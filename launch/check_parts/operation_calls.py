"""Calls of the operations on random tensors of awkward sizes, for comparisons of one implementation with another."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from visionloom.model.kernels import activation, norm, rotary  # noqa: F401  they define their operations

ROWS = (0, 1, 7)
MANY_ROWS = 1000
"""Of the narrowest norm, whose programs take several rows at a time."""
DTYPES = (torch.float32, torch.bfloat16)
HEADS = {"text": (2, 4, 1, 128), "vision": (1, 3, 3, 72)}
"""Groups, query and key heads of a group, head dim."""

OperationCall = tuple[str, str, str, list[Any]]
"""A name, the module without `_triton`, the operation, and its arguments."""


class Draw:
    """Random tensors of one dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        """Return normal numbers of the dtype."""
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def wide(self, *shape: int) -> Tensor:
        """Return them in fp32, whatever the dtype."""
        return torch.randn(shape, generator=self.generator)


def norm_calls(
    draw: Draw, rows: int, widths: tuple[int, ...] = (72, 128, 2560)
) -> Iterator[tuple[str, str, list[Any]]]:
    """Yield RMSNorm and LayerNorm of three widths, one of them a view with gaps between its rows."""
    for width in widths:
        weight, gradient, residual = draw(width), draw(rows, width), draw(rows, width)
        x = draw(rows, width + 8)[:, 4:-4] if width == 128 else draw(rows, width)
        deviation = draw.wide(rows, 1).abs()
        yield f"{width}", "rms_norm", [x, weight, 1e-6]
        for name, passing in (("alone", None), ("with residual", residual)):
            arguments = [gradient, x, deviation, weight, passing]
            yield f"{width} {name}", "rms_norm_backward", arguments

        bias, mean = draw(width), x.float().mean(-1, keepdim=True)
        yield f"{width}", "layer_norm", [x, weight, bias, 1e-6]
        saved = [x, mean, deviation, weight, bias]
        yield f"{width}", "layer_norm_backward", [gradient, *saved]


def rotary_calls(draw: Draw, rows: int) -> Iterator[tuple[str, str, list[Any]]]:
    """Yield heads out of a joined tensor, whose values are a view of it."""
    for name, (groups, queries, keys, dim) in HEADS.items():
        joined = draw(rows, groups, queries + 2 * keys, dim)
        heads, value = joined.split((queries + keys, keys), dim=2)
        rotation, weights = draw.wide(rows, dim), [draw(dim), draw(dim)]
        yield f"{name} norm", "rotate_heads", [heads, rotation, weights, keys, 1e-6]
        yield name, "rotate_heads", [heads, rotation, [], keys, 0.0]

        deviation = draw.wide(rows, groups, queries + keys).abs()
        gradients = [draw(rows, groups * queries, dim), draw(rows, groups * keys, dim)]
        gradients.append(value.flatten(1, 2))
        saved = [heads, deviation, *weights]
        yield f"{name} norm", "rotate_heads_backward", [gradients, rotation, saved, groups]
        yield name, "rotate_heads_backward", [gradients, rotation, [], groups]


def activation_calls(draw: Draw, rows: int) -> Iterator[tuple[str, str, list[Any]]]:
    """Yield SwiGLU of two widths, one of them more than a program takes at a time."""
    for width in (72, 1280):
        gate_up, gradient = draw(rows, 2 * width), draw(rows, width)
        for name, weights in (("plain", None), ("weighted", draw.wide(rows))):
            yield f"{width} {name}", "swiglu", [gate_up, weights]
            yield f"{width} {name}", "swiglu_backward", [gradient, gate_up, weights]


def calls() -> Iterator[OperationCall]:
    """Yield all of them."""
    makers = {"norm": norm_calls, "rotary": rotary_calls, "activation": activation_calls}
    for dtype in DTYPES:
        kind = str(dtype).removeprefix("torch.")
        # Programs of the narrowest norm take several rows at a time.
        for name, operation, arguments in norm_calls(Draw(dtype), MANY_ROWS, (72,)):
            yield f"{operation} {name} {kind} {MANY_ROWS}", "norm", operation, arguments
        for rows in ROWS:
            for module, maker in makers.items():
                for name, operation, arguments in maker(Draw(dtype), rows):
                    yield f"{operation} {name} {kind} {rows}", module, operation, arguments


def tensors_of(result: Any) -> tuple[Tensor, ...]:
    """Return the tensors that an operation returns."""
    return (result,) if isinstance(result, Tensor) else tuple(result)


def error(result: Any, expected: Any) -> float:
    """Return the largest difference in any of the results, relative to its largest value; infinite where shapes or dtypes differ."""
    worst = 0.0
    for own, other in zip(tensors_of(result), tensors_of(expected), strict=True):
        if own.shape != other.shape or own.dtype != other.dtype or own.stride() != other.stride():
            return float("inf")
        if own.numel():
            difference = (own.float() - other.float()).abs().max()
            worst = max(worst, float(difference / other.float().abs().max().clamp_min(1e-6)))
    return worst
