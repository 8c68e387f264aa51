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
    return {
        "images": seen,
        "tokens": tokens,
        "packs": count,
        "cpu": cpu_seconds() - cpu,
        "first": first,
    }


def run_apart(file: Path, *words: str) -> dict[str, Any]:
    """Run a script that prints JSON in its last line; adds the most bytes that it and its workers held at one moment.

    `memory` is what is their own or shared among them, each page once; pages of files, such as libraries, are left out, for
    what of them is counted would depend on what else runs on the machine. `resident` is the plain sum of resident sizes,
    in which each process counts the libraries again. Raises RuntimeError if the script fails.
    """
    process = subprocess.Popen(
        [sys.executable, str(file), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    known, most = psutil.Process(process.pid), {"memory": 0, "resident": 0}
    while process.poll() is None:
        held = [_held(one.pid) for one in _tree(known)]
        most = {
            "memory": max(most["memory"], sum(own for own, _ in held)),
            "resident": max(most["resident"], sum(all_ for _, all_ in held)),
        }
        time.sleep(SECONDS_BETWEEN)
    said, complaints = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{file.name} {' '.join(words)}: {complaints.strip()[-2000:]}")
    return {**json.loads(said.strip().splitlines()[-1]), **most}


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


def _held(pid: int) -> tuple[int, int]:
    """Bytes that are a process's own share, without files, and its resident size. Source: Linux, proc_pid_smaps(5)."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:  # it has ended
        return 0, 0
    sizes = {
        name: int(rest.split()[0]) * 1024
        for name, _, rest in (line.partition(":") for line in lines)
    }
    return sizes.get("Pss_Anon", 0) + sizes.get("Pss_Shmem", 0), sizes.get("Rss", 0)
