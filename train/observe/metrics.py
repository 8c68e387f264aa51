"""metrics.jsonl and events.jsonl: one honest line for each optimizer step and for each event of a run."""

import contextlib
import errno
import json
import os
import resource
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal

import torch

from visionloom.common.atomic import replacing
from visionloom.common.errors import UserError
from visionloom.common.jsonfile import JsonError, load_json, parse_json
from visionloom.common.places import PlaceError, read_located

METRICS, EVENTS = "metrics.jsonl", "events.jsonl"
WAITING = "unwritten.jsonl"
"""Lines that a run could not write, left in the folder of its checkpoints."""
LARGEST_WAITING: Final = 1 << 26
"""Bytes: 64 MiB, some 70,000 lines."""
TAIL_BYTES: Final = 1 << 16
"""Of a log, in which its last line lies whole: a line of metrics has 1 kB."""
LARGEST_NUMBER: Final = 1e30
"""Sums of larger ones could overflow, and matplotlib fails on axes that long."""
ASIDE = "before-"
"""Beginning of the names of files and folders that were moved aside."""

PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12}
"""Dense bf16 peak by the vendor's data sheet; MFU is null on any other device."""


class RunLog:
    """Appends to a run's two logs; the main rank alone holds one.

    A line that cannot be written is kept and tried again with the next one; the loop sees `fault` and ends the run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fault = ""
        """Why lines are waiting; empty if none are."""
        self._waiting: list[tuple[str, str]] = []
        folder.mkdir(parents=True, exist_ok=True)
        self._end_last_event()

    def metric(self, line: Mapping[str, Any]) -> None:
        """Write the line of one optimizer step."""
        self._append(METRICS, line)

    def event(self, event: str, **fields: Any) -> None:
        """Write one event with the time in seconds since 1970."""
        self._append(EVENTS, {"time": round(time.time(), 3), "event": event, **fields})

    def rewind(self, step: int) -> list[float]:
        """Drop the lines of steps after `step` (and a line that was cut off), so that a resumed run has no double.

        Returns:
            the seconds of each step that was dropped.
        """
        path = self.folder / METRICS
        if not path.exists():
            return []
        if path.is_symlink() or not path.is_file():
            raise UserError(f"{path} is no file, or a link: put the file itself there")
        kept, dropped = _parted(path.read_text(errors="replace"), step)
        # Begun anew after an early end: nothing is thrown away.
        if not kept and path.stat().st_size:
            path.rename(aside(path))
            return dropped
        with replacing(path) as file:
            file.write("".join(text + "\n" for text in kept).encode())
        return dropped

    def last_time(self) -> float | None:
        """Return when the last line of either log was written, in seconds since 1970; None if they have none."""
        times = [_last_time(self.folder / name) for name in (METRICS, EVENTS)]
        return max((each for each in times if each is not None), default=None)

    def leave_waiting(self, folder: Path) -> None:
        """Write the waiting lines into another folder, where a checkpoint could be written, for the next start."""
        if self._waiting:
            lines = "".join(json.dumps(line) + "\n" for line in self._waiting)
            with replacing(folder / WAITING) as file:
                file.write(lines.encode())

    def load_waiting(self, folder: Path) -> None:
        """Write the lines that an earlier start has left; UserError if the file is none of a run's."""
        path = folder / WAITING
        where = str(path)
        try:
            content = read_located(folder, WAITING, LARGEST_WAITING)
        except FileNotFoundError:
            return
        except PlaceError as error:
            raise UserError(f"{path} {error}: remove it") from None
        for text in content.splitlines():
            try:
                name, line = parse_json(
                    text,
                    tuple[Literal["metrics.jsonl", "events.jsonl"], str],
                    where,
                )
                self._append(name, dict(load_json(line, where, finite=False)))
            except (JsonError, TypeError, ValueError) as error:
                raise UserError(
                    f"{path} holds what no run has left there ({error}): remove it"
                ) from None
        # Kept while lines still wait, in case this start ends too.
        if not self.fault:
            path.unlink()

    def _end_last_event(self) -> None:
        """End a line that a crash cut off, so that it stays by itself."""
        path = self.folder / EVENTS
        if path.is_file() and not path.is_symlink() and path.stat().st_size:
            with path.open("rb") as file:
                file.seek(-1, os.SEEK_END)
                cut_off = file.read() != b"\n"
            if cut_off:
                self._write(EVENTS, "\n")

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        """Write a line after those that wait, in order; those that fail wait on."""
        self._waiting.append((name, json.dumps(line) + "\n"))
        self.fault = ""
        while self._waiting and not self.fault:
            self.fault = self._write(*self._waiting[0])
            if not self.fault:
                self._waiting.pop(0)

    def _write(self, name: str, line: str) -> str:
        """Append a whole line or nothing; returns why it could not be written, empty if it was."""
        path = self.folder / name
        try:
            # A pipe would let the run wait for a reader.
            if path.is_symlink() or (path.exists() and not path.is_file()):
                return f"{path} is no file, or a link: put the file itself there"
            if not append_whole(path, line.encode()):
                return f"{path}: {os.strerror(errno.ENOSPC)}"
        except OSError as error:
            return f"{path}: {error.strerror}"
        return ""


def append_whole(path: Path, content: bytes) -> bool:
    """Append all bytes or none; returns whether there was room, OSError for any other fault."""
    # Unbuffered, so that a write that fits in part is seen here and not when the file is closed.
    with path.open("ab", buffering=0) as file:
        end = file.tell()
        try:
            complete = file.write(content) == len(content)
        except OSError:
            file.truncate(end)
            raise
        if not complete:  # a disk that was filled by the first half
            file.truncate(end)
    return complete


def read_lines(text: str, name: str) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file of JSON lines; lines that a crash cut off, or that are none, are skipped."""
    for line in text.splitlines():
        with contextlib.suppress(JsonError):
            value = load_json(line, name, finite=False)  # a loss may be NaN
            if isinstance(value, dict):
                yield value


def aside(path: Path) -> Path:
    """Return a free name in the same folder that no start looks at."""
    stamp = f"{ASIDE}{time.strftime('%Y%m%d-%H%M%S')}"
    name = path.with_name(f"{stamp}.{path.name}")
    count = 1
    while name.exists():  # two starts in the same second
        count += 1
        name = path.with_name(f"{stamp}-{count}.{path.name}")
    return name


def number(value: Any) -> float | None:
    """Return a number that can be drawn and added up, as a float; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    # Not `>=`, which would let NaN pass.
    return float(value) if abs(value) < LARGEST_NUMBER else None


def _step_of(line: Mapping[str, Any]) -> int:
    """Return the step of a line; 0 for a line that was cut off by a crash."""
    step = line.get("step")
    return step if isinstance(step, int) else 0


def _parted(text: str, step: int) -> tuple[list[str], list[float]]:
    """Return the lines of metrics up to a step, and the seconds of each later one."""
    kept, dropped = list[str](), list[float]()
    for row in text.splitlines():
        for line in read_lines(row, METRICS):
            if 0 < _step_of(line) <= step:
                kept.append(row)
            else:
                dropped.append(number(line.get("step_seconds")) or 0.0)
    return kept, dropped


def _last_time(path: Path) -> float | None:
    """Return the time of the last line of a log that has one."""
    if path.is_symlink() or not path.is_file():
        return None
    with path.open("rb") as file:
        file.seek(-min(TAIL_BYTES, path.stat().st_size), os.SEEK_END)
        text = file.read().decode(errors="replace")
    times = [number(line.get("time")) for line in read_lines(text, path.name)]
    return next((each for each in reversed(times) if each is not None), None)


def memory_gib(device: torch.device) -> float:
    """Return the most memory that this rank has used, in GiB: allocated on a GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB


def peak_flops(device: torch.device) -> float | None:
    """Return the peak of the device in bf16 FLOP/s, None if it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for key, peak in PEAK_FLOPS.items():
        if key in name:
            return peak
    return None
