"""Warnings of libraries stay off the screen, ours do not, and the user's own choice goes before both.

A whole silent run is in test_bad_input.py.
"""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import logging, warnings
from visionloom.launch.quiet import quiet_libraries
quiet_libraries()
for module in ("megatron.core.x", "/lib/site-packages/megatron/core/x", "transformers", "visionloom.data.x"):
    warnings.warn_explicit(f"by {module}", UserWarning, "x.py", 1, module=module, registry={})
for name in ("megatron.core.distributed", "torch.utils.cpp_extension", "visionloom.data.x"):
    logging.getLogger(name).warning(f"log of {name}")
logging.getLogger("megatron.core.distributed").error("log of an error")
"""


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], ["by visionloom.data.x"]),
        (["-W", "default"], ["by megatron.core.x", "by /lib", "by transformers", "by visionloom"]),
    ],
    ids=["by itself", "asked for"],
)
def test_what_reaches_the_screen(options: list[str], expected: list[str]) -> None:
    result = subprocess.run(
        [sys.executable, *options, "-c", SCRIPT], env={"PYTHONPATH": str(ROOT / ".link")}, capture_output=True, text=True, check=True
    )  # fmt: skip
    told = result.stderr.splitlines()
    assert [line.partition("Warning: ")[2].startswith(text) for line, text in zip(told, expected, strict=False)] == [
        True
    ] * len(expected)
    assert told[len(expected) :] == ["log of visionloom.data.x", "log of an error"]
