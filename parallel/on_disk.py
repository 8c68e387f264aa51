"""Numbers that DeepSpeed keeps in files of a fast disk, as memory that can be read and written in place."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visionloom.common.errors import UserError


def is_on_disk(parameter: Any) -> bool:
    """Return whether this rank's stretch of a parameter is in a file: small ones stay in host memory."""
    has_files = getattr(parameter, "nvme_swapper", None) is not None
    return has_files and bool(parameter.ds_tensor.final_location == "nvme")


def numbers_on_disk(parameter: Any) -> Tensor:
    """Return this rank's stretch of a parameter, [partition_numel]; what is beyond the parameter's end is undefined."""
    path = parameter.nvme_swapper.get_path(parameter, must_exist=True)
    return mapped(path, parameter.partition_numel(), parameter.dtype)


def mapped(path: str, count: int, dtype: torch.dtype) -> Tensor:
    """Return the numbers of a file, [count], which are read when they are used; what is written into them is written to the file.

    DeepSpeed reads and writes around the system's cache, and the system brings the two together.

    Raises:
        UserError: if the file is too short: DeepSpeed does not look whether the disk has taken what it wrote.
    """
    if Path(path).stat().st_size < count * dtype.itemsize:
        raise UserError(
            f"{path} was not written whole: make room there, or name another parallel.zero.nvme_path"
        )
    return torch.from_file(path, shared=True, size=count, dtype=dtype)


def read_in(parameter: Any) -> None:
    """Give a parameter that is on disk one of DeepSpeed's buffers, from which `partition` writes it again."""
    if is_on_disk(parameter):
        parameter.nvme_swapper.swap_in([parameter], async_op=False)


def gather(parameters: Sequence[Any]) -> None:
    """Have divided parameters whole on each rank; those on disk one after the other, since there are few buffers."""
    in_memory = []
    for parameter in parameters:
        if is_on_disk(parameter):
            parameter.all_gather([parameter])
            parameter.nvme_swapper.remove_partition_and_release_buffers([parameter])
        else:
            in_memory.append(parameter)
    if in_memory:
        in_memory[0].all_gather(in_memory)
