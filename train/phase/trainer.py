"""Everything that trains in one phase, built and ready."""

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from torch import Tensor

from visionloom.data.stream.batch import PackedBatch
from visionloom.data.stream.train_stream import PackStream
from visionloom.model.config import ModelConfig
from visionloom.model.flops import StepWork, step_flops
from visionloom.model.qwen3vl import Qwen3VL
from visionloom.parallel.topology import Topology
from visionloom.train.checkpoint.state_file import Inputs
from visionloom.train.distillation.teacher import Teacher
from visionloom.train.engines.engine import Engine
from visionloom.train.optim.bad_steps import StepJudge
from visionloom.train.optim.config import OptimConfig
from visionloom.train.phase.config import PhaseConfig

SAMPLE_COLUMNS: Final = ("question", "reference", "answer", "reward")


class OwnAnswers(Protocol):
    """Gives a phase answers of its own policy to train on."""

    seconds: float
    """That writing them has taken, since `take_facts` was called last."""

    def batches(self, trainer: "PhaseTrainer") -> Generator[list[PackedBatch]]:
        """Yield this rank's micro-batches of each step that is left; raises StopAsked."""

    def take_facts(self) -> dict[str, Any]:
        """Return what metrics tell of answers that were written since the last call; empty if there are none."""

    def take_samples(self) -> list[list[str]]:
        """Return a few answers since the last call as rows of SAMPLE_COLUMNS; empty if there are none."""

    def is_between(self, phase_step: int) -> bool:
        """Return whether a run may go on from the weights after so many steps of the phase."""

    def close(self) -> None:
        """Let go of what was started for it."""


@dataclass
class PhaseTrainer:
    """Model, optimizer, schedule and data of one phase on this rank, and how far it has trained."""

    phase_name: str
    phase: PhaseConfig
    topology: Topology
    model_parts: list[Qwen3VL]
    """The parts of the model on this pipeline stage: one, or several of a virtual pipeline."""
    engine: Engine
    """Wraps the same parts, and holds gradients and optimizer."""
    scheduler: Any
    stream: PackStream
    teacher: Teacher | None = None
    """Of a phase that distils, or learns from rewards."""
    rollouts: OwnAnswers | None = None
    """Of a phase that trains on answers of its own."""
    judge: StepJudge = field(default_factory=lambda: StepJudge(OptimConfig()))
    """Says which steps are bad."""
    inputs: Inputs | None = None
    """Origin of data and first weights, which its checkpoints keep."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Options that its checkpoints keep, to name what changes before a resume."""
    step: int = 0
    """Optimizer steps done in the run."""
    phase_step: int = 0
    """Optimizer steps done in the phase."""

    @property
    def has_dropout(self) -> bool:
        """Return whether a step draws random numbers: adapters may, the model itself never does."""
        lora = self.model_parts[0].lora
        return lora is not None and lora.dropout > 0

    @property
    def can_be_saved(self) -> bool:
        """Return whether a run may go on from the weights as they are now: not in the middle of a rollout's steps."""
        return self.rollouts is None or self.rollouts.is_between(self.phase_step)

    @property
    def model_config(self) -> ModelConfig:
        """Return the architecture."""
        return self.model_parts[0].model_config

    def last_steps(self, count: int) -> list[int]:
        """Return the steps of the plan that were trained last."""
        steps = range(self.phase_step - count, self.phase_step)
        return [self.stream.step_of_plan(step) for step in steps]

    def gather_weights(self) -> None:
        """Gather the weights that other ranks have updated, which the next forward pass would; all ranks call it."""
        self.engine.gather_weights()

    def close(self) -> None:
        """Let go of all that the phase alone has: the next one may keep its layout, and with it what is open."""
        self.engine.close()
        self.drop_graphs()
        if self.teacher is not None:
            self.teacher.close()

    def drop_graphs(self) -> None:
        """Drop autograd's graphs of the last step: Megatron-core's dispatchers of experts keep theirs, to read the routing from.

        They lead back to the model where Python's collector does not see it, and a mixture would stay in memory for good.
        """
        for part in self.model_parts:
            for module in part.modules():
                dispatcher = getattr(module, "token_dispatcher", None)
                kept = vars(dispatcher) if dispatcher is not None else {}
                for name, value in kept.items():
                    if isinstance(value, Tensor) and value.grad_fn is not None:
                        kept[name] = None

    def flops(self, work: StepWork) -> float:
        """Count the operations of forward and backward that the phase's trainable groups need."""
        # Adapters train in place of the weights, whose gradients are not computed then.
        lora = self.model_parts[0].lora
        parts = step_flops(self.model_config, work, set(self.phase.trainable), lora)
        return sum(parts.values())
