"""Safetensors files written tensor by tensor: no more than one is in memory.

The safetensors package writes a file from tensors that are all in memory. The format is 8 bytes with the header's length, the
header in JSON with each tensor's type, shape and place, and the tensors' bytes one after the other.
Source: the safetensors format, version 0.5 and later.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from visionloom.model.huggingface.shapes import Shape

NAMES: Final = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
ALIGNMENT: Final = 8


def write_safetensors(
    path: Path,
    planned: Mapping[str, tuple[Shape, torch.dtype]],
    tensors: Iterable[tuple[str, Tensor]],
) -> None:
    """Write a file.

    Args:
        path: of the file.
        planned: shape and type of every tensor, in the order of the file; wider types first, so that all lie aligned.
        tensors: the same names in the same order, each with a tensor of that shape and of any type.

    Raises:
        ValueError: if a tensor is not the one that is planned.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in planned.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    waiting = iter(planned.items())
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors:
            expected, (shape, dtype) = next(waiting)
            if name != expected or tuple(tensor.shape) != shape:
                raise ValueError(
                    f"{name} {list(tensor.shape)} came where {expected} {list(shape)} was planned"
                )
            # A stack of experts that lies the other way round is turned one expert at a time.
            for part in tensor if tensor.dim() == 3 else (tensor,):
                file.write(
                    memoryview(part.to(dtype).contiguous().flatten().view(torch.uint8).numpy())
                )
    if (left := next(waiting, None)) is not None:
        raise ValueError(f"{left[0]} was planned and never came")
