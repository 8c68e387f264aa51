"""Options of distillation, in which a student learns the distribution of a teacher's next tokens. Imports no torch.

Source: Hinton et al. 2015 (arXiv 1503.02531); the report on Qwen3-VL (arXiv 2511.21631) distils its small models from logits.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from visionloom.common.settings import option

DIRECTIONS = ("forward", "reverse")


@dataclass
class TeacherConfig:
    """A teacher that runs beside the student, frozen, on the same ranks; both empty: there is none."""

    checkpoint: str = option("", "run")
    """Folder of a checkpoint, which says what model it holds."""
    huggingface: str = option("", "run")
    """Folder of a Hugging Face model, whose config.json says what it is."""


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
