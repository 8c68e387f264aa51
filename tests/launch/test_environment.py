"""Variables of a launcher that did not start this process are one line with the cure, and nobody waits.

Reference: torchrun's documented variables (torch.distributed.run), which are taken only from torchrun itself.
"""

import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest

from visionloom.common.errors import UserError
from visionloom.launch.environment import (
    ALONE,
    RENDEZVOUS,
    THREADS,
    TORCHRUN,
    check_environment,
    record_collectives,
    set_up_gpus,
    world_size,
)

ROOT = Path(__file__).resolve().parents[2]
RANK_3 = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "8"}
MASTER = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
SLURM = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7"}


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A shell without any of the variables."""
    for name in (*ALONE, *RENDEZVOUS, THREADS, TORCHRUN):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    "environment",
    [
        {},
        ALONE,
        {"RANK": "0"},
        {"RANK": "0", "WORLD_SIZE": "1"},
        MASTER,
        SLURM,
        {**RANK_3, **MASTER, TORCHRUN: "none"},
        {**ALONE, **MASTER, TORCHRUN: "none"},
        {"CUDA_VISIBLE_DEVICES": "", THREADS: "8"},
        {THREADS: "4,2"},
    ],
)
def test_a_true_environment_is_taken(
    environment: dict[str, str], shell: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        shell.setenv(name, value)
    check_environment()
    assert world_size() == int(environment.get("WORLD_SIZE", "1"))


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"WORLD_SIZE": "8"}, ["WORLD_SIZE=8 in the environment", "unset WORLD_SIZE;"]),
        ({"RANK": "3"}, ["RANK=3 in", "unset RANK;"]),
        ({"LOCAL_RANK": "1"}, ["LOCAL_RANK=1 in", "unset LOCAL_RANK;"]),
        ({"LOCAL_WORLD_SIZE": "64"}, ["LOCAL_WORLD_SIZE=64 in", "unset LOCAL_WORLD_SIZE;"]),
        ({"RANK": "0", "WORLD_SIZE": "2"}, ["RANK=0, WORLD_SIZE=2 in", "unset RANK WORLD_SIZE;"]),
        ({"RANK": "", "WORLD_SIZE": ""}, ["RANK=, WORLD_SIZE= in", "unset RANK WORLD_SIZE;"]),
        ({"RANK": "zero", "WORLD_SIZE": "1"}, ["RANK=zero", "unset RANK WORLD_SIZE;"]),
        ({"RANK": "8", "WORLD_SIZE": "8", **MASTER}, ["RANK=8, WORLD_SIZE=8", "unset RANK WORLD_SIZE MASTER_ADDR MASTER_PORT;"]),
        ({**RANK_3, **MASTER}, ["unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT;"]),
        ({**SLURM, "RANK": "0", "WORLD_SIZE": "8", **MASTER}, ["RANK=0, WORLD_SIZE=8 in", "torchrun --standalone"]),
        ({"RANK": "1", "WORLD_SIZE": "2", TORCHRUN: "none"}, [f"unset RANK WORLD_SIZE {TORCHRUN};"]),
        ({**RANK_3, "RANK": "8", **MASTER, TORCHRUN: "none"}, ["RANK=8, WORLD_SIZE=8"]),
        ({THREADS: "all"}, ["OMP_NUM_THREADS=all is not a number of threads: unset OMP_NUM_THREADS"]),
        ({THREADS: "0"}, ["OMP_NUM_THREADS=0"]),
    ],
)  # fmt: skip
def test_a_left_over_environment_is_named(
    environment: dict[str, str], expected: list[str], shell: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        shell.setenv(name, value)
    with pytest.raises(UserError) as caught:
        check_environment()
    assert "\n" not in str(caught.value)
    assert [part for part in expected if part not in str(caught.value)] == []


@pytest.mark.parametrize(
    "command",
    [["pretrain.py", "+recipe=demo"], ["evaluate.py", "+recipe=demo"], ["convert.py", "import"]],
)
def test_a_command_ends_at_once(command: list[str]) -> None:
    """Also on a rank that stays silent about errors of all ranks, and in no longer than the start of Python takes."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC")
    }
    result = subprocess.run(
        [sys.executable, "-X", "importtime", f"launch/{command[0]}", *command[1:]],
        cwd=ROOT, env={**kept, **RANK_3, **MASTER}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    told = [line for line in result.stderr.splitlines() if not line.startswith("import time:")]
    assert result.returncode == 2 and len(told) == 1
    assert told[0].startswith(
        "error: RANK=3, WORLD_SIZE=8, LOCAL_RANK=3, LOCAL_WORLD_SIZE=8 in the environment"
    )
    assert "| torch\n" not in result.stderr


@pytest.mark.parametrize("value", ["", "eight", "0", "-1"])
def test_a_plan_needs_a_number_of_ranks(value: str, shell: pytest.MonkeyPatch) -> None:
    shell.setenv("WORLD_SIZE", value)
    with pytest.raises(
        UserError,
        match=f"WORLD_SIZE={value} in the environment is not a number of ranks: unset WORLD_SIZE",
    ):
        world_size()


def test_collectives_are_recorded_into_the_runs_folder() -> None:
    """What the user has exported stays."""
    with patch.dict(os.environ, {"TORCH_FR_BUFFER_SIZE": "7"}, clear=True):
        record_collectives("runs/mine")
        assert dict(os.environ) == {
            "TORCH_FR_BUFFER_SIZE": "7",
            "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
            "TORCH_FR_DUMP_TEMP_FILE": "runs/mine/collectives-",
        }


@pytest.mark.parametrize(
    ("exported", "tensor", "expected"),
    [
        ({}, 1, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        (
            {"PYTORCH_ALLOC_CONF": "", "CUDA_DEVICE_MAX_CONNECTIONS": "8"},
            2,
            {"PYTORCH_ALLOC_CONF": "", "CUDA_DEVICE_MAX_CONNECTIONS": "8"},
        ),
        (
            {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"},
            2,
            {"PYTORCH_CUDA_ALLOC_CONF": "backend:native", "CUDA_DEVICE_MAX_CONNECTIONS": "1"},
        ),
    ],
)
def test_settings_of_gpus(exported: dict[str, str], tensor: int, expected: dict[str, str]) -> None:
    with patch.dict(os.environ, exported, clear=True):
        set_up_gpus(tensor)
        assert dict(os.environ) == expected
