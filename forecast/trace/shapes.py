"""Run operations on torch's meta device by their shapes: layers are alike, so each kind of operation is worked out once.

Most operations have their meta kernel in Python, 50 to 100 microseconds a call. A step of a rank has 50,000 of them and only
some hundreds of kinds.
"""

from typing import Any

import torch
from torch import Tensor

from visionloom.forecast.trace.operations import Call
from visionloom.parallel.stand_in import META

RESHAPES_ITSELF = {
    "aten::set_",
    "aten::resize_",
    "aten::as_strided_",
    "aten::detach_",
    "aten::squeeze_",
    "aten::t_",
    "aten::transpose_",
    "aten::unsqueeze_",
}
"""Operations in place that change the tensor itself, and not its content."""

TensorLayout = tuple[torch.Size, tuple[int, ...], torch.dtype]
"""Shape, strides and dtype of a new tensor."""


class ShapeRules:
    """The results of operations by the shapes of what they take."""

    def __init__(self) -> None:
        self._results: dict[Any, tuple[TensorLayout, ...] | None] = {}
        """Layouts of the tensors that an operation makes; None where it returns its first input."""

    def run(self, call: Call) -> Any:
        """Return the result of an operation on the meta device."""
        kind = call.kind
        if kind.is_view or call.func.namespace != "aten" or kind.name in RESHAPES_ITSELF:
            return call.run()
        named = tuple(sorted(call.kwargs.items()))
        key = (call.func, described(call.args), described(named))
        try:
            known = key in self._results
        except TypeError:
            # A number that is worked out symbolically, or the like.
            return call.run()
        if known:
            return self._repeat(call, self._results[key])
        result = call.run()
        self._learn(key, call, result)
        return result

    def _repeat(self, call: Call, layouts: tuple[TensorLayout, ...] | None) -> Any:
        if layouts is None:
            return call.args[0]
        made = [
            torch.empty_strided(shape, stride, dtype=dtype, device=META)
            for shape, stride, dtype in layouts
        ]
        return made[0] if len(made) == 1 else tuple(made)

    def _learn(self, key: Any, call: Call, result: Any) -> None:
        """Keep what an operation returned, if it is its first input or one or several new tensors."""
        if call.kind.writes:
            if call.args and result is call.args[0]:
                self._results[key] = None
            return
        made = result if isinstance(result, tuple) else (result,)
        if made and all(isinstance(each, Tensor) and each.is_meta for each in made):
            self._results[key] = tuple((each.shape, each.stride(), each.dtype) for each in made)


def described(value: Any) -> Any:
    """Return an argument as a key: tensors by their layout, lists by their items."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device.type
    if isinstance(value, list | tuple):
        return tuple(map(described, value))
    # 1, 1.0 and True are equal, and give results of other dtypes.
    return type(value), value
