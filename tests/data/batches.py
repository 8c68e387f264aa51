"""One number for all that a batch holds, for tests that compare streams."""

import hashlib
from collections.abc import Iterable

from visionloom.data.stream.batch import PackedBatch

TENSORS = (
    "input_ids",
    "labels",
    "loss_weights",
    "position_ids",
    "cu_seqlens",
    "patches",
    "grid_thw",
    "visual_rows",
)


def digest(batches: Iterable[PackedBatch]) -> str:
    """Hash the tensors and sample ids of batches, in order."""
    total = hashlib.sha256()
    for batch in batches:
        for name in TENSORS:
            total.update(getattr(batch, name).numpy().tobytes())
        total.update(repr(batch.sample_ids).encode())
    return total.hexdigest()
