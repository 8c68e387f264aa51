"""Plan the saves of a phase: which rank writes which tensors into which file, agreed once, since it is the same at each save.

Megatron-core and torch exchange the descriptions of all tensors for a plan: a third of a gigabyte on 1,024 ranks (estimated). So
the first save of a phase asks all ranks, and the others reuse its answer without a word between them.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase
from megatron.core.dist_checkpointing.strategies import torch as strategies
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
)
from torch import Tensor
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan

from visionloom.train.checkpoint.read import trainer_state
from visionloom.train.checkpoint.weights_state import layout_metadata
from visionloom.train.phase.trainer import PhaseTrainer


@dataclass
class WritePlan:
    """The plan of a save by Megatron-core and torch: who writes what."""

    writer: FileSystemWriterAsync
    metadata: Any
    """Index of all tensors, on the main rank."""
    transforms: list[Any]
    finalize_fns: list[Any] = field(default_factory=list)
    """Megatron-core appends to these; the writing in write.py replaces them."""


class UncomparedPlanner(MCoreSavePlanner):  # type: ignore[misc]
    """Megatron-core's planner without torch's comparison of all parts of a tensor.

    That takes time with the square of their number, and slices of 1,024 ranks are 20,000 parts of one tensor (counted): minutes on
    the main rank. `read_index` compares what was written before it becomes a checkpoint, in under a second (measured).
    """

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Return the plans of all ranks, and the index of all tensors."""
        return create_default_global_save_plan(all_plans)


class PlanningStrategy(TorchDistSaveShardedStrategy):  # type: ignore[misc]
    """Megatron-core's strategy up to the point where files are written; the plan of its first save holds for all."""

    def __init__(self) -> None:
        """Keep plans and index from one save to the next."""
        super().__init__(cached_metadata=True)

    def async_save(self, *arguments: Any) -> Any:
        """Plan a save, by the arguments of Megatron-core's strategy; returns a WritePlan."""
        with patch.object(strategies, "MCoreSavePlanner", UncomparedPlanner):
            return super().async_save(*arguments)

    def _get_save_and_finalize_callbacks(
        self, writer: Any, planned: Any, async_strategy: str
    ) -> WritePlan:
        """Return the plan, where Megatron-core would return the call that writes."""
        index = planned[1]
        # It comes with the plans of all ranks, for a way to reuse it that would compare them again.
        if hasattr(index, "all_local_plans"):
            del index.all_local_plans
        # Megatron-core would gather everything twice before it believes that nothing changes.
        self.cached_global_metadata = index
        self.validated_cache_reuse = True
        transforms = [writer.transforms] if hasattr(writer, "transforms") else []
        return WritePlan(writer, index, transforms)


class PhasePlanner:
    """Plans the saves of one trainer; all ranks call it together."""

    def __init__(self, trainer: PhaseTrainer) -> None:
        """Begin without a plan; it holds as long as layout and trainable parameters do, which are those of the trainer."""
        self.trainer = trainer
        self.strategy: Any = PlanningStrategy()
        group = trainer.topology.groups.dp_cp
        # Ranks with the same weights share the writing of them. Alone, Megatron-core would ask all ranks again each time.
        self.shares_writing = group.size() > 1
        if self.shares_writing:
            self.strategy = FullyParallelSaveStrategyWrapper(
                self.strategy, group, do_cache_distribution=True
            )
        self.is_first = True

    def plan(self, partial: Path, copied: bool) -> tuple[WritePlan, list[Any]]:
        """Plan a save and bring this rank's tensors to the host.

        Args:
            partial: the folder to write.
            copied: the tensors share no memory with the model's, which may change while they are written.

        Returns:
            the plan, and the tensors by file.
        """
        self.trainer.gather_weights()
        state = trainer_state(self.trainer)
        in_use: set[int] = set()
        for each in nested_values(state):
            if isinstance(each, ShardedBase) and isinstance(each.data, Tensor):
                in_use.add(_memory(each.data))
        plan: Any = dist_checkpointing.save(
            state,
            str(partial),
            self.strategy,
            # The strategy that shares the writing checks by itself.
            validate_access_integrity=self.is_first and not self.shares_writing,
            async_sharded_save=True,
            async_strategy="mcore",
            content_metadata=layout_metadata(None),
        )
        self.is_first = False
        buckets, plan.writer.write_buckets = plan.writer.write_buckets or [], None
        return plan, _staged(buckets, in_use if copied else set())


def _staged(buckets: list[Any], in_use: set[int]) -> list[Any]:
    """Return the tensors of each file in host memory, and apart from memory `in_use`."""
    staged = []
    for path, key, (data, tensors) in buckets:
        copies = []
        for item, tensor in tensors:
            # Plain memory, which goes back when it is written: torch's pinned memory is rounded up to powers of two and kept.
            host = tensor.to("cpu")
            # A copy from a GPU is private already, and so is what the writer had to make contiguous.
            copies.append((item, host.clone() if _memory(host) in in_use else host))
        staged.append((path, key, (data, copies)))
    return staged


def _memory(tensor: Tensor) -> int:
    """Return the address of the memory that a tensor is a part of."""
    return tensor.untyped_storage().data_ptr()
