"""metrics.jsonl and events.jsonl: one honest line for each optimizer step and for each event of a run."""

import json
import resource
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

METRICS, EVENTS = "metrics.jsonl", "events.jsonl"

PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12}
"""Dense bf16 peak by the vendor's data sheet; MFU is null on any other device."""


class RunLog:
    """Appends to a run's two logs; the main rank alone holds one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def metric(self, line: Mapping[str, Any]) -> None:
        """Write the line of one optimizer step."""
        self._append(METRICS, line)

    def event(self, event: str, **fields: Any) -> None:
        """Write one event with the time in seconds since 1970."""
        self._append(EVENTS, {"time": round(time.time(), 3), "event": event, **fields})

    def rewind(self, step: int) -> None:
        """Drop the lines of steps after `step` (and a line that was cut off), so that a resumed run has no double."""
        path = self.folder / METRICS
        if not path.exists():
            return
        kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
        staged = path.with_suffix(".tmp")
        staged.write_text("".join(line + "\n" for line in kept))
        staged.replace(path)

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        with (self.folder / name).open("a") as file:
            file.write(json.dumps(line) + "\n")


def _step_of(line: str) -> float:
    """The step of a line; infinite for a line that was cut off by a crash."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def memory_gib(device: torch.device) -> float:
    """Most memory this rank has used: allocated on the GPU, or resident on a CPU, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def peak_flops(device: torch.device) -> float | None:
    """Peak of the device in bf16 FLOP/s, or None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)
