"""What happens to samples that cannot be read at training time: masked, written down, and counted."""

import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from visionloom.data.decode import IMAGE_ROW, VIDEO_ROW
from visionloom.data.encode import EncodedSample
from visionloom.data.sample import SampleError, Video

MAX_SHARE: Final = 0.02
"""Share of unreadable samples above which the data, and not a sample, is at fault."""
MIN_SAMPLES: Final = 500
"""The share is taken of at least this many samples, so that ten early ones stop nothing."""


@dataclass(slots=True)
class Quarantine:
    """Writes a JSON line for each unreadable sample of this process, once, and stops the run when they are too many."""

    path: Path | None = None
    """File of JSON lines; None: only counted."""
    read: int = 0
    unreadable: int = 0
    _known: set[tuple[str, str]] = field(default_factory=set)

    def passed(self, samples: int) -> None:
        """Count samples that were tried, readable or not."""
        self.read += samples

    def report(self, dataset: str, place: dict[str, Any], error: SampleError) -> None:
        """Write down an unreadable sample; `place` says where it lies (shard, key, offset).

        Raises RuntimeError when more than MAX_SHARE of the samples, or of MIN_SAMPLES at first, were unreadable.
        """
        self.unreadable += 1
        name = (dataset, error.sample_id)
        if name not in self._known:
            self._known.add(name)
            self._write({"dataset": dataset, **place, "sample": error.sample_id, "member": error.where, "error": error.problem})
        if self.unreadable > MAX_SHARE * max(self.read, MIN_SAMPLES):
            raise RuntimeError(
                f"{self.unreadable} of {self.read} samples could not be read (more than {MAX_SHARE:.0%}), the last in dataset"
                f" {dataset}: {error}; see {self.path or 'the log'} and check the storage or run python launch/data.py verify"
            )

    def _write(self, record: dict[str, Any]) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(record, ensure_ascii=False) + "\n"
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, line.encode())  # one write: lines of several processes do not mix
        finally:
            os.close(descriptor)


def masked(sample: EncodedSample) -> EncodedSample:
    """The sample with black pictures and no loss: it keeps its place, so nothing else in the pack changes."""
    width = VIDEO_ROW if any(isinstance(media, Video) for media in sample.media) else IMAGE_ROW
    return replace(
        sample,
        target_weights=np.zeros_like(sample.target_weights),
        patches=np.zeros((sample.patch_count, width), np.uint8),
    )


def stand_in(sample_id: str, source: str, tokens: int, pad_id: int) -> EncodedSample:
    """What takes the place of a sample whose JSON cannot be read: as many pad tokens, without loss."""
    return EncodedSample(
        sample_id=sample_id,
        source=source,
        task=None,
        input_ids=np.full(tokens, pad_id, np.int32),
        target_weights=np.zeros(tokens, np.float32),
        position_ids=np.broadcast_to(np.arange(tokens, dtype=np.int32), (3, tokens)),
        visual_positions=np.empty(0, np.int64),
        grids=np.empty((0, 3), np.int32),
        media=(),
        answer=None,
        prompt_length=tokens,
        patches=np.empty((0, IMAGE_ROW), np.uint8),
    )
