"""What must survive: ranks killed at any moment, some of them while a checkpoint is written. `make faults` runs these.

Reference: the same run without interruption; final weights and optimizer state must be equal bit for bit.
"""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from visionloom.tests.launch.guarding.test_claim import begin
from visionloom.tests.launch.guarding.test_watch import start_rank, wait_for_status
from visionloom.tests.ranks import RankPool
from visionloom.tests.train.disks import mounted
from visionloom.tests.train.runs import metrics, run_config, run_words
from visionloom.tests.train.test_lost import outcome
from visionloom.tests.train.test_resume import checkpoint_tensors
from visionloom.train.config import RunConfig
from visionloom.train.observe.logging_config import LoggingConfig
from visionloom.train.observe.trackers import Trackers

pytestmark = pytest.mark.faults
STEPS, EVERY, KILLS, SEED = 30, 3, 20, 7
KILLS_IN_PLACE = 12
"""Four of each kind: rank 0, rank 1, both."""
ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT / ".link"), "OMP_NUM_THREADS": "1"}


def events(folder: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for line in (folder / "events.jsonl").read_text().splitlines()
        if line.endswith("}")
    ]


def killed_runs(module: str, kills: int, words: list[str], work: Path) -> list[dict[str, Any]]:
    """What a module that kills ranks of real runs prints."""
    words = [word for word in words if not word.startswith("run.folder=")]
    command = [
        sys.executable,
        "-m",
        f"visionloom.tests.train.{module}",
        str(work),
        str(SEED),
        str(kills),
        *words,
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=500, env=ENVIRONMENT, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr + (work / "log.txt").read_text()[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def attempts(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    work = tmp_path_factory.mktemp("faults")
    words = run_words(demo_data, work, STEPS, f"checkpoint.every_steps={EVERY}")
    return killed_runs("forked", KILLS, words, work)


@pytest.fixture(scope="module")
def restarts(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    work = tmp_path_factory.mktemp("restarts")
    words = run_words(demo_data, work, STEPS, f"checkpoint.every_steps={EVERY}")
    return killed_runs("restarted", KILLS_IN_PLACE, words, work)


def test_every_attempt_goes_on_from_the_last_whole_checkpoint(
    attempts: list[dict[str, Any]],
) -> None:
    """Rows 3 and 6 of the fault matrix: a new job after each kill, many of them while a checkpoint is written."""
    assert sum(attempt["killed"] for attempt in attempts) >= KILLS
    for number, attempt in enumerate(attempts):
        if 93 in attempt["codes"]:
            before = attempts[max(0, number - 3) : number]
            assert [(each["folder"], each["killed"]) for each in before] == [
                (attempt["folder"], True)
            ] * 3
        else:
            assert attempt["killed"] or attempt["codes"] == [0, 0], attempt


def test_nothing_is_lost_or_doubled(attempts: list[dict[str, Any]]) -> None:
    reference = metrics(Path(attempts[0]["folder"]))
    for folder in {attempt["folder"] for attempt in attempts}:
        lines = metrics(Path(folder))
        assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
        assert [line["loss"] for line in lines] == [line["loss"] for line in reference]


def test_resuming_takes_the_newest_commit(attempts: list[dict[str, Any]]) -> None:
    """A resume goes on from the last checkpoint that was committed before the kill, or from one whose event was cut off."""
    resumed = 0
    for folder in {attempt["folder"] for attempt in attempts}:
        newest = 0
        for event in events(Path(folder)):
            if event["event"] == "checkpoint":
                newest = event["step"]
            elif event["event"] == "resume":
                assert newest <= event["step"] <= newest + 2 * EVERY
                newest, resumed = event["step"], resumed + 1
            assert event["event"] != "damaged_checkpoint"
    assert resumed >= 5


def test_the_weights_end_as_if_nothing_had_happened(
    attempts: list[dict[str, Any]], pool: RankPool
) -> None:
    folders = sorted({attempt["folder"] for attempt in attempts})
    (expected, *others) = (pool.run(1, checkpoint_tensors, Path(folder))[0] for folder in folders)
    for found in others:
        assert found.keys() == expected.keys()
        assert [
            name for name, tensor in expected.items() if not torch.equal(tensor, found[name])
        ] == []


def test_restarts_in_place_lose_nothing(restarts: list[dict[str, Any]], pool: RankPool) -> None:
    """Rows 1 and 2: torch's agent starts the ranks anew in the same job, and no kill costs anything."""
    assert sum(len(run["killed"]) for run in restarts) == KILLS_IN_PLACE
    assert {victim for run in restarts for victim in run["killed"]} == {"0", "1", "0+1"}
    assert [run["ended"] for run in restarts] == ["by itself"] * len(restarts)
    folders = [Path(run["folder"]) for run in restarts]
    reference = metrics(folders[0])
    for folder, run in zip(folders, restarts, strict=True):
        assert [line["step"] for line in metrics(folder)] == list(range(1, STEPS + 1))
        assert [line["loss"] for line in metrics(folder)] == [line["loss"] for line in reference]
        status = json.loads((folder / "status.json").read_text())
        assert (status["state"], status["step"], status["restarts"]) == (
            "done",
            STEPS,
            len(run["killed"]),
        )
    (expected, *others) = (pool.run(1, checkpoint_tensors, folder)[0] for folder in folders)
    for found in others:
        assert [
            name for name, tensor in expected.items() if not torch.equal(tensor, found[name])
        ] == []


def test_restarts_say_what_was_killed(restarts: list[dict[str, Any]]) -> None:
    """Rows 1 and 2: one line names rank, signal and step, where another rank was left to see it."""
    alone = told = 0
    for run in restarts:
        causes = [event for event in events(Path(run["folder"])) if event["event"] == "last_end"]
        alone += sum(victim != "0+1" for victim in run["killed"])
        told += sum("was killed by signal 9 (SIGKILL)" in event["cause"] for event in causes)
    assert alone >= 8 and told >= alone // 2, (told, alone)


def torchrun(
    words: list[str], *options: str, script: tuple[str, ...] = ("launch/pretrain.py",)
) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        *options,
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(
        [*command, *script, *words], cwd=ROOT, env=ENVIRONMENT, text=True, **pipes
    )  # type: ignore[call-overload,no-any-return]


def wait_for_steps(process: subprocess.Popen[str], folder: Path, steps: int) -> None:
    until = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() or len(metrics(folder)) < steps:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)


def rank_processes(process: subprocess.Popen[str]) -> dict[str, psutil.Process]:
    """The ranks that an agent has started, by rank: its own children."""
    return {child.environ()["RANK"]: child for child in psutil.Process(process.pid).children()}


def test_a_killed_agent_takes_everything_with_it(demo_data: Path, tmp_path: Path) -> None:
    """Row 5: neither ranks nor the processes that decode for them outlive torchrun's agent."""
    with torchrun(run_words(demo_data, tmp_path / "run", 4000, "data.workers=1")) as agent:
        wait_for_steps(agent, tmp_path / "run", 2)
        family = psutil.Process(agent.pid).children(recursive=True)
        assert len(family) >= 4
        agent.kill()
    _, alive = psutil.wait_procs(family, timeout=35)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []


def test_a_killed_rank_is_named_when_the_job_ends(demo_data: Path, tmp_path: Path) -> None:
    """Rows 1 and 16: without restarts, status.json has the cause and not the connection that was lost because of it."""
    folder = tmp_path / "run"
    with torchrun(run_words(demo_data, folder, 4000)) as agent:
        wait_for_steps(agent, folder, 5)
        rank_processes(agent)["1"].kill()
        agent.communicate(timeout=60)
    status = json.loads((folder / "status.json").read_text())
    assert (agent.returncode, status["code"], status["state"], status["rank"]) == (
        1,
        1,
        "failed",
        1,
    )
    assert status["cause"] == "rank 1 was killed by signal 9 (SIGKILL)" and status["step"] >= 5


MEMORY = Path("/sys/fs/cgroup/memory")


@pytest.fixture
def small_memory(tmp_path: Path) -> Iterator[Path]:
    """A control group of 200 MiB, of either version."""
    root = MEMORY if MEMORY.is_dir() else MEMORY.parent
    group = root / f"visionloom-{os.getpid()}"
    limit = group / ("memory.limit_in_bytes" if MEMORY.is_dir() else "memory.max")
    try:
        group.mkdir()
        limit.write_text(str(200 << 20))
    except OSError as error:
        pytest.skip(f"control groups need root: {error}")
    yield group
    group.rmdir()


def test_a_rank_without_memory_is_named(small_memory: Path, tmp_path: Path) -> None:
    """Row 18: the kernel's own kill. Reference: its count in /proc/vmstat."""
    (tmp_path / "attempt_0").mkdir()
    fill = f"Path('{small_memory}/cgroup.procs').write_text(str(os.getpid())); x = [bytearray(1 << 20) for _ in range(1000)]"
    survivor = start_rank(0, tmp_path / "attempt_0", tmp_path, "")
    with (
        survivor,
        start_rank(1, tmp_path / "attempt_0", tmp_path, f"time.sleep(0.5); {fill}") as victim,
    ):
        status = wait_for_status(tmp_path)
        assert victim.wait(timeout=60) == -9
        survivor.kill()
    assert status["rank"] == 1 and status["step"] == 17
    assert "rank 1 was killed by signal 9 (SIGKILL), likely out of memory" in status["cause"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MiB."""
    with mounted(tmp_path / "small", 64) as folder:
        yield folder


def disk_that_fails(config: RunConfig, disk: Path, fault: str) -> str:
    """Train, and fill the disk or make it read-only after the third step (runs in the pool)."""
    from visionloom.train.observe.metrics import RunLog

    metric = RunLog.metric

    def spoil(self: RunLog, line: Any) -> None:
        if line["step"] == 3:
            if fault == "full":
                with contextlib.suppress(OSError), (disk / "filler").open("wb") as file:
                    while True:
                        file.write(bytes(1 << 16))
            else:
                subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        metric(self, line)

    RunLog.metric = spoil  # type: ignore[method-assign]
    try:
        return outcome(config)
    finally:
        RunLog.metric = metric  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("fault", "said"), [("full", "No space left on device"), ("read-only", "Read-only file system")]
)
def test_a_disk_that_fails_under_a_run(
    fault: str, said: str, small_disk: Path, demo_data: Path, pool: RankPool, tmp_path: Path
) -> None:
    """Rows 19 and 21 while training: one line after an attempt to save, and all that was saved is there when it is mended."""
    folder = small_disk / "run"
    config = run_config(
        demo_data,
        folder,
        6,
        2,
        "checkpoint.every_steps=2",
        "checkpoint.keep=1",
        "checkpoint.asynchronous=false",
    )
    for told in pool.run(2, disk_that_fails, config, small_disk, fault):
        assert f"metrics.jsonl: {said}: the run's log cannot be written" in told
        assert re.search(r"step-0000000\d could not be saved", told) and "\n" not in told
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    (small_disk / "filler").unlink(missing_ok=True)
    assert pool.run(2, outcome, config) == ["done", "done"]
    assert [line["step"] for line in metrics(folder)] == list(range(1, 7))
    assert [event["step"] for event in events(folder) if event["event"] == "resume"] == [2]


def test_a_read_only_folder_is_refused_before_anything_is_loaded(small_disk: Path) -> None:
    """Row 21: before the data and torch."""
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    process = begin(small_disk / "run")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert (
        said.startswith(
            f"error: run.folder={small_disk}/run cannot be written: Read-only file system"
        )
        and said.count("\n") == 1
    )


def test_wandb_that_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Row 35, against wandb itself: a server that takes connections and says nothing. Values are kept on disk."""
    for name in ("WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(50)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        trackers = Trackers(LoggingConfig(wandb=True), tmp_path, {}, "run")
        for step in range(1, 4):
            trackers.step({"step": step, "loss": 1.0})
        assert trackers._wandb is not None and trackers._wandb._process.poll() is None, (
            "nothing has waited for it"
        )
        trackers.close()
    said = capfd.readouterr().err
    assert "wandb does not answer" in said or "wandb has not taken all values" in said
    assert list((tmp_path / "wandb").glob("*run-*/run-*.wandb"))
