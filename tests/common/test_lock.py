"""One writer of a folder. Reference: the kernel, which gives a POSIX lock to one process and takes it back when that ends."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from visionloom.common import lock
from visionloom.common.errors import UserError
from visionloom.common.lock import FolderLock, is_held

HOLD = """
import sys, time
from pathlib import Path
from visionloom.common.lock import FolderLock
held = FolderLock(Path(sys.argv[1]), "run.folder")
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def no_second_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "TRIES", 1)


def holder(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_the_second_is_told_who_has_it_and_a_killed_one_leaves_it(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        assert is_held(tmp_path)
        with pytest.raises(
            UserError,
            match=rf"run\.folder=.* is in use by process {process.pid} on {os.uname().nodename} since",
        ):
            FolderLock(tmp_path, "run.folder")
        process.kill()
    assert not is_held(tmp_path)
    FolderLock(tmp_path, "run.folder").release()


def test_a_forked_child_does_not_keep_it(tmp_path: Path) -> None:
    """A worker that decodes pictures may outlive a rank that was killed."""
    reader, writer = os.pipe()
    parent = os.fork()
    if not parent:
        held = FolderLock(tmp_path, "run.folder")
        if os.fork():
            os.kill(os.getpid(), 9)
        os.write(writer, b"x")
        time.sleep(1)
        os._exit(0 if held else 1)
    os.waitpid(parent, 0)
    assert os.read(reader, 1) == b"x"
    assert not is_held(tmp_path)


def test_a_folder_without_a_lock_is_free(tmp_path: Path) -> None:
    assert not is_held(tmp_path)
    assert not is_held(tmp_path / "absent")


def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(lock.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "lockf", refuse)
    FolderLock(tmp_path, "run.folder").release()
    assert "cannot be locked (No locks available)" in capsys.readouterr().err
