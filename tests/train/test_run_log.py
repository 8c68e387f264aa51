"""The two logs of a run on disks that fail. Reference: what is on the disk afterwards, line by line."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from visionloom.train.lost import lost_checkpoints, move_aside
from visionloom.train.metrics import RunLog


def lines(folder: Path, name: str = "metrics.jsonl") -> list[Any]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_lines_wait_for_a_folder_that_comes_back(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "run")
    log.metric({"step": 1})
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    log.metric({"step": 2})
    assert "metrics.jsonl: No such file or directory" in log.fault
    log.event("x")
    assert log.fault
    (tmp_path / "elsewhere").rename(tmp_path / "run")
    log.metric({"step": 3})
    assert log.fault == ""
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3]
    assert [line["event"] for line in lines(tmp_path / "run", "events.jsonl")] == ["x"]


@pytest.mark.parametrize("written", [0, 5], ids=["nothing", "half a line"])
def test_a_full_disk_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int) -> None:
    """As the kernel does it: a write that fits in part says how much, the next one fails with ENOSPC."""
    log, path = RunLog(tmp_path), tmp_path / "metrics.jsonl"
    log.metric({"step": 1})

    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> "Full":
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def write(self, data: bytes) -> int:
            if not written:
                raise OSError(errno.ENOSPC, "No space left on device")
            return int(self.file.write(data[:written]))

    with monkeypatch.context() as patch:
        opened = Path.open
        patch.setattr(Path, "open", lambda self, *args, **kwargs: Full(opened(self, *args, **kwargs)))
        log.metric({"step": 2})
    assert "No space left on device" in log.fault
    assert path.read_text() == '{"step": 1}\n'
    log.metric({"step": 3})
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3] and not log.fault


def test_an_event_that_a_crash_cut_off_stays_alone(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text('{"event": "phase_start"}\n{"event": "chec')
    RunLog(tmp_path).event("resume")
    assert (tmp_path / "events.jsonl").read_text().splitlines()[1] == '{"event": "chec'
    assert json.loads((tmp_path / "events.jsonl").read_text().splitlines()[2])["event"] == "resume"


def test_a_run_that_has_had_a_checkpoint_is_known(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.event("phase_start", step=0)
    log.metric({"step": 1})
    assert lost_checkpoints(tmp_path, []) == "", "killed before the first one"
    log.event("checkpoint", step=5)
    assert "tells of one after step 5" in lost_checkpoints(tmp_path, [])
    assert "only damaged checkpoints, a: cut and 1 more" in lost_checkpoints(tmp_path, ["a: cut", "b: gone"])
    log.event("start_anew")
    assert lost_checkpoints(tmp_path, []) == ""


def test_what_is_moved_aside_is_kept(tmp_path: Path) -> None:
    """Also where checkpoints/ is a link to another disk."""
    (tmp_path / "disk" / "align" / "step-00000001").mkdir(parents=True)
    (tmp_path / "disk" / "latest").write_text("align/step-00000001")
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").symlink_to(tmp_path / "disk")
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    kept = move_aside(run)
    assert (kept / "align" / "step-00000001").is_dir() and (kept / "latest").exists()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == [kept.name]
    assert not (run / "metrics.jsonl").exists()
    assert [path.read_text() for path in run.glob("before-*.metrics.jsonl")] == ['{"step": 1}\n']
