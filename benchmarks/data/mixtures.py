"""Length tables of the forecast's mixtures of samples, by short names; shared with the tests."""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from visionloom.forecast.mixture import LengthMixture, mixtures

MIXTURES: Final = {f"{length // 1024}k": mixture for length, mixture in mixtures().items()}


def fitting(
    mixture: LengthMixture, count: int, seed: int = 0
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Tokens and patches of the samples, of `count`, that a pack can hold."""
    lengths, most = mixture.draw(count, seed).lengths, mixture.sequence_length
    lengths = lengths[(lengths["tokens"] <= most) & (lengths["patches"] <= int(3.2 * most))]
    return lengths["tokens"], lengths["patches"]
