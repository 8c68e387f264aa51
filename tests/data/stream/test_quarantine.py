"""The quarantine: each sample once over processes and restarts, and a limit that small runs do not meet by chance."""

import json
from multiprocessing import get_context
from pathlib import Path

import pytest

from visionloom.data.shards.sample import SampleError
from visionloom.data.stream.quarantine import Quarantine


def report(quarantine: Quarantine, number: int, step: int | None = None) -> None:
    place = {
        "shard": f"set-{number % 3:06d}.tar",
        "key": f"{number:09d}",
        "offset": 512 * number,
        "crc32": f"{number:08x}",
    }
    quarantine.report("set", place, SampleError(f"s:{number}", "a.png", "cannot be decoded"), step)


def read(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_names_everything(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "run" / "quarantine.jsonl")
    report(quarantine, 7, step=12)
    report(quarantine, 8)
    first, second = read(tmp_path / "run" / "quarantine.jsonl")
    assert first == {
        "step": 12,
        "dataset": "set",
        "shard": "set-000001.tar",
        "key": "000000007",
        "offset": 3584,
        "crc32": "00000007",
        "member": "a.png",
        "error": "cannot be decoded",
        "sample": "s:7",
    }
    assert "step" not in second


def test_ten_bad_samples_stop_nothing_and_the_eleventh_does(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "q.jsonl")
    quarantine.passed(30)
    for number in range(10):
        report(quarantine, number)
    with pytest.raises(
        RuntimeError,
        match=r"11 of 30 samples could not be read \(more than data\.max_bad_fraction = 0\.001\)",
    ):
        report(quarantine, 10)
    assert len(read(tmp_path / "q.jsonl")) == 11


@pytest.mark.parametrize(
    ("fraction", "tolerated"), [(1e-3, 50), (0.01, 500), (0.0, 0), (1.0, 2000)]
)
def test_the_limit_is_a_share_of_what_was_read(fraction: float, tolerated: int) -> None:
    quarantine = Quarantine(None, fraction)
    quarantine.passed(50_000)
    for number in range(tolerated):
        report(quarantine, number)
    if tolerated < 2000:
        with pytest.raises(RuntimeError):
            report(quarantine, tolerated)


def write_many(path: Path, first: int) -> None:
    quarantine = Quarantine(path, 1.0)
    for number in range(first, first + 40):
        report(quarantine, number)
        report(quarantine, number)


def test_processes_write_each_sample_once(tmp_path: Path) -> None:
    """Four processes with overlapping samples."""
    with get_context("fork").Pool(4) as workers:
        workers.starmap(write_many, [(tmp_path / "q.jsonl", first) for first in (0, 10, 20, 0)])
    found = [int(str(row["key"])) for row in read(tmp_path / "q.jsonl")]
    assert sorted(found) == list(range(60))


def test_a_line_cut_short_by_a_crash_costs_itself_only(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    write_many(path, 0)
    content = path.read_bytes()
    path.write_bytes(content[:-30])
    write_many(path, 0)
    lines = path.read_text().splitlines()
    assert lines[:39] == content.decode().splitlines()[:39]
    assert lines[40:] == content.decode().splitlines()[39:], (
        "what was cut short is written again, on a line of its own"
    )
