"""Runs under a real SLURM: rows 7 to 12 of the fault matrix, and phases as jobs of their own. `make faults` runs these.

All jobs are submitted at once; each waits in its fifth step for what its test does to it. Reference: the same runs undisturbed and
without SLURM; the lines of their metrics must be equal bit for bit.
"""

import contextlib
import io
import json
import math
import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from visionloom.launch.submit import run
from visionloom.tests.launch.guarding.test_claim import ROOT
from visionloom.tests.launch.submitting.cluster import Cluster, cluster_here, free_ports, wait_for
from visionloom.tests.ranks import RankPool
from visionloom.tests.train.runs import configured, metrics, run_config, run_words
from visionloom.tests.train.test_early_end import exact
from visionloom.tests.train.test_faults import events
from visionloom.tests.train.test_layouts import train
from visionloom.tests.train.test_one_phase import two_phases

pytestmark = pytest.mark.faults
STEPS, WAITS, STOPS = 8, 5, 6
"""The wish to stop is in what a step reduces from the next one on."""
MINUTE = 60
MOST = 8 * MINUTE
"""Longest wait for a job; all of them share two cores."""
JOBS = {"node": "wait", "limit": "wait", "preempted": "wait", "cancelled": "wait", "loop": "fail"}
"""Runs by name, with the fault of a step on rank 0; see tests/train/faulty.py."""


class Runs:
    """The runs of this file, each a job of two nodes with a rank each."""

    def __init__(self, cluster: Cluster, data: Path, folder: Path) -> None:
        self.cluster, self.data, self.folder = cluster, data, folder
        self.jobs = {name: self.submit(name, fault)[0] for name, fault in JOBS.items()}
        own = ["--chain", "nodes=2", "nodes.align=1"]
        self.chain = submitted(two_phases(data, folder / "chain", *own))
        seeds = run_words(data, folder / "array", STEPS)
        (self.array,) = submitted([*seeds, "nodes=1", "--array", "seeds=3,5"])

    def submit(self, name: str, fault: str) -> list[str]:
        # Before the first checkpoint: three starts of the loop, and not four.
        step = 2 if fault == "fail" else WAITS
        program = f"program=-m visionloom.tests.train.faulty {fault} {step} {step} 0"
        words = run_words(self.data, self.folder / name, STEPS, "checkpoint.every_steps=2")
        # More than what is left of the limit that the test sets.
        return submitted([*words, program, "nodes=2", "time=30", "warn=120"])

    def wait_for_step(self, name: str, step: int = WAITS - 1) -> None:
        place = self.folder / name / "metrics.jsonl"
        wait_for(lambda: place.exists() and len(metrics(place.parent)) >= step, MOST)

    def end_of(self, job: str) -> tuple[str, int]:
        """State and restarts of a job that has ended."""
        running = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING")
        with contextlib.suppress(TimeoutError):
            wait_for(lambda: self.cluster.fact(job, "JobState") not in running, MOST)
        return self.cluster.fact(job, "JobState"), int(self.cluster.fact(job, "Restarts"))

    def status(self, name: str) -> dict[str, Any]:
        status: dict[str, Any] = json.loads((self.folder / name / "status.json").read_text())
        return status

    def log(self, name: str) -> str:
        logs = sorted((self.folder / name / "submit").glob("*/*.log"))
        return "\n".join(log.read_text() for log in logs)

    def steps_of(self, name: str, kind: str) -> list[int]:
        """Steps of a run's events of one kind, the oldest first."""
        return [each["step"] for each in events(self.folder / name) if each["event"] == kind]


def submitted(words: list[str]) -> list[str]:
    """Submit a run as the command does, and return the numbers of its jobs."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert run([*words, "gpus_per_node=1", "plan=false"]) == 0
    return re.findall(r"^job (\d+): ", said.getvalue(), re.MULTILINE)


@pytest.fixture(scope="module")
def undisturbed(pool: RankPool, demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    pool.run(2, train, run_config(demo_data, folder, STEPS, 2))
    return folder


@pytest.fixture(scope="module")
def runs(
    undisturbed: Path, demo_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Runs]:
    """After the reference, which would have to share two cores with all of them."""
    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONPATH", str(ROOT / ".link"))
    patch.setenv("OMP_NUM_THREADS", "1")
    patch.chdir(ROOT)
    try:
        with cluster_here() as cluster:
            yield Runs(cluster, demo_data, tmp_path_factory.mktemp("runs"))
    finally:
        patch.undo()


def test_row_11_a_node_that_is_lost(runs: Runs) -> None:
    """First, since it takes longest: SLURM misses a node after ten seconds, and our script asks for the requeue before."""
    job = runs.jobs["node"]
    runs.wait_for_step("node")
    # Written beside training, and so perhaps later than the line of a step.
    wait_for(lambda: runs.steps_of("node", "checkpoint"), MOST)
    _, lost = runs.cluster.nodes_of(job)
    runs.cluster.kill_node(lost, job)
    wait_for(lambda: int(runs.cluster.fact(job, "Restarts")) == 1, MOST)
    wait_for(lambda: runs.cluster.fact(job, "JobState") == "RUNNING", MOST)
    assert lost not in runs.cluster.nodes_of(job)
    runs.cluster.begin_node(lost)


def test_row_08_the_time_limit(runs: Runs) -> None:
    """The limit is brought near when the run waits, and SLURM itself sends its warning."""
    job = runs.jobs["limit"]
    runs.wait_for_step("limit")
    hours, minutes, _ = map(int, runs.cluster.fact(job, "RunTime").rpartition("-")[2].split(":"))
    near = math.ceil(hours * MINUTE + minutes + 2)
    runs.cluster.ask("scontrol", "update", f"JobId={job}", f"TimeLimit={near}")
    wait_for(lambda: int(runs.cluster.fact(job, "Restarts")) == 1, MOST)
    runs.cluster.ask("scontrol", "update", f"JobId={job}", "TimeLimit=30")


def test_row_09_a_job_of_a_higher_partition(runs: Runs) -> None:
    job = runs.jobs["preempted"]
    runs.wait_for_step("preempted")
    nodes = ",".join(runs.cluster.nodes_of(job))
    options = ["--partition=high", f"--nodelist={nodes}", "--gpus-per-node=1", "--output=/dev/null"]
    higher = runs.cluster.ask("sbatch", "--parsable", *options, "--wrap=sleep 1").strip()
    assert runs.end_of(higher) == ("COMPLETED", 0)
    wait_for(lambda: int(runs.cluster.fact(job, "Restarts")) == 1, MOST)


def test_row_10_who_is_cancelled_stays_so(runs: Runs) -> None:
    """Row 7 too: SIGTERM from scancel comes to the ranks and to the script: saved, and not requeued."""
    job = runs.jobs["cancelled"]
    runs.wait_for_step("cancelled")
    runs.cluster.ask("scancel", job)
    assert runs.end_of(job) == ("CANCELLED", 0)
    status = runs.status("cancelled")
    assert (status["state"], status["code"], status["step"]) == ("stopped", 75, STOPS)
    assert "requeued" not in runs.log("cancelled")


def test_row_12_a_crash_loop(runs: Runs) -> None:
    job = runs.jobs["loop"]
    assert runs.end_of(job) == ("FAILED", 0), runs.log("loop")
    status = runs.status("loop")
    assert (status["state"], status["code"], status["starts"]) == ("failed", 93, 3), status
    assert "ValueError: a fault on purpose" in status["cause"]
    assert "not requeued: see" in runs.log("loop") and runs.cluster.fact(job, "ExitCode") == "93:0"


def test_phases_as_jobs_with_nodes_of_their_own(
    runs: Runs, pool: RankPool, demo_data: Path, tmp_path: Path
) -> None:
    first, second = runs.chain
    assert runs.end_of(first) == ("COMPLETED", 0), runs.log("chain")
    assert runs.end_of(second) == ("COMPLETED", 0), runs.log("chain")
    assert [runs.cluster.fact(job, "NumNodes") for job in runs.chain] == ["1", "2"]
    for ranks, phase in ((1, "align"), (2, "multimodal")):
        words = two_phases(demo_data, tmp_path, f"run.phase={phase}")
        pool.run(ranks, train, configured(words, ranks))
    assert exact(runs.folder / "chain") == exact(tmp_path)


def test_an_array_of_seeds(runs: Runs, pool: RankPool, demo_data: Path, tmp_path: Path) -> None:
    """A job array of one node each; the runs have folders and seeds of their own."""
    for task, seed in enumerate((3, 5)):
        folder = runs.folder / f"array-seed{seed}"
        assert runs.end_of(f"{runs.array}_{task}") == ("COMPLETED", 0), runs.log(folder.name)
        config = run_config(demo_data, tmp_path / str(seed), STEPS, 1, f"run.seed={seed}")
        pool.run(1, train, config)
        assert exact(folder) == exact(tmp_path / str(seed))


@pytest.mark.parametrize(("row", "name"), [(8, "limit"), (9, "preempted"), (11, "node")])
def test_rows_08_09_11_end_as_if_nothing_had_happened(
    row: int, name: str, runs: Runs, undisturbed: Path
) -> None:
    """A run that was stopped goes on after the step in hand, one whose node is gone after its last checkpoint."""
    assert runs.end_of(runs.jobs[name]) == ("COMPLETED", 1), runs.log(name)
    assert runs.status(name)["state"] == "done"
    # The checkpoint of step 4 may be in the making when the node goes.
    assert runs.steps_of(name, "resume") in ([[2], [4]] if row == 11 else [[STOPS]])
    assert exact(runs.folder / name) == exact(undisturbed)


def test_two_agents_without_slurm(
    runs: Runs, undisturbed: Path, demo_data: Path, tmp_path: Path
) -> None:
    """The command that --torchrun prints, twice."""
    said = io.StringIO()
    (port,) = free_ports(1)
    own = ["nodes=2", "gpus_per_node=1", "plan=false", "host=127.0.0.1", f"port={port}"]
    with contextlib.redirect_stdout(said):
        assert run([*run_words(demo_data, tmp_path, STEPS), *own, "--torchrun"]) == 0
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    agents = [subprocess.Popen(["bash", "-c", said.getvalue()], **pipes) for _ in range(2)]  # type: ignore[call-overload]
    outputs = [agent.communicate(timeout=MOST)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    assert exact(tmp_path) == exact(undisturbed)


def test_nobody_has_come_back(runs: Runs) -> None:
    """Row 10 once more, some time later."""
    time.sleep(5)
    assert runs.end_of(runs.jobs["cancelled"]) == ("CANCELLED", 0)
    assert not [each for each in os.listdir(runs.folder / "cancelled") if each == "stop"]
