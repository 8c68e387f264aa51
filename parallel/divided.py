"""Parameters that DeepSpeed has divided among the data ranks: each has a stretch of the flattened parameter, and none has it whole.

DeepSpeed marks such a parameter with attributes that begin with `ds_`. Its own shape is empty until a layer that needs it is called.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from visionloom.parallel.on_disk import is_on_disk, numbers_on_disk, read_in


def is_divided(parameter: Any) -> bool:
    """Return whether no rank has a parameter whole."""
    return hasattr(parameter, "ds_tensor")


def shape_of(parameter: Any) -> torch.Size:
    """Return the shape that a parameter has on this rank where it is whole."""
    shape: torch.Size = parameter.ds_shape if is_divided(parameter) else parameter.shape
    return shape


def own_numbers(parameter: Any) -> tuple[int, Tensor]:
    """Return what this rank holds of a flattened parameter: the place of its first number, and the numbers [n].

    They are the parameter's own memory; those of the last ranks may be none.
    """
    if not is_divided(parameter):
        return 0, parameter.detach().flatten()
    size = parameter.partition_numel()
    begin = min(size * parameter.ds_zero_partition_rank, parameter.ds_numel)
    # What is beyond the parameter's end is undefined.
    numbers = numbers_on_disk(parameter) if is_on_disk(parameter) else parameter.ds_tensor
    return begin, numbers[: min(size, parameter.ds_numel - begin)]


@contextmanager
def written(parameter: Any) -> Iterator[None]:
    """Have a parameter whole inside, for all of it to be written: a divided one has undefined numbers there.

    All data ranks write the same, and each keeps its stretch: they need not speak with each other.
    """
    if not is_divided(parameter):
        yield
        return
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    parameter.data = torch.empty(parameter.ds_shape, dtype=parameter.dtype, device=parameter.device)
    parameter.ds_status = ZeroParamStatus.AVAILABLE
    yield
    read_in(parameter)
    parameter.partition(has_been_updated=True)


@contextmanager
def with_shapes(parameters: Iterable[Any]) -> Iterator[None]:
    """Have divided parameters with their shapes inside, for names and places in full tensors; their numbers are undefined."""
    divided = [each for each in parameters if is_divided(each)]
    # All of them in the same place, which nobody touches: the system gives memory to what is written only.
    longest = max((each.ds_numel for each in divided), default=0)
    devices = [each.device for each in divided]
    for each in divided:
        room = torch.empty(longest, dtype=each.dtype, device="cpu")
        each.data = room[: each.ds_numel].view(each.ds_shape)
    yield
    for each, device in zip(divided, devices, strict=True):
        each.data = torch.empty(0, dtype=each.dtype, device=device)
