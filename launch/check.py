"""Check a machine once: what it is, whether it computes what a CPU computes, and how fast it is beside what plans assume.

    python launch/check.py --report FILE                                    one process, on a GPU where one is there
    torchrun --standalone --nproc-per-node N launch/check.py --report FILE  also collectives and parallel layouts, a rank a GPU

FILE.json and FILE.md are what a GPU's owner sends back, so that recipes/gpu/ can be corrected; they hold no names of hosts or users.
First all ranks are measured side by side, with the storage of --folder: one table, slow ranks marked, and who does not answer is named.
No data or model is needed. Less than two minutes on a GPU. Exit code 0: all checks passed, and what was not checked is said.
1: one failed, a line each. 2: a word is wrong.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Final

if not __package__:
    # Started as a file: Python put launch/ first on the path, where data.py would hide any package data.
    root = Path(__file__).resolve().parents[1]
    sys.path[0] = str(root / ".link")

from visionloom.common.errors import MachineError, UserError, unknown
from visionloom.common.quiet import Parser, quiet_libraries
from visionloom.common.screen import PlainConsole
from visionloom.common.text import one_line, say, warn
from visionloom.forecast.machine import machine, machine_names
from visionloom.launch import environment
from visionloom.launch.check_parts.report import tables, write
from visionloom.launch.check_parts.results import CheckReport, CheckResult, guarded
from visionloom.launch.guarding.claim import check_writable
from visionloom.launch.guarding.exit import (
    FAILURE,
    attempt_folder,
    code_of,
    end_process,
    end_with_parent,
)
from visionloom.launch.plan_commands.first import only_file_about

if TYPE_CHECKING:
    from visionloom.launch.preflight.facts import RankFacts
    from visionloom.parallel.topology import Topology

SUFFIXES: Final = (".json", ".md")
TIMEOUT_MINUTES: Final = 3
"""Longest wait in a collective: a rank that failed must not hold the others for half an hour."""
DEVICES: Final = ("auto", "cpu", "cuda")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; a user's error exits with 2, one line each."""
    options = make_parser().parse_args(arguments)
    quiet_libraries()
    end_with_parent()
    return code_of(lambda: run(options))


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = Parser(prog="check.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--report", metavar="FILE", help="write FILE.json and FILE.md")
    parser.add_argument(
        "--gpu",
        metavar="NAME",
        help="file of recipes/gpu to compare with, if not by the card's name",
    )
    parser.add_argument(
        "--folder",
        default=".",
        metavar="DIR",
        help="where runs will be: each rank writes 64 MiB there, reads them, and removes them",
    )
    parser.add_argument("--device", default="auto", metavar="DEVICE", help=" | ".join(DEVICES))
    return parser


def run(options: argparse.Namespace) -> int:
    """Check this machine as the options say; return the exit code."""
    environment.check_environment()
    stem = check_options(options)
    if environment.trains_on_gpus(options.device):
        environment.set_up_gpus(tensor=1)
        environment.log_transports(attempt_folder())

    # torch and megatron-core are imported only now, when the words are known to be good.
    from visionloom.launch.check_parts.machine_facts import machine_facts
    from visionloom.model.kernels import flash
    from visionloom.parallel import topology as topologies
    from visionloom.parallel.config import ParallelConfig

    device = topologies.choose_device(options.device)
    flash.choose("auto", device)
    # Several threads add up in an order of their own, and a resume must give the same bits on a CPU.
    topologies.set_threads(0 if device.type == "cuda" else 1)
    topology = topologies.start(ParallelConfig(), device, timeout_minutes=TIMEOUT_MINUTES)
    facts = machine_facts() | {"attention": flash.chosen()}
    report = CheckReport(facts, options.gpu or file_of(facts, device.type))
    # First: where a rank does not answer, all that follows would wait for it.
    ranks = measured(topology, Path(options.folder), report)
    if not report.failures:
        check(topology, report)
    if topology.is_main:
        show(report, ranks, stem)
    if not ranks:
        # Closing the groups would wait for the rank that does not answer.
        end_process(FAILURE)
    topologies.stop()
    return FAILURE if report.failures else 0


def check_options(options: argparse.Namespace) -> Path | None:
    """Return the path of the report without suffix, None without one.

    Raises:
        UserError: for an unknown value, and for a report that cannot be written.
    """
    if options.device not in DEVICES:
        raise UserError(unknown("--device", options.device, list(DEVICES)))
    if options.gpu is not None and options.gpu not in machine_names():
        raise UserError(unknown("--gpu", options.gpu, machine_names()))
    if options.report is None:
        return None
    environment.check_home("--report", options.report)
    path = Path(options.report)
    stem = path.with_suffix("") if path.suffix in SUFFIXES else path
    if not stem.name or path.is_dir():
        raise UserError(f"--report {options.report} is a folder: name a file in it")
    check_writable(stem.parent, "--report")
    return stem


def check(topology: "Topology", report: CheckReport) -> None:
    """Run all parts and add them to the report; all ranks call it, and the main one has it whole."""
    from visionloom.launch.check_parts.operations import check_operations
    from visionloom.launch.check_parts.ranks import check_ranks, gather_results
    from visionloom.launch.check_parts.speeds import Speeds
    from visionloom.launch.check_parts.training import check_training

    device, several = topology.device, topology.world_size > 1
    results = report.timed("operations", lambda: check_operations(device))
    if several:
        results += report.timed("ranks", lambda: [*guarded("ranks", check_ranks, topology)])
    else:
        results += report.timed(
            "training", lambda: [*guarded("training", check_training, topology)]
        )
    report.results = gather_results(results, topology)

    assumed = machine(report.gpu_file) if report.gpu_file else None
    speeds = Speeds(topology, assumed)
    if several:
        report.speeds.append(report.timed("all-reduce", speeds.all_reduce))
    if topology.is_main:
        report.speeds += report.timed("speeds", lambda: [*speeds.measure()])
    topology.barrier()
    report.not_checked = not_checked(device.type, several)


def measured(topology: "Topology", folder: Path, report: CheckReport) -> "list[RankFacts]":
    """Measure each rank, and add that to the report; a rank that does not answer is a check that has failed."""
    from torch import bfloat16

    from visionloom.launch.preflight.run import Preflight

    assumed = machine(report.gpu_file) if report.gpu_file else None
    preflight = Preflight(topology, folder, assumed)
    try:
        ranks = report.timed("ranks before a run", lambda: preflight.run(bfloat16))
    except MachineError as error:
        if topology.is_main:
            warn(f"error: {one_line(str(error))}")
        # Without its words, which name hosts.
        fault = "a rank has not answered, or failed"
        report.results.append(CheckResult("ranks before a run", None, 0.0, fault))
        return []
    report.ranks = [asdict(facts) | {"host": ""} for facts in ranks]
    return ranks


def file_of(facts: dict[str, object], device: str) -> str:
    """Return the name of the only file of recipes/gpu that is about this machine's card; empty if there is none."""
    cards = facts["gpus"]
    if device != "cuda" or not isinstance(cards, list) or not cards:
        return ""
    return only_file_about(cards[0]["name"])


def not_checked(device: str, several: bool) -> list[str]:
    """Return what this call could not check, a line each."""
    lines = []
    if device != "cuda":
        lines.append(
            "GPU: kernels, speeds of a GPU, pinned copies (no GPU is visible, or --device cpu)"
        )
    if several:
        lines.append("gradients against a CPU, bf16 and a resume: run it without torchrun too")
    else:
        lines.append(
            "collectives and parallel layouts: torchrun --standalone --nproc-per-node N launch/check.py"
        )
    return lines


def show(report: CheckReport, ranks: "Sequence[RankFacts]", stem: Path | None) -> None:
    """Print and write the report."""
    from visionloom.launch.preflight.before_run import show as show_ranks

    console = PlainConsole(width=None if sys.stdout.isatty() else 120)
    for table in tables(report):
        console.print(table)
    if ranks:
        show_ranks(ranks)
    passed = len(report.results) - len(report.failures)
    seconds = sum(report.seconds.values())
    say(f"{passed} of {len(report.results)} checks passed in {seconds:.0f} s")
    for line in report.not_checked:
        say(f"not checked: {line}")
    if stem is not None:
        say(f"report: {', '.join(map(str, write(report, stem)))}")
    for result in report.failures:
        warn(f"failed: {one_line(result.line)}")


if __name__ == "__main__":
    sys.exit(main())
