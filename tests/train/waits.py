"""Where the host waits for the device in one step of training, counted on no device at all.

Device tensors are on torch's meta device, where nothing is computed but every operation runs, and the ranks are those of
torch's fake process group. What brings a value to the host is answered with ones and counted, with the line that asked. Other
ways to look at a device tensor (numpy, nonzero, masks, a copy by `to`) raise, since a meta tensor has no content.
`python -m visionloom.tests.train.waits RANKS` prints the counts as JSON.
"""

import collections
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META = torch.device("meta")
ROOT = Path(__file__).resolve().parents[2]
STEPS = 3
MEASURED = 2
"""The step that is counted, from 1: the first one makes the optimizer's moments."""


GLOO_GROUPS = ("get_data_parallel_group_gloo", "get_expert_data_parallel_group_gloo")
"""Megatron-core's functions whose groups its optimizer asks for and, in a step, does not use."""


class Waits:
    """Counts of waits by the line of ours, or of Megatron-core, that asked."""

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()

    def add(self, kind: str) -> None:
        """Count a wait of the code that is running."""
        for frame in reversed(traceback.extract_stack()):
            inside = frame.filename.startswith(str(ROOT)) and Path(frame.filename) != Path(__file__)
            if "/megatron/" in frame.filename or (
                inside and "/parallel/cpu.py" not in frame.filename
            ):
                place = (
                    frame.filename.split("site-packages/")[-1]
                    .removeprefix(f"{ROOT}/")
                    .removeprefix(".link/visionloom/")
                )
                self.counts[f"{kind}: {place} {frame.name}"] += 1
                return
        self.counts[f"{kind}: elsewhere"] += 1

    def answer(self, name: str, value: Callable[[torch.Tensor], Any]) -> None:
        """Let a method of tensors give `value` for those on the device, and count it."""
        real = getattr(torch.Tensor, name)

        def method(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if not tensor.is_meta:
                return real(tensor, *args, **kwargs)
            self.add(name)
            return value(tensor)

        setattr(torch.Tensor, name, method)


class Device(TorchDispatchMode):
    """Runs no collective, and counts copies to the device that wait for it: those without non_blocking."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits
        self.collectives: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [
            value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)
        ]
        name = func._schema.name
        if func.namespace == "c10d" and any(tensor.is_meta for tensor in tensors):
            self.collectives[name] += 1
            return _collective_result(func, args)
        result = func(*args, **kwargs)
        if (
            name in ("aten::_to_copy", "aten::copy_")
            and isinstance(result, torch.Tensor)
            and result.is_meta
        ):
            blocking = not (
                kwargs.get("non_blocking") or (name == "aten::copy_" and len(args) > 2 and args[2])
            )
            if blocking and any(not tensor.is_meta for tensor in tensors):
                self.waits.add("copy to the device")
        return result


def _collective_result(func: Any, args: Any) -> Any:
    """Return what a collective returns that is done at once, its tensors unchanged."""
    from torch._C._distributed_c10d import FakeWork

    results = []
    for value in func._schema.returns:
        tensors = next(arg for arg in args if isinstance(arg, list | tuple | torch.Tensor))
        results.append(FakeWork().boxed() if "Work" in str(value.type) else tensors)
    return results[0] if len(results) == 1 else tuple(results)


def prepare(waits: Waits) -> None:
    """Make the CPU stand-in for torch.cuda one for the meta device, and count what asks for values."""
    from visionloom.parallel import cpu

    cpu.CPU = META
    cpu.install()
    torch.cuda.current_device = lambda: META  # type: ignore[assignment,return-value]
    torch.Tensor.cuda = lambda self, *args, **kwargs: self.to(META)  # type: ignore[method-assign,assignment]
    named = torch.Tensor.type

    def type_name(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        name = named(tensor, *args, **kwargs)
        return name.replace("cuda.meta.", "cuda.") if isinstance(name, str) else name

    torch.Tensor.type = type_name  # type: ignore[method-assign,assignment]
    waits.answer("item", lambda tensor: 1)
    waits.answer("tolist", lambda tensor: torch.ones(tensor.shape).tolist())
    waits.answer("cpu", lambda tensor: torch.ones(tensor.shape, dtype=tensor.dtype))
    waits.answer("__float__", lambda tensor: 1.0)
    waits.answer("__int__", lambda tensor: 1)
    waits.answer("__bool__", lambda tensor: True)


def measure(ranks: int) -> dict[str, Any]:
    """Train three steps of the tiny model as one of `ranks` data-parallel ranks, and count the waits of the second."""
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    waits = Waits()
    prepare(waits)

    from visionloom.model.qwen3vl import Qwen3VL
    from visionloom.model.trainable import set_trainable
    from visionloom.parallel import topology as topologies
    from visionloom.parallel.config import ParallelConfig
    from visionloom.tests.model.reference import tiny_config
    from visionloom.tests.train.layouts import packs_of
    from visionloom.train import loop
    from visionloom.train.checkpoint.write import Saver
    from visionloom.train.config import CheckpointConfig, LoggingConfig, OptimConfig, PhaseConfig
    from visionloom.train.observe.observer import Observer
    from visionloom.train.optimizer import build_optimizer, build_scheduler, wrap_data_parallel
    from visionloom.train.phase_trainer import PhaseTrainer

    packs = packs_of("everything")[:2]  # on the host, as data's packs are
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    topology = topologies._open_layout(ParallelConfig(), META, 0)
    for getter in GLOO_GROUPS:  # the fake process group has no gloo beside it
        setattr(parallel_state, getter, lambda *_, **__: None)
    counted: dict[str, Any] = {}
    device = Device(waits)

    def steps(*_: Any) -> Iterator[Any]:
        for step in range(1, STEPS + 1):
            if step == MEASURED:
                waits.counts.clear()
                device.collectives.clear()
            if step == MEASURED + 1:
                counted.update(waits=dict(waits.counts), collectives=dict(device.collectives))
            yield packs

    with device, tempfile.TemporaryDirectory() as folder:
        with META:
            model = Qwen3VL(tiny_config(), topology, torch.bfloat16)
        phase = PhaseConfig(steps=STEPS, lr=1e-3)
        set_trainable(model, phase.trainable)
        wrapped = wrap_data_parallel([model], topology)
        optimizer = build_optimizer(wrapped, OptimConfig(), phase, True)
        scheduler = build_scheduler(optimizer, OptimConfig(), phase)
        stream: Any = type("Stream", (), {"datasets": [type("Dataset", (), {"name": "test"})]})
        trainer = PhaseTrainer(
            "test", phase, topology, [model], wrapped, optimizer, scheduler, stream
        )
        observer = Observer(Path(folder), LoggingConfig(), True, "test", {})
        loop.step_batches = steps  # type: ignore[assignment]
        loop.fit(trainer, Saver(Path(folder), CheckpointConfig(), observer.saved), observer, 0)
    return counted


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    print(json.dumps(measure(int(sys.argv[1]))))
