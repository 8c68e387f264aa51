"""Define operations that are one kernel on a GPU, so that a trace on any device sees what a GPU runs.

Each has three implementations: Triton or torch's own kernel on CUDA; plain torch on a CPU, whose results are the reference;
and the shapes alone on torch's `meta` device. torch's dispatch modes see one operation with its inputs and outputs and
nothing of what it is made of, so launches, bytes and saved tensors of a trace are a GPU's everywhere. Gradients are the
business of the torch.autograd.Function that calls an operation and the operation of its backward pass.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch

from visionloom.common.errors import UserError

_LIBRARY = torch.library.Library("visionloom", "DEF")


def define(
    schema: str,
    *,
    cpu: Callable[..., Any],
    cuda: Callable[..., Any],
    meta: Callable[..., Any],
) -> Any:
    """Define an operation and return it, to be called with positional arguments.

    Args:
        schema: in torch's words, such as `swiglu(Tensor gate_up) -> Tensor`; no result may be an input or a view of one.
        cpu: computes it by plain torch.
        cuda: computes it by one kernel; imports Triton when it is called, which other machines may lack.
        meta: returns empty tensors of the results' shapes, strides and dtypes.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema)
    for key, function in (("CPU", cpu), ("CUDA", cuda), ("Meta", meta)):
        _LIBRARY.impl(name, function, key)
    return getattr(torch.ops.visionloom, name).default


KERNELS = "visionloom.model.kernels"


def in_triton(module: str, function: str, package: str = KERNELS) -> Callable[..., Any]:
    """Return a function of a module of `package` that imports Triton, which is imported with the first call.

    Raises, when called:
        UserError: if Triton is not installed.
    """

    def call(*args: Any) -> Any:
        try:
            loaded = importlib.import_module(f"{package}.{module}")
        except ModuleNotFoundError as error:
            if error.name != "triton":
                raise
            raise UserError(
                "training on a GPU needs Triton, which torch for CUDA brings:"
                f" install it by `pip install triton` for torch {torch.__version__}"
            ) from error
        return getattr(loaded, function)(*args)

    return call
