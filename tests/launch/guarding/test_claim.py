"""A run's folder is tried before torch is imported: rows 21 and 38 of the fault matrix, and the folder's part of row 22."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from visionloom.common import lock
from visionloom.common.errors import UserError
from visionloom.launch.guarding import claim as claims
from visionloom.launch.guarding.causes import hint_for, is_lost_connection, of_the_machine
from visionloom.launch.guarding.claim import claim
from visionloom.train.observe.status import RunStatus

ROOT = Path(__file__).resolve().parents[3]
PATHS = os.environ | {"PYTHONPATH": str(ROOT / ".link")}
SCRIPT = """
import sys
from visionloom.launch import configure
configure.check_paths = configure.check_agreements = lambda *_: None
def command(config):
    print("began", flush=True)
    sys.stdin.read()
try:
    configure.start(command, ["+recipe=demo", f"run.folder={sys.argv[1]}"])
finally:
    assert "torch" not in sys.modules
"""


def begin(folder: Path) -> subprocess.Popen[str]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder)], text=True, env=PATHS, cwd=ROOT, **pipes
    )


def test_row_38_two_runs_in_one_folder(tmp_path: Path) -> None:
    """Row 38: the second is told with the holder's host and process, and leaves the first one's status alone."""
    with begin(tmp_path) as first:
        assert first.stdout is not None and first.stdout.readline() == "began\n"
        second = begin(tmp_path)
        _, said = second.communicate(timeout=60)
        assert second.returncode == 2
        (line,) = said.splitlines()
        assert line.startswith(
            f"error: run.folder={tmp_path} is in use by process {first.pid} on {os.uname().nodename} since "
        )
        status = json.loads((tmp_path / "status.json").read_text())
        assert (status["state"], status["pid"]) == ("running", first.pid)
        first.communicate("", timeout=60)
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "done"


CRASH = """
import sys
from visionloom.launch import configure
configure.check_paths = configure.check_agreements = lambda *_: None
def command(config):
    import ctypes
    ctypes.string_at(0)
configure.start(command, ["+recipe=demo", f"run.folder={sys.argv[1]}"])
"""


INTERRUPT = """
import os, signal, sys
from visionloom.launch import configure
from visionloom.train.observe import status
configure.check_paths = configure.check_agreements = lambda *_: None
def command(config):
    status.current.at(7)
    # A shell starts what it runs in the background with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.kill(os.getpid(), signal.SIGINT)
configure.start(command, ["+recipe=demo", f"run.folder={sys.argv[1]}"])
"""


def test_ctrl_c_is_one_line(tmp_path: Path) -> None:
    """Exit code as the shell counts it (128 + SIGINT), no traceback, and status.json says so."""
    process = subprocess.run(
        [sys.executable, "-c", INTERRUPT, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=PATHS,
    )
    assert (process.returncode, process.stderr) == (
        130,
        "interrupted; start the same command again to resume\n",
    )
    status = json.loads((tmp_path / "status.json").read_text())
    assert [status[key] for key in ("state", "code", "cause", "step")] == [
        "failed",
        130,
        "interrupted (Ctrl-C)",
        7,
    ]


def test_a_segmentation_fault_leaves_its_trace(tmp_path: Path) -> None:
    """Row 17 of the fault matrix, one process: the place in the program, and no word of an earlier end."""
    RunStatus().begin(tmp_path)
    process = subprocess.run(
        [sys.executable, "-c", CRASH, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=PATHS,
    )
    assert process.returncode == -11
    assert (
        "Fatal Python error: Segmentation fault" in process.stderr
        and "in command" in process.stderr
    )
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "running"


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """Row 21, by a file in the way: it cannot be written even by root."""
    (tmp_path / "file").write_text("")
    with begin(tmp_path / "file" / "run") as process:
        _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert said == (
        f"error: run.folder={tmp_path}/file/run cannot be written: Not a directory:"
        " correct run.folder or its permissions, or make room\n"
    )


@pytest.mark.parametrize(("free", "refused"), [(1000, True), (1 << 30, False)])
def test_a_folder_without_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, refused: bool
) -> None:
    monkeypatch.setattr(lock, "TRIES", 1)
    monkeypatch.setattr(claims.status, "current", claims.status.RunStatus())
    monkeypatch.setattr(claims.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    if refused:
        with pytest.raises(UserError, match="1000 bytes free"):
            claim(tmp_path)
    else:
        claim(tmp_path)
    while claims._held:
        claims._held.pop().release()


def test_which_faults_are_the_disks(tmp_path: Path) -> None:
    """A missing file is the program's mistake, unless the run's folder has gone."""
    full = OSError(28, os.strerror(28), str(tmp_path / "x"))
    assert str(of_the_machine(full, Path("elsewhere"))).startswith(
        f"{tmp_path}/x: No space left on device: make room"
    )
    unnamed = OSError(28, os.strerror(28))
    assert str(of_the_machine(unnamed, Path("runs/x"))).startswith(
        "a file of run.folder=runs/x: No space left on device"
    )
    shutil.rmtree(tmp_path)
    with pytest.raises(OSError) as error:
        (tmp_path / "metrics.jsonl").write_text("")
    assert of_the_machine(error.value, tmp_path) is not None
    assert of_the_machine(error.value, Path("elsewhere")) is None
    (tmp_path / "metrics.jsonl").mkdir(parents=True)
    with pytest.raises(IsADirectoryError) as folder:
        (tmp_path / "metrics.jsonl").write_text("")
    assert "metrics.jsonl: Is a directory: " in str(of_the_machine(folder.value, tmp_path))
    assert of_the_machine(ValueError("x"), tmp_path) is None


def test_consequences_and_memory_are_told_apart() -> None:
    """Reference: the words of gloo (pair.cc), of torch's CPU allocator and of its CUDA allocator."""
    assert is_lost_connection(
        RuntimeError("[gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:59087")
    )
    assert not is_lost_connection(ValueError("the cause"))
    for error in (
        MemoryError(),
        RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("can't allocate memory"),
    ):
        assert "out of memory" in hint_for(error) and "micro_batch" in hint_for(error)
    assert "resume" in hint_for(ValueError("x"))
