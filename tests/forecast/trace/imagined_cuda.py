"""A CUDA device that is not there: tensors that say `cuda` and have no content, by torch's FakeTensorMode.

torch itself refuses operations with tensors of host and device, and products whose rows are not aligned, as on a GPU. What the
host computes is computed; what it reads of the device is counted and answered, as by the recorder of a forecast.

The backward pass asks the driver for devices: a process that runs one is started with the library made of imagined_cuda.c
(`environment`).
"""

import contextlib
import ctypes
import os
import subprocess
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._pytree import tree_leaves

from visionloom.forecast.trace.imagined import ImaginedRecorder
from visionloom.forecast.trace.operations import Call, tensors_in
from visionloom.forecast.trace.step import imagining
from visionloom.forecast.trace.values import Routing, StatedValues

CUDA = torch.device("cuda", 0)
LIBRARY = "libcuda.so.1"
SOURCE = Path(__file__).with_suffix(".c")
MOST_DEVICES = 127
UNPINNED = "copy to or from memory that is not pinned"
TORCH_KERNELS = {
    "visionloom::attention",
    "visionloom::attention_backward",
    "visionloom::add_product_",
}
"""Operations of ours that are kernels of torch on a GPU: their code for it runs here too. The others are Triton's."""


def environment(folder: Path) -> dict[str, str]:
    """The variables of a process that imagines CUDA; compiles the library into `folder`."""
    library = folder / LIBRARY
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, SOURCE], check=True)
    preloaded = {"LD_PRELOAD": str(library), "LD_LIBRARY_PATH": str(folder)}
    return {**os.environ, **preloaded, "OMP_NUM_THREADS": "1"}


class CudaRecorder(ImaginedRecorder):
    """Records a rank on imagined CUDA; what a GPU refuses is an error here."""

    def __init__(self, values: StatedValues) -> None:
        super().__init__(values)
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.pinned: set[int] = set()

    def holds(self, tensor: Tensor) -> bool:
        """Return whether a tensor is on the imagined device."""
        return isinstance(tensor, FakeTensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # The question for a tensor's device.
        if func.namespace == "prim":
            return func(*args, **(kwargs or {}))
        # Values of the host are computed, and kept as they are.
        with unset_fake_temporarily():
            return super().__torch_dispatch__(func, types, args, kwargs)

    def operation(self, call: Call, inputs: list[Tensor], hosts: list[Tensor]) -> Any:
        """Run an operation; a copy to or from memory that is not pinned is a wait, whatever it is asked for."""
        comes = call.name in ("aten::_to_copy", "aten::copy_") and self._runs_there(call)
        unpinned = [x for x in hosts if x.untyped_storage()._cdata not in self.pinned]
        if comes and unpinned and not call.blocks:
            self.wait(UNPINNED)
        return super().operation(call, inputs, hosts)

    def shaped(self, call: Call) -> Any:
        """Run an operation on the device without content, or one of the host as it is."""
        if not self._runs_there(call):
            return call.run()
        with self.fake:
            result = call.run()
        # In fp32 attention is another kernel, whose sums are padded: for tests alone.
        if call.name in TORCH_KERNELS and call.args[1].dtype == torch.bfloat16:
            self._check_kernel(call, result)
        return result

    def all_there(self, call: Call) -> Call:
        """Leave a call with tensors of the host as it is: torch refuses it."""
        return call

    def _check_kernel(self, call: Call, result: Any) -> None:
        """Fail if the function that calls torch's kernel on a GPU has results of other shapes than stated on `meta`."""
        with self.fake:
            made = call.func._op_dk(torch._C.DispatchKey.CUDA, *call.args, **call.kwargs)
        for own, stated in zip(tensors_in((made,)), tensors_in((result,)), strict=True):
            assert own.dtype == stated.dtype, call.name
            assert own.shape == stated.shape, call.name
            assert own.stride() == stated.stride(), call.name

    def _runs_there(self, call: Call) -> bool:
        leaves = tree_leaves((call.args, call.kwargs))
        return any(isinstance(x, FakeTensor) or x == CUDA for x in leaves)

    @contextlib.contextmanager
    def pinning(self) -> Iterator[None]:
        """Remember which tensors of the host are asked to be pinned, for which a driver would be needed."""
        empty = torch.empty

        def make(*arguments: Any, **options: Any) -> Tensor:
            made = empty(*arguments, **options)
            return self._pin(made) if options.get("pin_memory") else made

        def copy(tensor: Tensor) -> Tensor:
            return self._pin(tensor.clone())

        makes = mock.patch.object(torch, "empty", make)
        with makes, mock.patch.object(Tensor, "pin_memory", copy):
            yield

    def _pin(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self.pinned.add(storage._cdata)
        weakref.finalize(storage, self.pinned.discard, storage._cdata)
        return tensor


class _Engine:
    """torch's engine of backward passes, which looks for contexts of devices: there are some while it runs."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._devices = ctypes.c_int.in_dll(ctypes.CDLL(LIBRARY), "pretended_devices")

    def run_backward(self, *arguments: Any, **options: Any) -> Any:
        before, self._devices.value = self._devices.value, MOST_DEVICES
        try:
            return self._inner.run_backward(*arguments, **options)
        finally:
            self._devices.value = before

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def converted(module: nn.Module, function: Any, recurse: bool = True) -> nn.Module:
    """Convert a module's tensors: torch's own `Module._apply` cannot give a parameter without content another dtype."""
    for each in module.modules():
        for name, parameter in each._parameters.items():
            if parameter is None:
                continue
            new = nn.Parameter(function(parameter.detach()), parameter.requires_grad)
            new.__dict__.update(parameter.__dict__)
            each._parameters[name] = new
        for name, buffer in each._buffers.items():
            if buffer is not None:
                each._buffers[name] = function(buffer)
    return module


def gathered_alike(objects: list[Any], item: Any, group: Any = None) -> None:
    """Gather an object from ranks that all have the same: pickled, it would be a tensor that needs its content."""
    objects[:] = [item] * len(objects)


@contextlib.contextmanager
def imagined_cuda(routing: Routing | None = None) -> Iterator[CudaRecorder]:
    """Record a rank on imagined CUDA inside."""
    recorder = CudaRecorder(StatedValues(routing or Routing()))
    variable: Any = torch.autograd.Variable
    engine = mock.patch.object(variable, "_execution_engine", _Engine(variable._execution_engine))
    # One thread: modes are those of the thread that runs an operation.
    threads = torch.autograd.set_multithreading_enabled(False)
    converting = mock.patch.object(nn.Module, "_apply", converted)
    # Not even while devices are pretended.
    absent = mock.patch.object(torch.cuda, "is_available", lambda: False)
    gathering = mock.patch.object(torch.distributed, "all_gather_object", gathered_alike)
    with (
        engine,
        recorder.pinning(),
        converting,
        gathering,
        absent,
        threads,
        recorder.fake,
        imagining(recorder),
    ):
        yield recorder
