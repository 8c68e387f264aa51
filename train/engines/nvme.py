"""DeepSpeed's files on a fast disk: whether they can be had, where they are, and what they hold of an optimizer.

DeepSpeed reads and writes with Linux's asynchronous I/O, by an extension in C++ that it compiles at the first use. It looks at
no errors of single operations, so that all which can go wrong is tried before.
"""

import fcntl
import mmap
import resource
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from ctypes import CDLL, byref, c_char, c_size_t
from functools import cache
from itertools import count
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from visionloom.common.errors import UserError
from visionloom.parallel.config import ZeroConfig
from visionloom.parallel.on_disk import mapped
from visionloom.train.checkpoint.write import first_fault

BUFFERS = 5
"""Of weights that are read from disk and not gathered yet, as many as DeepSpeed has by default."""
LARGEST_LOCKED = 16
"""Times `bucket_bytes` that a rank locks at most (estimated): the buffers of weights, and four of fp32 for a group of the optimizer."""
PROBE = (1 << 18) + (1 << 8)
"""Numbers of fp32: 1 MiB, from which DeepSpeed writes to disk, and 1 KiB, of which all its sizes are multiples."""
NEEDED = (
    "a C++ compiler, ninja and libaio with its headers (apt-get install g++ ninja-build libaio-dev)"
)


def uses_disk(zero: ZeroConfig) -> bool:
    """Return whether anything is kept on disk."""
    return "nvme" in (zero.offload_optimizer, zero.offload_parameters)


def disk_settings(zero: ZeroConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Return what DeepSpeed's configuration of ZeRO has beside the places; all ranks call it.

    Raises:
        UserError: on all ranks, if one of them cannot have files on its disk.
    """
    if not uses_disk(zero):
        return {}
    folder, fault = "", ""
    try:
        folder = str(folder_of(zero))
    except UserError as error:
        option = "optimizer" if zero.offload_optimizer == "nvme" else "parameters"
        fault = f"parallel.zero.offload_{option}=nvme: {error}"
    if fault := first_fault(fault):
        raise UserError(fault)
    settings: dict[str, Any] = {
        # Of the optimizer: read from disk, updated and written at once, and not a billion.
        "sub_group_size": zero.bucket_bytes // 4,
    }
    if zero.offload_optimizer == "nvme":
        settings["offload_optimizer"] = {"nvme_path": folder}
    if zero.offload_parameters == "nvme":
        settings |= {
            # Weights that are read before they are needed would lose their update where a pack goes another way than the last.
            "stage3_prefetch_bucket_size": 0,
            # Kept for another layer, they would keep the few buffers.
            "stage3_max_reuse_distance": 0,
        }
        room = {"buffer_count": BUFFERS, "buffer_size": zero.bucket_bytes // dtype.itemsize}
        settings["offload_param"] = {"nvme_path": folder, "max_in_cpu": 0, **room}
    return settings


@contextmanager
def enough_room(zero: ZeroConfig) -> Iterator[None]:
    """Raise a UserError where a stretch of a weight that is made inside is larger than a buffer."""
    try:
        yield
    except AssertionError as error:
        if "than buffer size" not in str(error):
            raise
        raise UserError(
            f"parallel.zero.bucket_bytes={zero.bucket_bytes} is less than a rank's stretch of the largest weight,"
            f" as parallel.zero.offload_parameters=nvme needs it: raise it ({error})"
        ) from error


# ---- the folder


def folder_of(zero: ZeroConfig) -> Path:
    """Return the folder of this process, the same until it ends; UserError if DeepSpeed could not keep anything there."""
    operations = load_operations()
    check_locking(LARGEST_LOCKED * zero.bucket_bytes)
    folder, _ = claim(Path(zero.nvme_path))
    try_disk(operations, folder)
    return folder


def load_operations() -> Any:
    """Compile or load DeepSpeed's asynchronous I/O; UserError if that is not possible."""
    from deepspeed import utils
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise UserError(f"DeepSpeed needs {NEEDED}; or choose cpu")
    # Its warning of the wear of disks is for each rank; docs/finetune.md has it.
    utils._deepspeed_nvme_write_warning_emitted = True
    try:
        return AsyncIOBuilder().load(verbose=False)
    except Exception as error:  # of DeepSpeed, torch, ninja or the compiler, and long
        reason = str(error).partition("\n")[0][:200]
        raise UserError(
            f"DeepSpeed's async_io could not be compiled with {NEEDED}: {reason}; or choose cpu"
        ) from error


def check_locking(size: int) -> None:
    """Refuse a process that may lock less than `size` bytes of memory: DeepSpeed would end with SIGABRT."""
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit == resource.RLIM_INFINITY or limit >= size:
        return
    # By trying: for some users there is no limit.
    with mmap.mmap(-1, limit + mmap.PAGESIZE) as memory:
        first = c_char.from_buffer(memory)
        refused = CDLL(None).mlock(byref(first), c_size_t(len(memory)))
        del first
    if refused:
        raise UserError(
            f"this process may lock {limit >> 20} MiB of memory, and needs up to {size >> 20}: start it after `ulimit -l unlimited`"
            " (docker run --ulimit memlock=-1), or choose cpu"
        )


@cache
def claim(path: Path) -> tuple[Path, IO[str]]:
    """Take the first folder in a path that no living process has, emptied of what a killed one has left; UserError if that fails.

    Returns:
        the folder, and the file whose lock keeps it until the process ends.
    """
    try:
        for number in count():
            folder = path / f"visionloom-{number}"
            folder.mkdir(parents=True, exist_ok=True)
            lock = (folder / "lock").open("w")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.close()
                continue
            shutil.rmtree(folder / "zero_stage_3", ignore_errors=True)
            return folder, lock
    except OSError as error:
        raise UserError(
            f"parallel.zero.nvme_path={path} cannot be written: {error.strerror}: name another folder"
        ) from error
    raise AssertionError


def try_disk(operations: Any, folder: Path) -> None:
    """Write and read a file as DeepSpeed does; UserError if it is not the same."""
    probe = folder / "probe"
    if not is_read_as_written(operations.aio_handle(1 << 20, 8, False, True, 1), str(probe)):
        raise UserError(
            f"parallel.zero.nvme_path={folder.parent} is full, or does not take what DeepSpeed writes around the system's cache"
            " (O_DIRECT, multiples of 1024 bytes): name a folder on a local disk"
        )
    probe.unlink()


def is_read_as_written(handle: Any, path: str) -> bool:
    """Write numbers to a file by DeepSpeed's `handle`, and return whether they come back."""
    sent, received = (handle.new_cpu_locked_tensor(PROBE, torch.empty(0)) for _ in range(2))
    torch.arange(PROBE, out=sent)
    received.zero_()
    is_whole = handle.sync_pwrite(sent, path, 0) != -1 and Path(path).stat().st_size == sent.nbytes
    # Of a file that is too short it would end with SIGABRT.
    is_same = is_whole and handle.sync_pread(received, path, 0) != -1
    is_same = is_same and torch.equal(sent, received)
    for tensor in (sent, received):
        handle.free_cpu_locked_tensor(tensor)
    return is_same


# ---- the optimizer


def is_group_on_disk(optimizer: Any, flat: Tensor) -> bool:
    """Return whether master weights and moments of a flat buffer of DeepSpeed's optimizer are in files: small ones are not."""
    swapper = getattr(optimizer, "optimizer_swapper", None)
    return swapper is not None and flat.ds_id in swapper.swap_params_info  # type: ignore[attr-defined]


@contextmanager
def in_host_memory(optimizer: Any, flat: Tensor) -> Iterator[None]:
    """Have a flat buffer, and moments that are made inside, in host memory inside, and on disk after."""
    if not is_group_on_disk(optimizer, flat):
        yield
        return
    optimizer.optimizer_swapper.swap_in_optimizer_state(parameter=flat)
    yield
    optimizer.optimizer_swapper.swap_out_optimizer_state(parameter=flat)


def group_on_disk(optimizer: Any, flat: Tensor, kinds: tuple[str, ...]) -> dict[str, Tensor]:
    """Return master weights and moments of a flat buffer that is on disk, by kinds in DeepSpeed's order: files as memory."""
    held = optimizer.optimizer_swapper.swap_params_info[flat.ds_id]  # type: ignore[attr-defined]
    files = zip(kinds, held.get_swap_paths(), strict=True)
    return {kind: mapped(path, held.numel(), flat.dtype) for kind, path in files}


def keep_gradients(optimizer: Any) -> None:
    """Let gradients be read from host memory, where DeepSpeed has all of them, and not from files beside.

    It would read them into the midst of a buffer, which disks and systems before Linux 6 refuse at odd places: unnoticed, and with
    the gradients of another step.
    """
    swapper = optimizer.optimizer_swapper
    kept: dict[str, Tensor] = {}
    begin = 0
    for flat, size in zip(
        optimizer.fp32_partitioned_groups_flat,
        optimizer.fp16_partitioned_groups_flat_numel,
        strict=True,
    ):
        kept[flat.ds_id] = optimizer.grad_partitions_flat_buffer[begin : begin + size]
        begin += size

    def keep(parameter: Any, gradient_offsets: Any, gradient_tensors: Any) -> None:
        group = swapper.swap_params_info[parameter.ds_id]
        group.unswapped_gradients = {0: kept[parameter.ds_id]}

    swapper.swap_out_gradients = keep


def remove_files(zero: ZeroConfig, parameters: Iterable[Any]) -> None:
    """Remove the files of an engine that is closed, and free the memory that its buffers of weights lock."""
    swappers = {each.nvme_swapper for each in parameters} - {None}
    for swapper in swappers:
        for buffer in (swapper.buffers, swapper.partitioned_swap_buffer):
            if buffer is not None:
                swapper.aio_read_handle.free_cpu_locked_tensor(buffer)
    folder, _ = claim(Path(zero.nvme_path))
    shutil.rmtree(folder / "zero_stage_3", ignore_errors=True)
