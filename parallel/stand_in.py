"""A stand-in for torch.cuda, so that Megatron-core's own modules train on a CPU over gloo, or on no device at all.

Megatron-core 0.19 asks torch.cuda for devices, streams and random states also where no GPU is used. `install` replaces
just those names, and only when the run's device is the CPU or torch's `meta`, on which tensors have shapes and no content, or when
tests imagine CUDA on a machine without it; on a GPU this file is never imported. Each replacement below says which part of Megatron-core needs it.
`torch.cuda.is_available()` stays False, so libraries that ask first (transformers among them) are not affected.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._device import _device_constructors

CPU = torch.device("cpu")
META = torch.device("meta")

# Factories that Megatron-core calls with device="cuda": schedules (token counters), optimizer and clip_grads (flags and
# norms), rerun state machine, token dispatcher, checkpoint exchange.
FACTORIES = (
    "empty",
    "empty_like",
    "full",
    "ones",
    "ones_like",
    "rand",
    "randn",
    "tensor",
    "zeros",
    "zeros_like",
    "arange",
)


class StandInStream:
    """A stream or event that has always finished: DDP's buckets and the dispatcher order their copies with them."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __enter__(self) -> "StandInStream":
        return self

    def __exit__(self, *args: object) -> None:
        pass

    def record_event(self, event: object = None) -> "StandInStream":
        """Return an event that has happened."""
        return StandInStream()

    def query(self) -> bool:
        """Return that all work is done."""
        return True

    def elapsed_time(self, end: object) -> float:
        """Return no time, in milliseconds."""
        return 0.0

    def _nothing(self, *args: object, **kwargs: object) -> None:
        pass

    wait_stream = wait_event = synchronize = record = wait = _nothing


@dataclass
class _Choice:
    """The device for which torch.cuda stands."""

    device: torch.device = CPU
    holds: Callable[[torch.Tensor], bool] | None = None
    """Which tensors pass for those of a GPU; None: those on `meta`, if that is the device."""


_chosen = _Choice()


@contextlib.contextmanager
def passing_for_cuda(holds: Callable[[torch.Tensor], bool]) -> Iterator[None]:
    """Let the tensors for which `holds` is true pass for those of a GPU, so that Megatron-core goes a GPU's ways with them."""
    before, _chosen.holds = _chosen.holds, holds
    try:
        yield
    finally:
        _chosen.holds = before


def _passes_for_cuda(tensor: torch.Tensor) -> bool:
    if _chosen.holds is not None:
        return _chosen.holds(tensor)
    return tensor.is_meta and _chosen.device == META


def installed() -> bool:
    """Return whether the stand-in is in place in this process."""
    return getattr(torch.cuda, "visionloom_stand_in", False)


def install(device: torch.device = CPU) -> None:
    """Put the stand-in in place of the parts of torch.cuda that Megatron-core uses; a second call only changes the device.

    Args:
        device: the CPU, `meta`, or CUDA that is imagined.
    """
    _chosen.device = device
    if installed():
        return
    if torch.cuda.is_initialized():
        raise RuntimeError("the CPU stand-in must be installed before CUDA is used in this process")
    import_megatron()
    replace_streams_and_devices()
    replace_random_state()
    replace_factories()
    replace_type_names()
    replace_all_to_all()
    replace_unequal_gather()
    replace_unequal_scatter()
    torch.cuda.visionloom_stand_in = True  # type: ignore[attr-defined]


def import_megatron() -> None:
    """Import Megatron-core without torch's compiler and wandb, which it takes along and which take longer than itself.

    It decorates functions with torch.compile that no run on a CPU calls, and has wandb for timers that no run has.
    """
    any_torch: Any = torch
    compiler, any_torch.compile = torch.compile, lambda function: function
    modules: dict[str, Any] = sys.modules
    # None in this place is a module that is not installed; one that is imported already stays.
    is_hidden = modules.setdefault("wandb", None) is None
    try:
        from megatron.core import jit

        # For its modules that are imported later.
        jit.disable_jit_fuser()
    finally:
        any_torch.compile = compiler
        if is_hidden:
            del modules["wandb"]


def replace_streams_and_devices() -> None:
    """Replace streams and devices: buffers are allocated on `current_device()`; DDP, pipeline and dispatcher wait on streams."""
    cuda: Any = torch.cuda
    cuda.current_device = lambda: _chosen.device
    cuda.set_device = lambda device: None
    cuda.synchronize = lambda device=None: None
    cuda.empty_cache = lambda: None
    cuda.memory_allocated = cuda.max_memory_allocated = lambda device=None: 0
    cuda.Stream = cuda.Event = StandInStream
    cuda.current_stream = cuda.default_stream = lambda device=None: StandInStream()
    cuda.stream = lambda stream: contextlib.nullcontext()
    any_tensor: Any = torch.Tensor
    # Checkpoint exchange and grad-norm code move tensors with .cuda().
    any_tensor.cuda = _on_device
    # The token dispatcher brings counts to the host, and activations are offloaded, only from tensors that are on a GPU.
    is_cuda: Any = torch.Tensor.is_cuda
    any_tensor.is_cuda = property(lambda self: _passes_for_cuda(self) or is_cuda.__get__(self))
    # Memory that a side stream reads is not given away; here there are no streams.
    any_tensor.record_stream = lambda self, stream: None
    any_module: Any = torch.nn.Module
    # A model is made where it stays.
    any_module.cuda = lambda self, device=None: self


def replace_random_state() -> None:
    """Replace random states: tensor_parallel.random keeps those of the GPU's generator by axis (seeding, recompute)."""
    cuda: Any = torch.cuda
    cuda.get_rng_state = lambda device="cuda": torch.get_rng_state()
    cuda.set_rng_state = lambda state, device="cuda": torch.set_rng_state(state)
    cuda.manual_seed = torch.default_generator.manual_seed

    import megatron.core.tensor_parallel.random as tensor_parallel_random

    def get_state(
        device: object = "cuda", clone: bool = False, graph_safe: bool = False
    ) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, device: object = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(state)

    # These two reach into torch.cuda.default_generators and torch._C; recompute restores the state through them.
    module: Any = tensor_parallel_random
    module._get_cuda_rng_state = get_state
    module._set_cuda_rng_state = set_state


def _on_device(tensor: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
    """Return a tensor on the chosen device; one without content stays what it is, as in a model that is only looked at."""
    return tensor if tensor.is_meta else tensor.to(_chosen.device)


def _is_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


def _on_chosen(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _chosen.device
        # For a GPU that is not there.
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return create


def replace_factories() -> None:
    """Replace factories: those of FACTORIES make their tensors on the chosen device where a GPU is named."""
    # `with torch.device(...)` knows the factories by identity and remembers them at first use: let it be the real ones.
    _device_constructors()
    for name in FACTORIES:
        setattr(torch, name, _on_chosen(getattr(torch, name)))


def replace_type_names() -> None:
    """Replace names of types: DistributedOptimizer and clip_grads sort tensors by 'torch.cuda.FloatTensor' and the like."""
    own_type = torch.Tensor.type

    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        name = own_type(self, *args, **kwargs)
        if isinstance(name, str) and not name.startswith("torch.cuda."):
            return name.replace("torch.meta.", "torch.").replace("torch.", "torch.cuda.")
        # A tensor, where a type was asked for.
        return name

    any_tensor: Any = torch.Tensor
    any_tensor.type = type_name


def replace_all_to_all() -> None:
    """Give gloo lists: the alltoall dispatcher turns split sizes into lists only when they are on a GPU."""
    distributed: Any = torch.distributed
    all_to_all_single = distributed.all_to_all_single

    @functools.wraps(all_to_all_single)
    def with_lists(
        output: Any,
        tensor: Any,
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        **kwargs: Any,
    ) -> Any:
        output_sizes, input_sizes = _as_list(output_split_sizes), _as_list(input_split_sizes)
        return all_to_all_single(output, tensor, output_sizes, input_sizes, **kwargs)

    distributed.all_to_all_single = with_lists


def _as_list(sizes: Any) -> Any:
    return sizes.tolist() if isinstance(sizes, torch.Tensor) else sizes


def replace_unequal_gather() -> None:
    """Gather parts of unequal length, as expert tensor parallelism does and gloo cannot."""
    distributed: Any = torch.distributed
    all_gather = distributed.all_gather

    @functools.wraps(all_gather)
    def gather_unequal(
        outputs: list[torch.Tensor],
        tensor: torch.Tensor,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        if len({part.shape for part in outputs}) == 1:
            return all_gather(outputs, tensor, group=group, async_op=async_op)
        # Each rank sends its part to all: slower, and right for any lengths.
        for rank, part in enumerate(outputs):
            if rank == distributed.get_rank(group):
                part.copy_(tensor)
            distributed.broadcast(part, group=group, group_src=rank)
        return None

    distributed.all_gather = gather_unequal


def replace_unequal_scatter() -> None:
    """Reduce parts of unequal length, as expert tensor parallelism does and gloo cannot."""
    distributed: Any = torch.distributed
    reduce_scatter = distributed.reduce_scatter

    @functools.wraps(reduce_scatter)
    def scatter_unequal(
        output: torch.Tensor,
        parts: list[torch.Tensor],
        op: Any = distributed.ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        if len({part.shape for part in parts}) == 1:
            return reduce_scatter(output, parts, op=op, group=group, async_op=async_op)
        for rank, part in enumerate(parts):
            # A copy: reduce works in place, and the parts are the caller's.
            summed = part.clone()
            distributed.reduce(summed, op=op, group=group, group_dst=rank)
            # Only the rank that reduced to itself holds the sum.
            if rank == distributed.get_rank(group):
                output.copy_(summed)
        return None

    distributed.reduce_scatter = scatter_unequal
