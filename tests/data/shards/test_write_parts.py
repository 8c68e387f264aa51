"""Writing by parts: the same bytes for any number of processes and after any interruption. Reference: one undisturbed run."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from visionloom.common.errors import UserError
from visionloom.data.shards.dataset import Dataset
from visionloom.data.shards.sample import Sample, Text
from visionloom.data.shards.write import SampleMembers, ShardLimits, write_shards
from visionloom.data.shards.write_parts import PartLog, SourcePart, Target, write_parts
from visionloom.launch.data import main
from visionloom.tests.data.parts import Numbers
from visionloom.tests.data.samples import picture_question


def write(folder: Path, stop: int = -1, workers: int = 1, samples: int = 4) -> None:
    target = Target(folder, "set", ShardLimits(samples, 1 << 20), workers)
    tally = write_parts(Numbers(stop), target, {"source": "numbers"}, lambda done, total: None)
    assert tally.counts == {"records": 28}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("parts") / "whole"
    write(folder)
    assert len(Dataset.open(folder, "set")) == 23
    return files(folder)


def test_what_is_written(whole: dict[str, bytes]) -> None:
    assert [name for name in whole if name.endswith(".tar")] == [
        f"set-{number:06d}.tar" for number in range(8)
    ]
    assert [json.loads(line)["record"] for line in whole["skipped.jsonl"].splitlines()] == [
        4,
        9,
        14,
        19,
        24,
    ]
    assert json.loads(whole["convert.json"])["counts"] == {"records": 28}


def test_the_number_of_processes_has_no_effect(whole: dict[str, bytes], tmp_path: Path) -> None:
    for workers in (2, 3):
        write(tmp_path / f"set{workers}", workers=workers)
        assert files(tmp_path / f"set{workers}") == whole


@pytest.mark.parametrize("stops", [[0], [3], [13, 14], [27, 27, 2]])
def test_an_interrupted_writer_continues(
    stops: list[int], whole: dict[str, bytes], tmp_path: Path
) -> None:
    for stop in stops:
        if stop >= 7 * len(list((tmp_path / "set" / ".converting").glob("part*"))):
            with pytest.raises(KeyboardInterrupt):
                write(tmp_path / "set", stop)
            assert not (tmp_path / "set" / "dataset.json").exists()
    before = {
        path: path.stat().st_mtime_ns for path in (tmp_path / "set" / ".converting").glob("part*")
    }
    assert len(before) == max(stops) // 7
    write(tmp_path / "set")
    assert files(tmp_path / "set") == whole


@pytest.mark.parametrize("moves", [0, 1, 2, 7, 15])
def test_an_interruption_while_shards_get_their_numbers(
    moves: int, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, replace = [moves], os.replace

    def replace_some(source: Path, target: Path) -> None:
        if Path(source).parent.name == ".converting" and Path(target).parent.name == "set":
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
        replace(source, target)

    monkeypatch.setattr("os.replace", replace_some)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "set")
    monkeypatch.undo()
    write(tmp_path / "set")
    assert files(tmp_path / "set") == whole


def test_a_killed_command_continues(tmp_path: Path) -> None:
    """SIGKILL to the command while two processes write; nothing of it stays behind."""
    lines = (json.dumps({"text": f"number {number} " + "x" * 2000}) for number in range(8_000))
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    words = [
        "convert",
        "jsonl",
        str(tmp_path / "texts.jsonl"),
        "",
        "--name",
        "set",
        "--samples-per-shard",
        "500",
    ]

    def command(folder: str, workers: str) -> list[str]:
        words[3] = str(tmp_path / folder)
        return [sys.executable, "-m", "visionloom.launch.data", *words, "--workers", workers]

    started = subprocess.Popen(command("killed", "2"), start_new_session=True)
    staging = tmp_path / "killed" / ".converting"
    while not list(staging.glob("part*")) and started.poll() is None:
        time.sleep(0.02)
    os.kill(started.pid, signal.SIGKILL)
    assert started.wait() == -signal.SIGKILL
    with pytest.raises(ProcessLookupError):  # the writers notice that their parent is gone
        for _ in range(3000):
            os.killpg(started.pid, 0)
            time.sleep(0.02)
    assert not (tmp_path / "killed" / "dataset.json").exists()
    for folder in ("killed", "whole"):
        assert main(command(folder, "1")[3:]) == 0
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_a_finished_dataset_is_left_alone(tmp_path: Path) -> None:
    write(tmp_path / "set")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "set").iterdir()}
    write(tmp_path / "set")
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "set").iterdir()} == before
    with pytest.raises(UserError, match="already holds a dataset"):
        write(tmp_path / "set", samples=5)


def test_other_words_do_not_continue_a_conversion(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "set", stop=10)
    with pytest.raises(
        UserError, match=r"unfinished conversion with limits=.*use the same words again"
    ):
        write(tmp_path / "set", samples=5)


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Nested(Numbers):
        def samples(self, part: SourcePart, log: PartLog) -> Iterator[SampleMembers]:
            write(tmp_path / "set")
            yield from super().samples(part, log)

    target = Target(tmp_path / "set", "set", ShardLimits(4, 1 << 20), 1)
    with pytest.raises(UserError, match="is being written by another process"):
        write_parts(Nested(), target, {"source": "numbers"}, lambda done, total: None)


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    class Nothing(Numbers):
        def samples(self, part: SourcePart, log: PartLog) -> Iterator[SampleMembers]:
            return iter(())

    with pytest.raises(UserError, match="no sample could be converted"):
        write_parts(
            Nothing(),
            Target(tmp_path / "set", "set", ShardLimits(), 1),
            {},
            lambda done, total: None,
        )


# ---- shards by bytes


@pytest.mark.parametrize("shard_bytes", [30_000, 100_000, 1 << 30])
def test_no_shard_is_larger_than_asked(shard_bytes: int, tmp_path: Path) -> None:
    samples = [
        picture_question(number, sides=(32, 32 * (1 + number % 4)), words=number)
        for number in range(40)
    ]
    write_shards(
        tmp_path / "set", "set", iter(samples), samples_per_shard=25, shard_bytes=shard_bytes
    )
    dataset = Dataset.open(tmp_path / "set", "set")
    assert [dataset.sample(index) for index in range(40)] == [sample for sample, _ in samples]
    sizes = [shard.bytes for shard in dataset.shards]
    assert max(sizes) <= shard_bytes and max(shard.samples for shard in dataset.shards) <= 25
    if shard_bytes < 1 << 20:  # no shard could have taken in the first sample of the next
        following = [sum(map(len, samples[place][1].values())) for place in starts(dataset)[1:]]
        assert all(
            size + more + 6 * 512 + 10_240 > shard_bytes
            for size, more in zip(sizes, following, strict=False)
        )


def starts(dataset: Dataset) -> list[int]:
    return [
        sum(shard.samples for shard in dataset.shards[:number])
        for number in range(len(dataset.shards))
    ]


def test_a_sample_larger_than_a_shard_has_one_of_its_own(tmp_path: Path) -> None:
    texts = [Sample(f"x:{size}", "doc", content=(Text("x" * size),)) for size in (10, 50_000, 10)]
    write_shards(tmp_path / "set", "set", [(sample, {}) for sample in texts], shard_bytes=20_000)
    assert [shard.samples for shard in Dataset.open(tmp_path / "set", "set").shards] == [1, 1, 1]
