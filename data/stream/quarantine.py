"""What happens to samples that cannot be read at training time: masked, written down, and counted."""

import fcntl
import json
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from visionloom.data.encode.encode import EncodedSample
from visionloom.data.encode.patches import IMAGE_ROW
from visionloom.data.shards.sample import SampleError

MIN_SAMPLES: Final = 10_000
"""The share is taken of at least this many samples: with the default of 1e-3, ten early ones stop nothing."""


@dataclass(slots=True)
class Quarantine:
    """Writes a JSON line for each unreadable sample of a run, once, and stops the run when they are too many.

    Several processes may share the file, and a resumed run goes on with it: what it names already is not written again.
    """

    path: Path | None = None
    """File of JSON lines; None: only counted."""
    max_bad_fraction: float = 1e-3
    """Share of unreadable samples above which the data, and not a sample, is at fault."""
    read: int = 0
    unreadable: int = 0
    _known: set[tuple[str, str, str]] = field(default_factory=set)
    _seen_bytes: int = 0
    """How much of the file is in _known."""

    def passed(self, samples: int) -> None:
        """Count samples that were tried, readable or not."""
        self.read += samples

    def report(
        self,
        dataset: str,
        place: dict[str, Any],
        error: SampleError,
        step: int | None = None,
    ) -> None:
        """Write down an unreadable sample; `place` says where it lies (shard, key, offset and crc32 of the member).

        Raises RuntimeError when more than max_bad_fraction of the samples, or of MIN_SAMPLES at first, were unreadable.
        """
        self.unreadable += 1
        known = {} if step is None else {"step": step}
        facts = {"member": error.where, "error": error.problem, "sample": error.sample_id}
        self._write({**known, "dataset": dataset, **place, **facts})
        # after it was written down, so that the last one is in the file too
        self._check_share(dataset, error)

    def _check_share(self, dataset: str, last: SampleError) -> None:
        if self.unreadable > self.max_bad_fraction * max(self.read, MIN_SAMPLES):
            raise RuntimeError(
                f"{self.unreadable} of {self.read} samples could not be read (more than data.max_bad_fraction ="
                f" {self.max_bad_fraction:g}), the last in dataset {dataset}: {last}; see {self.path or 'the log'} and check"
                " the storage or run python launch/data.py verify"
            )

    def _write(self, record: dict[str, Any]) -> None:
        if self.path is None or _name(record) in self._known:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab+") as file:
            # of several processes that meet the same sample, one writes it
            fcntl.flock(file, fcntl.LOCK_EX)
            broken_off = self._read_new_lines(file)
            if _name(record) not in self._known:
                line = json.dumps(record, ensure_ascii=False) + "\n"
                # a line that a crash cut short must not swallow this one
                file.write((b"\n" if broken_off else b"") + line.encode())

    def _read_new_lines(self, file: BinaryIO) -> bool:
        """Note what other processes have added; return whether the last line was cut short."""
        file.seek(self._seen_bytes)
        complete, newline, broken_off = file.read().rpartition(b"\n")
        for line in complete.splitlines():
            # a line that a crash cut short names none
            with suppress(ValueError, KeyError):
                self._known.add(_name(json.loads(line)))
        self._seen_bytes += len(complete) + len(newline)
        return bool(broken_off)


def _name(record: dict[str, Any]) -> tuple[str, str, str]:
    """Return what tells the sample of a record from others."""
    return str(record["dataset"]), str(record.get("shard")), str(record.get("key"))


def stand_in(sample_id: str, dataset: str, tokens: int, pad_id: int) -> EncodedSample:
    """Make what takes the place of a sample whose JSON cannot be read: pad tokens without loss."""
    positions = np.arange(tokens, dtype=np.int32)
    return EncodedSample(
        sample_id=sample_id,
        dataset=dataset,
        task=None,
        input_ids=np.full(tokens, pad_id, np.int32),
        target_weights=np.zeros(tokens, np.float32),
        position_ids=np.broadcast_to(positions, (3, tokens)),
        visual_positions=np.empty(0, np.int64),
        grids=np.empty((0, 3), np.int32),
        media=(),
        answer=None,
        prompt_length=tokens,
        patches=np.empty((0, IMAGE_ROW), np.uint8),
    )
