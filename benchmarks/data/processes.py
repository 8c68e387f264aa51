"""What a loader costs, its worker processes included: CPU time between two packs, and the most memory at one moment."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import psutil

SECONDS_BETWEEN: Final = 0.25
"""Of looking at memory."""


def cpu_seconds() -> float:
    """CPU time of this process and of the processes that it has started and that still run."""
    return sum(_times(process) for process in _tree(psutil.Process()))


def steady(packs: Iterator[tuple[int, int]], warm: int, images: int) -> dict[str, float]:
    """Take packs, each its images and tokens, and count from pack number `warm` on until there were so many images.

    What was prefetched when the counting begins is offset by what is prefetched when it ends.
    """
    started = time.perf_counter()
    next(packs)
    first = time.perf_counter() - started
    for _ in range(warm - 1):
        next(packs)
    cpu, seen, tokens, count = cpu_seconds(), 0, 0, 0
    while seen < images:
        found = next(packs)
        seen, tokens, count = seen + found[0], tokens + found[1], count + 1
    return {"images": seen, "tokens": tokens, "packs": count, "cpu": cpu_seconds() - cpu, "first": first}


def run_apart(file: Path, *words: str) -> dict[str, Any]:
    """Run a script that prints JSON in its last line; adds `memory`: the most bytes that it and its workers held.

    Memory is the sum of proportional set sizes: a page that processes share counts once. Raises RuntimeError if it fails.
    """
    process = subprocess.Popen([sys.executable, str(file), *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    known, most = psutil.Process(process.pid), 0
    while process.poll() is None:
        most = max(most, sum(map(_bytes, _tree(known))))
        time.sleep(SECONDS_BETWEEN)
    said, complaints = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{file.name} {' '.join(words)}: {complaints.strip()[-2000:]}")
    return {**json.loads(said.strip().splitlines()[-1]), "memory": most}


def _tree(process: psutil.Process) -> list[psutil.Process]:
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _times(process: psutil.Process) -> float:
    try:
        used = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return used.user + used.system


def _bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0
