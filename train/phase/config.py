"""Options of one phase: what trains, on what, for how long. Imports no torch."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from visionloom.common.settings import option
from visionloom.data.config import VideoSampling
from visionloom.model.config import GROUPS
from visionloom.model.distillation_config import DistillationConfig
from visionloom.model.lora_config import LoraConfig
from visionloom.parallel.config import ParallelConfig
from visionloom.train.optim.config import OptimConfig
from visionloom.train.reinforcement.config import ReinforcementConfig

LOSSES: Final = ("sqrt", "token", "sample")
SCHEDULES: Final = ("cosine", "wsd", "linear", "constant")
STEPS: Final = 10**7
"""Most optimizer steps of a phase; the folders of checkpoints have eight digits."""


@dataclass
class PhaseConfig:
    """One phase: what trains, on what, for how long."""

    sequence_length: int = option(8192, "data", least=1, most=2**24)
    """Tokens of one pack."""
    global_batch: int = option(1, "data", least=1, most=2**20)
    """Packs of one optimizer step over all ranks."""
    micro_batch: int = option(1, "free", least=1, most=2**20)
    """Packs of one forward pass on one rank."""
    steps: int | None = option(None, "run", least=1, most=STEPS)
    """Optimizer steps; or give `tokens`."""
    tokens: int | None = option(None, "run", least=1, most=10**18)
    """Tokens including padding; the steps follow from sequence_length x global_batch."""
    trainable: list[str] = option(list(GROUPS), "run", choices=GROUPS)
    """Parameter groups that train: vision, merger (main and DeepStack mergers), language."""
    fresh: list[str] = option([], "run", choices=GROUPS)
    """Parameter groups drawn anew at the start, as the report's alignment starts from new mergers."""
    mixture: dict[str, float] = option({}, "data", least=0, most=1e9)
    """Weight of each dataset; empty: all of data.datasets with their own weights."""
    loss: str = option("sqrt", "run", choices=LOSSES)
    """Weight of a token in a sample with n supervised tokens: `sqrt` n^-1/2, `token` 1, `sample` 1/n."""
    lr: float = option(1e-4, "run", least=0, most=100)
    """Peak learning rate."""
    lr_vision: float | None = option(None, "run", least=0, most=100)
    """Peak learning rate of the vision tower; None: lr."""
    lr_merger: float | None = option(None, "run", least=0, most=100)
    """Peak learning rate of the mergers; None: lr."""
    lr_min_ratio: float = option(0.1, "run", least=0, most=1)
    """Last learning rate as a share of the peak."""
    warmup_steps: int = option(0, "run", least=0, most=STEPS)
    """Optimizer steps in which the learning rate rises from 0 to its peak, in a straight line."""
    schedule: str = option("cosine", "run", choices=SCHEDULES)
    """`cosine` or `linear` decay over the whole phase, `wsd` (constant, then decay_steps down), `constant`."""
    decay_steps: int | None = option(None, "run", least=1, most=STEPS)
    """Steps of decay at the end of a `wsd` schedule; None: a tenth of the phase."""
    video: VideoSampling = field(default_factory=VideoSampling)
    """Frames of videos, where they are others than data.media's."""
    parallel: ParallelConfig | None = None
    """A layout of its own; None: the run's."""
    distillation: DistillationConfig | None = None
    """A teacher to learn from; None: none."""
    rl: ReinforcementConfig | None = None
    """Rewards to learn from, of answers to the last turn of its samples; None: the samples' own turns are learned."""
    optim: OptimConfig | None = None
    """An optimizer of its own; None: the run's."""

    @property
    def total_steps(self) -> int:
        """Return the optimizer steps of the phase; those of `tokens` are rounded up."""
        if self.steps is not None:
            return self.steps
        return -(-(self.tokens or 0) // (self.sequence_length * self.global_batch))

    def peak_learning_rates(self) -> dict[str, float]:
        """Return the peak learning rate of each trainable parameter group."""
        own = {"vision": self.lr_vision, "merger": self.lr_merger, "language": None}
        peaks = {}
        for group in self.trainable:
            rate = own[group]
            peaks[group] = self.lr if rate is None else rate
        return peaks

    def problems(self, here: str) -> Iterator[str]:
        """Yield a line for each fault of the lengths, the groups and the weights of datasets."""
        yield from self._step_problems(here)
        yield from self._reward_problems(here)
        if not self.trainable:
            yield f"{here}.trainable is empty: name at least one of {', '.join(GROUPS)}"
        if self.mixture and sum(self.mixture.values()) <= 0:
            yield f"{here}.mixture: one weight must be above 0"

    def _step_problems(self, here: str) -> Iterator[str]:
        """Yield a line for each fault of the phase's length, its warm-up and its decay."""
        if (self.steps is None) == (self.tokens is None):
            yield f"{here}: give exactly one of steps and tokens"
        elif self.total_steps > STEPS:
            yield f"{here}.tokens={self.tokens} makes {self.total_steps:,} steps, at most {STEPS:,} are possible"
        elif self.warmup_steps >= self.total_steps:
            yield f"{here}.warmup_steps={self.warmup_steps} must be below the phase's {self.total_steps} steps"
        if self.decay_steps is not None and self.decay_steps > self.total_steps - self.warmup_steps:
            yield f"{here}.decay_steps={self.decay_steps} must fit behind the warm-up"

    def _reward_problems(self, here: str) -> Iterator[str]:
        """Yield a line for each option that means nothing where answers are trained on, or does not fit them."""
        if self.rl is None:
            return
        # What differs from the default was set by somebody who expects it to count.
        rollout, default = self.rl.rollout, PhaseConfig()
        yield from self._teacher_problems(here, self.rl)
        if self.global_batch != default.global_batch:
            yield (
                f"{here}.global_batch={self.global_batch}: an optimizer step of rl has as many packs as its answers fill:"
                f" leave it out, and set {here}.rl.rollout.batch_prompts and {here}.rl.updates"
            )
        if self.tokens is not None:
            yield f"{here}.tokens: how many tokens answers have is not known before: give {here}.steps"
        elif self.total_steps % self.rl.updates:
            yield f"{here}.steps={self.steps} must be a multiple of {here}.rl.updates={self.rl.updates}"
        if rollout.max_new_tokens >= self.sequence_length:
            yield (
                f"{here}.rl.rollout.max_new_tokens={rollout.max_new_tokens} leaves no room for a prompt in"
                f" {here}.sequence_length={self.sequence_length} tokens: lower it, or make packs longer"
            )

    def _teacher_problems(self, here: str, rl: ReinforcementConfig) -> Iterator[str]:
        """Yield why answers cannot be learned from both, or neither, of rewards and a teacher."""
        teacher = self.distillation
        if teacher is None:
            if not rl.reward:
                yield f"{here}.rl.reward is empty: give at least one reward a weight, as {here}.rl.reward.number=1"
            if rl.teacher_reward:
                yield f"{here}.rl.teacher_reward={rl.teacher_reward:g} needs a teacher: set one in {here}.distillation.teacher"
            return
        if teacher.stored:
            yield f"{here}.distillation.stored knows nothing of answers that are not written yet: set {here}.distillation.teacher"
        if teacher.teacher.parallel:
            yield f"{here}.distillation.teacher.parallel: a teacher of answers has the student's layout: leave it out"
        if rl.reward and not rl.teacher_reward:
            yield (
                f"{here}.rl.reward and {here}.distillation are both set: the teacher's whole distributions are learned without rewards;"
                f" leave out {here}.rl.reward, or make the teacher a reward by {here}.rl.teacher_reward"
            )

    def dealing_problems(self, here: str, world_size: int, layout: ParallelConfig) -> Iterator[str]:
        """Yield why the packs of a step, or the tokens of a pack, cannot be dealt to ranks.

        Args:
            here: dotted path of this phase.
            world_size: ranks of the run.
            layout: the phase's own or the run's; it must be possible on these ranks.
        """
        if self.rl is not None:
            yield from self._length_problems(here, layout)
            return
        copies = layout.data_parallel_size(world_size)
        packs = copies * self.micro_batch
        batch = f"{here}.global_batch={self.global_batch}"
        micro_batches, left = divmod(self.global_batch, packs)
        if left:
            yield (
                f"{batch} packs cannot be dealt to {copies} data-parallel ranks x micro_batch {self.micro_batch}:"
                f" make it a multiple of {packs} or start fewer ranks"
            )
        elif layout.chunks > 1 and micro_batches % layout.pipeline:
            yield (
                f"{batch} gives {micro_batches} micro-batches, which interleaved stages need in multiples of"
                f" parallel.pipeline={layout.pipeline}: make it a multiple of {packs * layout.pipeline}"
            )
        yield from self._length_problems(here, layout)

    def _length_problems(self, here: str, layout: ParallelConfig) -> Iterator[str]:
        """Yield why the tokens of a pack cannot be dealt to the ranks that share it."""
        multiple = layout.pack_token_multiple
        if self.sequence_length % multiple:
            yield (
                f"{here}.sequence_length={self.sequence_length} must be a multiple of {multiple}"
                f" (tensor {layout.tensor} x context {layout.context}, two pieces a context rank)"
            )

    def adapter_problems(self, here: str, lora: LoraConfig) -> Iterator[str]:
        """Yield why this phase cannot train what `lora` lets train."""
        if not set(self.fresh) <= set(lora.full):
            yield (
                f"{here}.fresh={self.fresh} would stay as drawn: with lora.rank above 0 only adapters"
                f" and lora.full={lora.full} train"
            )
        if not set(self.trainable) & set(lora.trained_groups):
            yield f"{here}.trainable={self.trainable} has no adapters: lora.groups={lora.groups}"
