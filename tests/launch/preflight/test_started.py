"""Ranks that are started as a launcher does it: a port that is taken, and a run that measures its ranks first. `make faults`."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from visionloom.tests.ranks import torchrun_environment
from visionloom.tests.train.runs import metrics, run_words
from visionloom.tests.train.test_faults import ENVIRONMENT, ROOT, torchrun

pytestmark = pytest.mark.faults
MEET = """
import sys
from datetime import timedelta
from visionloom.launch.guarding.exit import code_of
from visionloom.parallel import meeting
meeting.SILENT_SECONDS = 2.0
sys.exit(code_of(lambda: len(meeting.meet(timedelta(seconds=60)))))
"""


def test_row_38_a_taken_port_ends_all_ranks_with_2() -> None:
    """Another program has MASTER_PORT and says nothing. Rank 0 cannot open its store, rank 1 gets no answer from it."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        ranks = []
        for rank in (0, 1):
            variables = ENVIRONMENT | torchrun_environment(rank, 2) | {"MASTER_PORT": port}
            command = [sys.executable, "-c", MEET]
            pipe = subprocess.PIPE
            ranks.append(subprocess.Popen(command, env=variables, cwd=ROOT, text=True, stderr=pipe))
        said = [process.communicate(timeout=200)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [2, 2], said
    for lines in said:
        assert lines.startswith(f"error: MASTER_PORT={port} ") and "port of its own" in lines
        assert "Traceback" not in lines


def test_a_run_measures_its_ranks_before_step_1(demo_data: Path, tmp_path: Path) -> None:
    words = run_words(demo_data, tmp_path / "run", 5, "watch.preflight=always")
    with torchrun(words) as agent:
        said, _ = agent.communicate(timeout=300)
    assert agent.returncode == 0, said
    assert said.index("ranks before step 1") < said.index("done in")
    ranks = json.loads((tmp_path / "run" / "preflight.json").read_text())
    assert [(each["rank"], each["host"]) for each in ranks] == [
        (rank, os.uname().nodename) for rank in (0, 1)
    ]
    assert len(metrics(tmp_path / "run")) == 5
