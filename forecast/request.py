"""The question of a plan: which run, on which GPUs. Imports no torch."""

from dataclasses import dataclass, replace

from visionloom.forecast.machine import Machine
from visionloom.train.config import RunConfig


@dataclass(frozen=True)
class PlanRequest:
    """A run, and the GPUs to plan it for."""

    config: RunConfig
    world_size: int
    gpu: str
    """Name of the machine."""
    machine: Machine
    """As its file says, but for what the command line changes."""
    imbalance: float
    """Tokens of a mixture's busiest rank of experts, as a multiple of the mean."""
    phases: tuple[str, ...]
    """Those to plan, in their order."""

    def with_attention(self, kernels: str) -> "PlanRequest":
        """Return the question with other kernels of attention, as model.attention has them."""
        model = replace(self.config.model, attention=kernels)
        return replace(self, config=replace(self.config, model=model))
