"""Nothing from data gives orders to a terminal."""

import io
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

from visionloom.common.text import one_line, printable, say

ROOT = Path(__file__).resolve().parents[2]


def test_orders_become_escapes() -> None:
    assert printable("a\x1b[31mb\u202ec\r\x9b0m\ud800") == "a\\x1b[31mb\\u202ec\\r\\x9b0m\\ud800"
    assert one_line("a\nb\tc") == "a\\nb\\tc"


def test_every_control_character_but_newline_and_tab() -> None:
    """Reference: the categories of Unicode: Cc are controls, Cs surrogates, Zl and Zp end lines."""
    for code in range(0x110000):
        if unicodedata.category(chr(code)) in ("Cc", "Cs", "Zl", "Zp") and chr(code) not in "\n\t":
            assert printable(chr(code)).isascii() and printable(chr(code)).isprintable(), hex(code)


@pytest.mark.parametrize("text", ["plain", "日本語", "é", "👩‍🔬", "two\nlines\tand a tab"])
def test_text_stays(text: str) -> None:
    assert printable(text) == text


def test_a_stream_that_lacks_letters() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    say("é", "b", file=stream)
    stream.seek(0)
    assert stream.read() == "\\xe9\nb\n"


def test_a_reader_that_leaves_ends_nothing() -> None:
    """`command --help | head`: no traceback, not at exit either. Reference: a pipe of the kernel without a reader."""
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.run(
        [
            sys.executable,
            "-c",
            "from visionloom.common.text import say; say('one'); say('two')",
        ],
        stdout=writer,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT / ".link")},
        check=False,
    )
    os.close(writer)
    assert (process.returncode, process.stderr) == (0, b"")
