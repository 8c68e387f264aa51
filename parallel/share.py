"""Which part of a step's packs, and of their pictures, a rank reads. Imports no torch."""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Share:
    """The part of one rank: the packs of its copy of the model, and the pictures that it encodes of them.

    The default is everything.
    """

    data_rank: int = 0
    """Which of the copies of the model this rank belongs to."""
    data_size: int = 1
    """Copies of the model."""
    encoder_rank: int = 0
    """Place among the ranks that share the pictures of a pack; -1: this rank encodes none."""
    encoder_ranks: int = 1
    """Ranks that share the pictures of a pack."""
    has_losses: bool = True
    """Whether this rank computes losses, for which it reads what a stored teacher says."""
    teacher: "Share | None" = None
    """The part that it reads besides for a live teacher with a layout of its own."""


ALONE: Final = Share()
"""The part of a rank that is alone: all packs and all pictures."""
