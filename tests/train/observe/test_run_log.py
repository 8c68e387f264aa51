"""The two logs of a run on disks that fail. Reference: what is on the disk afterwards, line by line."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from visionloom.common.errors import UserError
from visionloom.train.agreement_sides import newest_checkpoint
from visionloom.train.lost import lost_checkpoints, move_aside
from visionloom.train.observe.metrics import RunLog


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
def test_a_full_disk_leaves_no_half_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
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
        patch.setattr(
            Path, "open", lambda self, *args, **kwargs: Full(opened(self, *args, **kwargs))
        )
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
    assert "only damaged checkpoints, a: cut and 1 more" in lost_checkpoints(
        tmp_path, ["a: cut", "b: gone"]
    )
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
    assert (run / "metrics.jsonl").exists(), "rewound, and so moved aside, when the run begins anew"


GARBAGE = [
    b'{"step": 1e999}',
    b"[" * 100_000,
    b"[]",
    b"\xff\xfe\0",
    b'{"step": ' + b"9" * 5000 + b"}",
    b'{"step": null}',
    b"null",
]
"""Lines that no run writes: an infinite step, endless nesting, another type, no text, endless digits."""


def test_lines_that_no_run_has_written_are_passed_over(tmp_path: Path) -> None:
    """A NaN in a line of ours is none of them."""
    log = RunLog(tmp_path)
    log.metric({"step": 1, "loss": float("nan")})
    log.metric({"step": 2})
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b"\n".join(GARBAGE) + b"\n")
    (tmp_path / "events.jsonl").write_bytes(
        b'{"event": "checkpoint", "step": 2}\n{"event": "checkpoint", "step": 1e999}\n'
        + b"\n".join(GARBAGE)
        + b'\n{"event": ["x"]}\n'
    )
    assert "tells of one after step 2" in lost_checkpoints(tmp_path, [])
    log.rewind(2)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


@pytest.mark.parametrize("step", [0, 3])
def test_metrics_are_never_rewound_to_nothing(tmp_path: Path, step: int) -> None:
    """A run that ended before its first checkpoint, or whose file is damaged: its lines stay, under another name, each time."""
    for content in ("first\n", '{"step": 7}\n'):
        (tmp_path / "metrics.jsonl").write_text(content)
        RunLog(tmp_path).rewind(step)
        assert not (tmp_path / "metrics.jsonl").exists()
    kept = sorted(path.read_text() for path in tmp_path.glob("before-*.metrics.jsonl"))
    assert kept == ["first\n", '{"step": 7}\n']


@pytest.mark.parametrize(
    "pair",
    [
        ["../evil", '{"step": 1}'],
        ["events.jsonl", "x"],
        ["metrics.jsonl"],
        "x",
        None,
        ["metrics.jsonl", "[1]"],
    ],
)
def test_waiting_lines_go_into_the_logs_alone(pair: object, tmp_path: Path) -> None:
    """Whatever names the file gives: a checkpoint's folder may be a stranger's."""
    run, kept = tmp_path / "run", tmp_path / "kept"
    kept.mkdir()
    (kept / "unwritten.jsonl").write_text(json.dumps(pair) + "\n")
    with pytest.raises(
        UserError, match=r"unwritten\.jsonl holds what no run has left there .*: remove it"
    ):
        RunLog(run).load_waiting(kept)
    assert not [
        path for path in tmp_path.rglob("*") if path.name not in ("kept", "run", "unwritten.jsonl")
    ]


@pytest.mark.parametrize("kind", ["file", "dangling link"])
def test_checkpoints_that_are_no_folder(tmp_path: Path, kind: str) -> None:
    """A file is moved aside as a folder is; what a dangling link hides may come back with its disk, and is said."""
    (tmp_path / "events.jsonl").write_text('{"event": "checkpoint", "step": 4}\n')
    if kind == "file":
        (tmp_path / "checkpoints").write_text("x")
        assert move_aside(tmp_path).is_dir()
        assert [path.read_text() for path in tmp_path.glob("before-*.checkpoints")] == ["x"]
    else:
        (tmp_path / "checkpoints").symlink_to(tmp_path / "disk")
        with pytest.raises(UserError, match=r"is a link to .*disk, which is not there"):
            move_aside(tmp_path)


@pytest.mark.parametrize(
    "latest",
    [
        "\xff\0",
        "",
        "../../other/checkpoints/p/step-00000001",
        "/etc",
        "p/step-00000009",
        "folder",
        "pipe",
    ],
)
def test_a_pointer_to_nowhere_names_no_checkpoint(tmp_path: Path, latest: str) -> None:
    """What `latest` says is looked at before torch is there; resuming looks for itself."""
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    if latest == "folder":
        (checkpoints / "latest").mkdir()
    elif latest == "pipe":
        os.mkfifo(checkpoints / "latest")
    else:
        (checkpoints / "latest").write_bytes(latest.encode("latin-1"))
    assert newest_checkpoint(tmp_path / "run") is None
