"""One rank speaks, with exit code 2, and the commands refuse a wrong line before they have imported torch."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from visionloom.common.errors import UserError
from visionloom.launch.guarding import exit as exits
from visionloom.launch.guarding.exit import exit_with, record_for_torchrun

ROOT = Path(__file__).resolve().parents[3]
COMMANDS = sorted(
    file.name
    for file in (ROOT / "launch").glob("*.py")
    if '__name__ == "__main__"' in file.read_text()
)


@pytest.fixture
def attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that torchrun gives to one start of the ranks, here seen by rank 1; silent ranks do not wait."""
    monkeypatch.setattr(exits, "SECONDS_UNTIL_ENDED", 0.0)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "attempt_0" / "1" / "error.json"))
    folder = tmp_path / "attempt_0"
    folder.mkdir()
    return folder


def run_command(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run words with this Python in the repository, without torchrun's variables."""
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC")
    }
    return subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_lone_rank_in_trouble_speaks_once(
    attempt: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        with pytest.raises(SystemExit, match="2"):
            exit_with(
                UserError("data.datasets.a.path: shard 3 is broken", "and shard 4\nerror: \x1b[2J")
            )
    assert (
        capsys.readouterr().err
        == "error: data.datasets.a.path: shard 3 is broken\nerror: and shard 4\\nerror: \\x1b[2J\n"
    )


def test_an_error_of_all_ranks_is_told_by_rank_0(
    attempt: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit, match="2"):
            exit_with(UserError(f"seen by rank {rank}"), everywhere=True)
    assert capsys.readouterr().err == "error: seen by rank 0\n"


def test_the_status_says_how_the_run_ended(
    attempt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        exit_with(UserError("data.tokenizer has no <|im_end|>"), folder=str(tmp_path))
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["code"], status["cause"], status["rank"], status["step"]) == (
        2,
        "data.tokenizer has no <|im_end|>",
        1,
        None,
    )
    with pytest.raises(SystemExit):
        exit_with(UserError("again"), folder=str(tmp_path / "absent"))
    assert not (tmp_path / "absent").exists()


def test_the_command_refuses_in_one_line_without_torch() -> None:
    result = run_command("-X", "importtime", "launch/pretrain.py", "+recipe=nonsense")
    told = [line for line in result.stderr.splitlines() if not line.startswith("import time:")]
    imported = {
        line.rpartition("|")[2].strip()
        for line in result.stderr.splitlines()
        if line.startswith("import time:")
    }
    assert result.returncode == 2
    assert len(told) == 1 and told[0].startswith("error: recipe=nonsense is unknown")
    assert "hydra" in imported and not imported & {"torch", "megatron", "transformers"}


def test_missing_data_is_found_without_torch(tmp_path: Path) -> None:
    script = (
        "import sys; from visionloom.launch.configure import start\n"
        "def command(config): raise AssertionError('reached')\n"
        "try: start(command, ['+recipe=demo'])\n"
        "finally: assert 'torch' not in sys.modules"
    )
    result = run_command(
        "-c", script, VISIONLOOM_DEMO_DATA=str(tmp_path / "demo-data"), PYTHONPATH=".link"
    )
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.startswith(
        f"error: data.tokenizer={tmp_path}/demo-data/tokenizer is not a folder"
    )
    assert result.stderr.endswith("python launch/data.py demo runs/demo-data\n")


def test_the_composed_configuration_can_be_shown() -> None:
    result = run_command(
        "launch/pretrain.py", "+recipe=demo", "--cfg", "job", "phases.align.steps=17"
    )
    assert result.returncode == 0 and result.stderr == ""
    assert "steps: 17" in result.stdout


def test_under_torchrun_one_rank_speaks() -> None:
    """Reference: torchrun itself, which ends all ranks as soon as one has failed and flattens their exit codes to 1."""
    result = run_command(
        *(
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "launch/pretrain.py",
            "+recipe=demo",
            "run.sed=3",
        ),
        OMP_NUM_THREADS="1",
    )
    assert result.returncode == 1
    assert [line for line in result.stderr.splitlines() if line.startswith("error:")] == [
        "error: no such key: run.sed (did you mean run.seed?)"
    ]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_keep_their_folder_off_the_path(command: str) -> None:
    """Python puts the folder of a file it starts first on the path: launch/data.py would hide any other package `data`."""
    tree = ast.parse((ROOT / "launch" / command).read_text())
    first_visionloom = next(
        at
        for at, node in enumerate(tree.body)
        if isinstance(node, ast.ImportFrom) and "visionloom" in (node.module or "")
    )
    guards = [
        node
        for node in tree.body[:first_visionloom]
        if isinstance(node, ast.If) and "sys.path[0] =" in ast.unparse(node)
    ]
    assert len(guards) == 1, "begin the command as launch/pretrain.py does"


def test_a_rank_ends_with_its_agent(tmp_path: Path) -> None:
    """Row 5 of the fault matrix in small. Reference: the kernel; the agent here is any parent that is killed with SIGKILL."""
    rank = (
        "import os, time; from visionloom.launch.guarding.exit import end_with_parent; end_with_parent();"
        "print(os.getpid(), flush=True); time.sleep(60)"
    )
    agent = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {rank!r}]); time.sleep(60)"
    environment = os.environ | {"TORCHELASTIC_RUN_ID": "x", "PYTHONPATH": str(ROOT / ".link")}
    with subprocess.Popen(
        [sys.executable, "-c", agent], stdout=subprocess.PIPE, text=True, env=environment
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert psutil.pid_exists(child)
        parent.kill()
    _gone, alive = psutil.wait_procs(
        [psutil.Process(child)] if psutil.pid_exists(child) else [], timeout=10
    )
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


FAILING = """
import os, sys
from visionloom.launch import configure
configure.check_paths = configure.check_agreements = lambda *_: None
def command(config):
    if os.environ["RANK"] == "1":
        raise RuntimeError("the cause of it all")
    import time
    time.sleep(600)
configure.start(command, ["+recipe=demo", f"run.folder={sys.argv[1]}"])
"""


def test_torchruns_summary_shows_the_rank_that_failed_first(tmp_path: Path) -> None:
    """Row 16 of the fault matrix. Reference: torchrun, which prints `error_file: <N/A>` for a rank that has left no record."""
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    result = run_command(
        *(
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            str(script),
            str(tmp_path),
        ),
        OMP_NUM_THREADS="1",
        PYTHONPATH=str(ROOT / ".link"),
    )
    assert result.returncode == 1
    root = result.stderr.partition("Root Cause")[2]
    assert "rank      : 1" in root and "the cause of it all" in root
    assert (
        json.loads((tmp_path / "status.json").read_text())["cause"]
        == "RuntimeError: the cause of it all"
    )


def test_a_traceback_for_torchrun_gives_no_orders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun's agent prints what is recorded as it stands. Reference: torch's own record of the same error."""
    record = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(record))
    try:
        raise KeyError("\x1b[2J\x9b")
    except KeyError as error:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(ValueError("\x1b"))
        assert "\x1b" in json.loads(record.read_text())["message"]["message"]
        record_for_torchrun(ValueError(f"of {error.args[0]}"))
    message = json.loads(record.read_text())["message"]
    assert message["message"] == "ValueError: of \\x1b[2J\\x9b"
    assert (
        "KeyError" in message["extraInfo"]["py_callstack"]
        and message["extraInfo"]["timestamp"].isdigit()
    )


OPEN_GROUPS = """
import atexit, os, signal, sys
import torch.distributed as dist
from visionloom.common.errors import MachineError, UserError
from visionloom.launch import configure
configure.check_paths = configure.check_agreements = lambda *_: None
def command(config):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    atexit.register(os.kill, os.getpid(), signal.SIGSEGV)  # what gloo's threads do, now and then
    raise {"UserError": UserError, "ValueError": ValueError, "MachineError": MachineError}[sys.argv[2]]("the cause")
configure.start(command, ["+recipe=demo", f"run.folder={sys.argv[1]}"])
"""


@pytest.mark.parametrize(
    ("error", "code"), [("UserError", 2), ("ValueError", 1), ("MachineError", 1)]
)
def test_an_interpreter_that_crashes_on_its_way_out_does_not_hide_the_code(
    error: str, code: int, tmp_path: Path
) -> None:
    process = run_command("-c", OPEN_GROUPS, str(tmp_path), error, PYTHONPATH=str(ROOT / ".link"))
    assert process.returncode == code
    assert process.stderr.rstrip().endswith(
        "ValueError: the cause" if error == "ValueError" else "error: the cause"
    )
    assert ("Traceback" in process.stderr) is (error == "ValueError")
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["code"]) == ("failed", code) and status["cause"].endswith(
        "the cause"
    )
