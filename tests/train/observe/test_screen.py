"""What a run shows, where standard output is a log or a pipe. Reference: the kernel's /dev/full, and a pipe without a reader."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = """
import sys
from visionloom.train.observe.screen import Screen
screen = Screen(True, 1)
screen.say("one")
screen.say("two")
sys.stderr.write("trained on\\n")
"""


@pytest.mark.parametrize(
    ("output", "told"), [("full", "No space left on device"), ("pipe", "Broken pipe")]
)
def test_an_output_that_takes_no_more_ends_nothing(output: str, told: str) -> None:
    """One warning, then silence, exit code 0: rich would end the program."""
    if output == "full":
        target = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, target = os.pipe()
        os.close(reader)
    environment = os.environ | {"PYTHONPATH": str(ROOT / ".link")}
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        stdout=target,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    os.close(target)
    assert process.returncode == 0
    assert process.stderr.splitlines() == [
        f"warning: standard output: {told}: nothing more is shown there, training goes on",
        "trained on",
    ]
