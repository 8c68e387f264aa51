"""Kill a rank with SIGKILL at a random step, start the same command again: nothing is lost, nothing is doubled.

Reference: the same run without interruption; the final weights and optimizer state must be equal bit for bit.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from visionloom.parallel import topology as topologies
from visionloom.parallel.config import ParallelConfig
from visionloom.tests.ranks import RankPool
from visionloom.tests.train.runs import metrics, run_config, run_words
from visionloom.tests.train.test_layouts import train

pytestmark = pytest.mark.long
STEPS = 24
SECONDS = 240
LAYOUT_TOLERANCE = 1e-6
"""Relative, as the fault matrix words it; 8.5e-8 measured: sums over ranks come in another order."""


def checkpoint_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a run's newest checkpoint: weights, optimizer moments and main weights (runs in the pool)."""
    from torch.distributed.checkpoint import FileSystemReader, load
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    from visionloom.train.checkpoint import read as checkpoint

    topology = topologies.start(ParallelConfig(), torch.device("cpu"))
    newest, damaged = checkpoint.newest(folder, topology)
    assert newest is not None and not damaged
    reader = FileSystemReader(newest.folder)
    stored = reader.read_metadata().state_dict_metadata
    loaded = {
        k: torch.empty(v.size, dtype=v.properties.dtype)
        for k, v in stored.items()
        if isinstance(v, TensorStorageMetadata)
    }
    load(loaded, storage_reader=reader)
    topologies.stop()
    return loaded


def start(words: list[str]) -> subprocess.Popen[str]:
    root = Path(__file__).parents[2]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "launch/pretrain.py",
        *words,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def kill_a_rank(launcher: subprocess.Popen[str], folder: Path, after_step: int, rank: int) -> None:
    """SIGKILL one rank as soon as the metrics show `after_step`."""
    deadline = time.monotonic() + SECONDS
    path = folder / "metrics.jsonl"
    while not path.exists() or path.read_text().count("\n") < after_step:
        assert launcher.poll() is None and time.monotonic() < deadline, (
            launcher.stdout.read() if launcher.stdout else ""
        )
        time.sleep(0.02)
    ranks = [
        p
        for p in psutil.Process(launcher.pid).children(recursive=True)
        if p.environ().get("RANK") == str(rank)
    ]
    ranks[0].send_signal(signal.SIGKILL)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_costs_nothing(
    victim: int, pool: RankPool, demo_data: Path, tmp_path: Path
) -> None:
    options = ["checkpoint.every_steps=5", "checkpoint.keep=2"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    pool.run(2, train, run_config(demo_data, whole, STEPS, 2, *options))

    words = run_words(demo_data, broken, STEPS, *options)
    first = start(words)
    killed_after = random.Random(victim).randint(6, STEPS - 3)
    kill_a_rank(first, broken, killed_after, victim)
    assert first.wait(SECONDS) != 0
    # Those that are not whole have another name; see train/checkpoint/write.py.
    kept = [folder.name for folder in (broken / "checkpoints/multimodal").glob("step-*[0-9]")]
    second = start(words)
    output, _ = second.communicate(timeout=SECONDS)
    assert second.returncode == 0, output

    lines, reference = metrics(broken), metrics(whole)
    assert (
        [line["step"] for line in lines]
        == [line["step"] for line in reference]
        == list(range(1, STEPS + 1))
    )
    exact = ("loss", "loss_by_source", "grad_norm", "lr", "tokens", "samples", "data_cursor")
    assert [[line[key] for key in exact] for line in lines] == [
        [line[key] for key in exact] for line in reference
    ]
    events = [json.loads(line) for line in (broken / "events.jsonl").read_text().splitlines()]
    resumed = [event for event in events if event["event"] == "resume"]
    assert [event["step"] for event in resumed] == [int(max(kept).removeprefix("step-"))]
    # The newest save may still be written when the rank is killed, however slow the disk; the one before it is whole by then.
    assert killed_after // 5 * 5 - 5 <= resumed[0]["step"] < STEPS

    ours, expected = (pool.run(1, checkpoint_tensors, folder)[0] for folder in (broken, whole))
    assert ours.keys() == expected.keys() and len(ours) > 100
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


ALIKE = ("step", "tokens", "samples", "data_cursor")


def test_another_number_of_ranks_goes_on_alike(
    pool: RankPool, demo_data: Path, tmp_path: Path
) -> None:
    """Row 26 of the fault matrix: two ranks, then one from their step 4, then four from its step 8.

    Reference: one process without interruption. Packs are planned for the run as a whole, so equal cursors are equal samples.
    """
    steps, options = (
        12,
        ["checkpoint.every_steps=4", "checkpoint.keep=9", "phases.multimodal.micro_batch=1"],
    )
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    pool.run(1, train, run_config(demo_data, whole, steps, 1, *options))
    for ranks, kept in ((2, 4), (1, 8), (4, steps)):
        pool.run(ranks, train, run_config(demo_data, broken, steps, ranks, *options))
        for folder in (broken / "checkpoints" / "multimodal").iterdir():
            if int(folder.name.removeprefix("step-")) > kept:
                shutil.rmtree(folder)
    lines, reference = metrics(broken), metrics(whole)
    assert [[line[key] for key in ALIKE] for line in lines] == [
        [line[key] for key in ALIKE] for line in reference
    ]
    assert [line["loss"] for line in lines] == pytest.approx(
        [line["loss"] for line in reference], rel=LAYOUT_TOLERANCE
    )
    events = [json.loads(line) for line in (broken / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "resume"] == [4, 8]


def newest_checkpoint(folder: Path) -> tuple[str | None, list[str]]:
    """Folder of the newest whole checkpoint, and what was passed over (runs in the pool)."""
    from visionloom.train.checkpoint import read as checkpoint

    topology = topologies.start(ParallelConfig(), torch.device("cpu"))
    found, damaged = checkpoint.newest(folder, topology)
    topologies.stop()
    return found.folder.name if found else None, damaged


def damage(path: Path, kind: str) -> None:
    """One flipped byte, a cut file, a missing file."""
    if kind == "flipped":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif kind == "cut":
        path.write_bytes(path.read_bytes()[:-7])
    else:
        path.unlink()


@pytest.mark.parametrize("kind", ["flipped", "cut", "missing"])
def test_a_damaged_checkpoint_is_passed_over(
    kind: str, pool: RankPool, demo_data: Path, tmp_path: Path
) -> None:
    pool.run(
        1,
        train,
        run_config(demo_data, tmp_path, 4, 1, "checkpoint.every_steps=1", "checkpoint.keep=3"),
    )
    folders = sorted((tmp_path / "checkpoints" / "multimodal").iterdir())
    victim: Any = next(folders[-1].glob("*.distcp"))
    damage(victim, kind)
    found, damaged = pool.run(1, newest_checkpoint, tmp_path)[0]
    assert found == folders[-2].name
    assert len(damaged) == 1 and victim.name in damaged[0]
