"""Degrees of the parallel axes and the checks that need no process group.

Nothing here imports torch: a layout that cannot be built is refused before any rank has paid for the import.
"""

from dataclasses import dataclass

# Axes whose degree may not exceed 1 yet: a layout is refused until it is proven equal to one process.
UNPROVEN_AXES = ("pipeline", "context", "expert")


@dataclass
class ParallelConfig:
    """Degrees of parallelism; data parallelism is what remains of the world size."""

    engine: str = "megatron"
    """Who owns gradients and optimizer: `megatron`."""
    tensor: int = 1
    """Ranks that share every matrix of a language layer."""
    pipeline: int = 1
    """Stages that the language layers are cut into."""
    virtual_pipeline: int | None = None
    """Chunks of layers on each pipeline stage (interleaved 1F1B)."""
    context: int = 1
    """Ranks that share the tokens of one sequence."""
    expert: int = 1
    """Ranks that share the experts of a mixture-of-experts layer."""
    expert_tensor: int | None = None
    """Ranks that share the matrices of one expert; None: 1."""
    sequence: bool | None = None
    """Sequence parallelism in the tensor-parallel group; None: on where tensor > 1."""
    pipeline_layout: str | None = None
    """Megatron layout of embedding, layers and loss over the stages, for example `Ettt|tttt|ttL`."""

    @property
    def sequence_parallel(self) -> bool:
        """Whether activations between the tensor-parallel regions are split over the tokens."""
        return self.tensor > 1 if self.sequence is None else self.sequence

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model between them."""
        return self.tensor * self.pipeline * self.context

    def data_parallel_size(self, world_size: int) -> int:
        """Copies of the model that `world_size` ranks hold; check `problems` first."""
        return world_size // self.model_parallel_size

    def problems(self, world_size: int) -> list[str]:
        """What makes this layout impossible on `world_size` ranks: one line a fault, naming the option; empty if none."""
        found = []
        if self.engine != "megatron":
            found.append(f"parallel.engine={self.engine} is not available: use parallel.engine=megatron")
        for axis in ("tensor", "pipeline", "context", "expert"):
            degree = getattr(self, axis)
            if degree < 1:
                found.append(f"parallel.{axis}={degree} must be at least 1")
            elif axis in UNPROVEN_AXES and degree > 1:
                found.append(
                    f"parallel.{axis}={degree} is not available yet: set it to 1 and use parallel.tensor or more data-parallel ranks"
                )
        if self.sequence and self.tensor == 1:
            found.append("parallel.sequence=true needs parallel.tensor of 2 or more (now 1)")
        if not found and world_size % self.model_parallel_size:
            found.append(
                f"{world_size} ranks cannot hold tensor {self.tensor} x pipeline {self.pipeline} x context {self.context}"
                f" = {self.model_parallel_size}: start a multiple of {self.model_parallel_size} ranks or change parallel.*"
            )
        return found
