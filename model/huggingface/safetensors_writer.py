"""Write safetensors files tensor by tensor: no more than one is in memory.

The safetensors package writes a file from tensors that are all in memory. The format is 8 bytes with the header's length, the
header in JSON with each tensor's type, shape and place, and the tensors' bytes one after the other.
Source: the safetensors format, version 0.5 and later.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from visionloom.model.huggingface.shapes import Shape

DTYPES: Final = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Types that are read and written, by their names in the format."""
NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}
ALIGNMENT: Final = 8
"""Bytes: the header ends at a multiple of it, as the format asks."""


def write_safetensors(
    path: Path,
    planned: Mapping[str, tuple[Shape, torch.dtype]],
    tensors: Iterable[tuple[str, Tensor]],
) -> None:
    """Write a file.

    Args:
        path: of the file.
        planned: shape and type of every tensor, in the order of the file; wider types first, so that all are aligned.
        tensors: the same names in the same order, each with a tensor of that shape and of any type.

    Raises:
        ValueError: if a tensor is not the one that is planned.
    """
    waiting = iter(planned.items())
    with path.open("wb") as file:
        file.write(header_of(planned))
        for name, tensor in tensors:
            expected, (shape, dtype) = next(waiting)
            if name != expected or tuple(tensor.shape) != shape:
                came = f"{name} {list(tensor.shape)}"
                raise ValueError(f"{came} came where {expected} {list(shape)} was planned")

            for part in bytes_of(tensor, dtype):
                file.write(part)
    if (left := next(waiting, None)) is not None:
        raise ValueError(f"{left[0]} was planned and never came")


def bytes_of(tensor: Tensor, dtype: torch.dtype) -> Iterator[memoryview]:
    """Yield the bytes of a tensor in a type, in the order of the file."""
    # A stack of experts that is transposed becomes contiguous one expert at a time: no copy of the whole.
    for part in tensor if tensor.dim() == 3 else (tensor,):
        values = part.to(dtype).contiguous().flatten()
        # Bytes, because numpy has no bf16.
        yield memoryview(values.view(torch.uint8).numpy())


def header_of(planned: Mapping[str, tuple[Shape, torch.dtype]]) -> bytes:
    """Return the bytes of a file before its first tensor: the header's length, 8 bytes, and the header."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in planned.items():
        begin = end
        end += math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
