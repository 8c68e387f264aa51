"""The stream of a stated mixture: planned as the data of a phase would be, with samples that have lengths and no content."""

from collections.abc import Sequence
from typing import Final

import numpy as np

from visionloom.common.errors import UserError
from visionloom.data.encode.encode import EncodedSample
from visionloom.data.plan.deal import PlannedPack
from visionloom.data.plan.open import StreamOptions, settings_without_data
from visionloom.data.plan.parts import PART, Parts
from visionloom.data.plan.plan import MixtureEntry, Plan
from visionloom.data.stream.batch import PackLayout
from visionloom.forecast.mixture import DATASET, mixture_for

SAMPLES: Final = 20_000
"""Samples that are drawn: a block of packs takes 16,384 at most."""


class MixtureStream:
    """The stream of the mixture for packs of a phase's length; what no pack holds is dropped.

    Raises:
        UserError: for packs too short for any sample.
    """

    def __init__(self, options: StreamOptions) -> None:
        self._samples = mixture_for(options.sequence_length).draw(SAMPLES, options.seed)
        entry = MixtureEntry(DATASET, 1.0, self._parts(options), DATASET, "drop")
        self.plan = Plan([entry], settings_without_data(options), options.cost)
        self.layout = PackLayout.of(options, (DATASET,), pad_id=0)

    def _parts(self, options: StreamOptions) -> Parts:
        """Return the samples that a pack holds."""
        lengths = self._samples.lengths
        too_long = lengths["tokens"] > options.longest_sample
        over = np.flatnonzero(too_long | (lengths["patches"] > options.patch_budget))
        if len(over) == SAMPLES:
            option = f"phases.{options.phase_name}.sequence_length={options.sequence_length}"
            raise UserError(f"{option} is too short for any sample of a mixture: raise it")
        return Parts(lengths, over, np.empty(0, PART))

    def samples_of(self, packs: Sequence[PlannedPack]) -> list[list[EncodedSample]]:
        """Return the samples of packs of the plan."""
        encoded = []
        for pack in packs:
            encoded.append([self._samples.encoded(sample) for _, sample, _ in pack.places])
        return encoded
