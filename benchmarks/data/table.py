"""Rows of the benchmarks' tables, on the terminal, as Markdown and as JSON, with where and on what they were measured."""

import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

LIBRARIES: Final = (
    "torch",
    "transformers",
    "webdataset",
    "megatron-energon",
    "pillow",
    "simplejpeg",
    "av",
    "numpy",
    "tokenizers",
    "qwen-vl-utils",
)
COLUMNS: Final = ("goal", "what", "ours", "peers, in this run", "target", "met")


@dataclass(frozen=True)
class Row:
    """A line of a table: which goal, what was measured, ours, the peers', what is aimed at, and whether it is met.

    `met` is None where a line only tells more about the one above; `numbers` are the figures for machines.
    """

    goal: str
    what: str
    ours: str
    peers: str = ""
    target: str = ""
    met: bool | None = None
    numbers: Mapping[str, float] = field(default_factory=dict)

    @property
    def cells(self) -> tuple[str, ...]:
        """The row as text."""
        return (
            self.goal,
            self.what,
            self.ours,
            self.peers,
            self.target,
            {True: "yes", False: "NO", None: ""}[self.met],
        )


def show(rows: Iterable[Row]) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*COLUMNS)
    for row in rows:
        table.add_row(*row.cells)
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def markdown(rows: Sequence[Row], facts: dict[str, Any]) -> str:
    """The table as Markdown, under what it was measured with."""
    lines = [f"{name}: {value}  " for name, value in facts.items() if name != "versions"]
    lines.append(
        "versions: " + ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    )
    lines += ["", "| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += [
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row.cells) + " |" for row in rows
    ]
    return "\n".join(lines) + "\n"


def machine() -> dict[str, Any]:
    """When, where and with what versions: JSON."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{len(os.sched_getaffinity(0))} CPU cores ({_processor()}), {platform.system()}",
        "python": platform.python_version(),
        "load before": " ".join(f"{load:.1f}" for load in os.getloadavg()),
        "versions": found,
    }


def as_json(rows: Sequence[Row], facts: dict[str, Any]) -> dict[str, Any]:
    """Everything of a run."""
    return {**facts, "rows": [asdict(row) for row in rows]}


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(
        (line.partition(": ")[2] for line in lines if line.startswith("model name")),
        platform.machine(),
    )
