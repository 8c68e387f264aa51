"""Show a check of a machine: a short table on the screen, and the whole report as JSON and as Markdown. Imports no torch."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from visionloom.common.atomic import replacing
from visionloom.launch.check_parts.results import CheckReport, MeasuredSpeed

VERSION = 1
"""Of the JSON document."""


def document(report: CheckReport) -> dict[str, Any]:
    """Return the report as JSON has it."""
    checks = [asdict(result) | {"passed": result.passed} for result in report.results]
    speeds = [asdict(speed) | {"ratio": speed.ratio} for speed in report.speeds]
    return {
        "version": VERSION,
        "passed": not report.failures,
        "machine": report.machine,
        "gpu_file": report.gpu_file,
        "checks": checks,
        "speeds": speeds,
        "ranks": report.ranks,
        "not_checked": report.not_checked,
        "seconds": report.seconds,
    }


def markdown(report: CheckReport) -> str:
    """Return the report for people."""
    lines = ["# Check of a machine", "", *_machine_lines(report), "", "## Correctness", ""]
    failed = len(report.failures)
    lines += [f"{len(report.results) - failed} checks passed, {failed} failed.", ""]
    lines += ["| check | difference | allowed | |", "|---|---|---|---|"]
    for result in report.results:
        name, allowed = _cell(result.name), f"{result.limit:.2g}"
        difference = result.fault if result.error is None else f"{result.error:.2g}"
        outcome = "" if result.passed else "**failed**"
        lines.append(f"| {name} | {_cell(difference)} | {allowed} | {outcome} |")

    beside = f"recipes/gpu/{report.gpu_file}.yaml" if report.gpu_file else "no file of recipes/gpu"
    lines += ["", f"## Speeds beside {beside}", ""]
    lines += ["| what | measured | assumed | ratio | corrects |", "|---|---|---|---|---|"]
    for speed in report.speeds:
        lines.append(f"| {' | '.join(_speed_cells(speed))} | {speed.option} |")
    lines += ["", "## Ranks", "", *(f"- {json.dumps(rank)}" for rank in report.ranks)]
    if report.not_checked:
        lines += ["", "## Not checked", "", *(f"- {line}" for line in report.not_checked)]
    taken = ", ".join(f"{part} {seconds} s" for part, seconds in report.seconds.items())
    return "\n".join([*lines, "", f"Time: {taken}.", ""])


def _machine_lines(report: CheckReport) -> Iterator[str]:
    for name, value in report.machine.items():
        if isinstance(value, str) and "\n" in value:
            yield f"- {name}:\n\n```\n{value}\n```\n"
        else:
            yield f"- {name}: {json.dumps(value, ensure_ascii=False)}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _speed_cells(speed: MeasuredSpeed) -> tuple[str, str, str, str]:
    """Return the cells that both tables have: name, measured, assumed, ratio."""
    assumed = number(speed.assumed) if speed.assumed else ""
    ratio = f"{speed.ratio:.2f}" if speed.ratio else ""
    return speed.name, f"{number(speed.value)} {speed.unit}", assumed, ratio


def number(value: float) -> str:
    """Return a value in three digits or more."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def tables(report: CheckReport) -> Iterator[Table]:
    """Yield the tables of the screen."""
    beside = f", plans assume recipes/gpu/{report.gpu_file}.yaml" if report.gpu_file else ""
    speeds = Table("what", "measured", "assumed", "ratio", title=f"speeds{beside}")
    for speed in report.speeds:
        speeds.add_row(*_speed_cells(speed))
    yield speeds


def write(report: CheckReport, stem: Path) -> list[Path]:
    """Write the report beside each other as `stem`.json and `stem`.md; return both."""
    text = json.dumps(document(report), indent=1, ensure_ascii=False)
    contents = {".json": f"{text}\n", ".md": markdown(report)}
    paths = []
    for suffix, content in contents.items():
        path = stem.with_name(stem.name + suffix)
        with replacing(path, durable=False) as file:
            file.write(content.encode("utf-8", "backslashreplace"))
        paths.append(path)
    return paths
