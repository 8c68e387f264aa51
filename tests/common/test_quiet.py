"""Warnings of libraries stay off the screen, ours do not, and the user's own choice goes before both.

A whole silent run is in test_bad_input.py.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import logging, warnings
from visionloom.common.quiet import quiet_libraries
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
    assert [
        line.partition("Warning: ")[2].startswith(text)
        for line, text in zip(told, expected, strict=False)
    ] == [True] * len(expected)
    assert told[len(expected) :] == ["log of visionloom.data.x", "log of an error"]


NAMES = """
import logging, sys, threading, warnings
from visionloom.common.quiet import Parser, quiet_libraries
quiet_libraries()
name = "\\x1b[2J\\u00e9"
logging.getLogger("visionloom.x").warning("log of %s", name)
try:
    raise KeyError(name)
except KeyError:
    logging.getLogger("visionloom.x").exception("failed")
warnings.warn(f"warning of {name}")
thread = threading.Thread(target=lambda: int(name))
thread.start()
thread.join()
try:
    Parser(prog="p").parse_args([name])
except SystemExit:
    raise ValueError(f"end of {name}")
"""


def test_names_in_messages_give_no_orders() -> None:
    """By logging, warnings, argparse, a thread's and the program's last exception, on a stream that lacks letters too."""
    environment = {
        "PYTHONPATH": str(ROOT / ".link"),
        "LANG": "C",
        "PYTHONIOENCODING": "ascii:strict",
    }
    result = subprocess.run(
        [sys.executable, "-c", NAMES], env=environment, capture_output=True, check=False
    )
    told = result.stderr.decode("ascii")
    assert result.returncode == 1 and "\x1b" not in told
    for part in (
        "log of ",
        "KeyError: '",
        "warning of ",
        "invalid literal for int() with base 10: '",
        "unrecognized arguments: ",
        "end of ",
    ):
        assert re.search(rf"{re.escape(part)}\\+x1b\[2J", told), part
