"""Options of distillation, in which a student learns the distribution of a teacher's next tokens. Imports no torch.

Source: Hinton et al. 2015 (arXiv 1503.02531); the report on Qwen3-VL (arXiv 2511.21631) distils its small models from logits.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from visionloom.common.settings import option
from visionloom.parallel.config import ParallelConfig

DIRECTIONS = ("forward", "reverse")


@dataclass
class TeacherConfig:
    """A teacher that runs beside the student, frozen, on the same ranks; both empty: there is none."""

    checkpoint: str = option("", "run")
    """Folder of a checkpoint, which says what model it holds."""
    huggingface: str = option("", "run")
    """Folder of a Hugging Face model, whose config.json says what it is."""
    parallel: ParallelConfig | None = None
    """A layout of its own; None: the student's."""


@dataclass(frozen=True)
class StepPacks:
    """The packs of a step, as they are dealt to the student."""

    micro_batches: int
    """Of all data ranks together."""
    sequence_length: int
    """Tokens of a pack."""
    sample_token_multiple: int
    """What each sample in it takes up a multiple of."""

    def problems(self, layout: ParallelConfig, where: str, copies: int) -> Iterator[str]:
        """Yield why they cannot be dealt to the copies of a teacher with a layout of its own, whose dotted path is given."""
        if self.micro_batches % copies:
            yield (
                f"{where} makes {copies} copies of the teacher, to which the {self.micro_batches} micro-batches of a step"
                f" (global_batch / micro_batch) cannot be dealt: make them a multiple of {copies} or change {where}.*"
            )
        if self.sequence_length % layout.pack_token_multiple:
            yield (
                f"{where} needs packs (sequence_length={self.sequence_length}) of a multiple of {layout.pack_token_multiple}"
                f" tokens (tensor {layout.tensor} x context {layout.context}, two pieces a context rank)"
            )
        needed = layout.sample_token_multiple
        if self.sample_token_multiple % needed:
            yield (
                f"data.sample_token_multiple={self.sample_token_multiple} must be a multiple of {needed}:"
                f" {where}.context={layout.context} cuts each sample into that many chunks"
            )


@dataclass
class DistillationConfig:
    """A divergence between student and teacher at each supervised token, beside the cross-entropy.

    A phase minimises cross_entropy_weight x loss + weight x distillation_loss, both weighted means over the same tokens.
    """

    weight: float = option(1.0, "run", above=0, most=1e6)
    """Factor of the divergence."""
    cross_entropy_weight: float = option(1.0, "run", least=0, most=1e6)
    """Factor of the cross-entropy with the data's own tokens; 0: the teacher alone is learned from."""
    temperature: float = option(1.0, "run", least=0.01, most=100)
    """Both distributions are softmax(logits / temperature); the divergence is multiplied by its square, so that gradients
    keep their scale."""
    direction: str = option("forward", "run", choices=DIRECTIONS)
    """`forward` KL(teacher || student), which covers all that the teacher may say; `reverse` KL(student || teacher), which
    keeps to what it does say."""
    stored: str = option("", "run")
    """Folder of a teacher's stored top-k log-probabilities, by launch/teacher.py."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """A live teacher."""

    @property
    def is_live(self) -> bool:
        """Return whether the teacher runs beside the student."""
        return not self.stored

    def problems(self, here: str) -> Iterator[str]:
        """Yield a line unless there is exactly one teacher."""
        sources = {
            f"{here}.stored": self.stored,
            f"{here}.teacher.checkpoint": self.teacher.checkpoint,
            f"{here}.teacher.huggingface": self.teacher.huggingface,
        }
        given = [name for name, value in sources.items() if value]
        if not given:
            yield f"{here} has no teacher: set one of {', '.join(sources)}"
        if len(given) > 1:
            yield f"{' and '.join(given)} are set: a phase has one teacher"
        if self.stored and self.teacher.parallel:
            yield f"{here}.teacher.parallel is the layout of a live teacher, and {here}.stored is set: leave it out"

    def dealing_problems(self, here: str, world_size: int, packs: StepPacks) -> Iterator[str]:
        """Yield why the ranks cannot hold a layout of the teacher's own, or packs cannot be dealt to it.

        Args:
            here: dotted path of this section.
            world_size: ranks of the run.
            packs: of the student.
        """
        layout, where = self.teacher.parallel, f"{here}.teacher.parallel"
        if layout is None:
            return
        faults = layout.world_problems(world_size, where)
        yield from faults
        if not faults:
            yield from packs.problems(layout, where, layout.data_parallel_size(world_size))
