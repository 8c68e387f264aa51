"""OptimConfig: the optimizer, and what becomes of steps that cannot be used. Imports no torch."""

from collections.abc import Iterator
from dataclasses import dataclass

from visionloom.common.settings import option

OPTIMIZERS = ("adamw", "muon")
MOMENTS = ("fp32", "bf16", "bf16_stochastic")


@dataclass
class OptimConfig:
    """The optimizer and gradient clipping."""

    name: str = option("adamw", "never", choices=OPTIMIZERS)
    """`adamw`, or `muon`: Muon for the matrices of decoder layers, tower and mergers, AdamW for all other parameters."""
    momentum: float = option(0.95, "run", least=0, below=1)
    """Share of the mean of gradients that a step of Muon keeps."""
    moments: str = option("fp32", "run", choices=MOMENTS)
    """Dtype in which AdamW keeps its two means: `fp32`, `bf16` rounded to the nearest, or `bf16_stochastic`, right in the mean."""
    beta1: float = option(0.9, "run", least=0, below=1)
    """Share of the mean of gradients that a step of AdamW keeps."""
    beta2: float = option(0.95, "run", least=0, below=1)
    """Share of the mean of squared gradients that a step of AdamW keeps."""
    epsilon: float = option(1e-8, "run", above=0, most=1)
    """Added to the root of the mean of squared gradients."""
    weight_decay: float = option(0.05, "run", least=0, most=100)
    """Share of a weight that a step takes away, times the learning rate; biases and norms have none."""
    clip_grad: float = option(1.0, "run", least=0, most=1e9)
    """Largest global gradient norm; 0 turns clipping off."""
    skip_limit: int = option(10, "free", least=1, most=10**7)
    """Skipped steps in a row after which the phase goes back to its newest checkpoint, and passes over their data."""
    spike_score: float = option(6.0, "free", least=1, most=1e9)
    """Robust standard deviations that a loss or gradient norm lies above those of the last 128 steps where it is a spike."""
    skip_spikes: bool = option(False, "free")
    """Skip steps that are spikes, as those whose gradient is not finite are."""

    def problems(self, here: str) -> Iterator[str]:
        """Yield a line if Muon would have moments in bf16."""
        if self.name == "muon" and self.moments != "fp32":
            yield (
                f"{here}.moments={self.moments} is for optim=adamw: Muon keeps one moment, in fp32;"
                f" set {here}.moments=fp32"
            )
