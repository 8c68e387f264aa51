"""Shared fixtures: the device of this test run, and a one-process topology."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from visionloom.data.demo.make import make_demo
from visionloom.parallel import topology as topologies
from visionloom.parallel.config import ParallelConfig
from visionloom.parallel.topology import Topology
from visionloom.tests import fault_rows
from visionloom.tests.ranks import RankPool

# The same examples in each run: what fails, fails by the change at hand. `--hypothesis-profile=default` draws others.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--device cuda` runs the one-process tests on a GPU."""
    parser.addoption(
        "--device", default="cpu", choices=["cpu", "cuda"], help="device of the one-process tests"
    )


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device that this test run is about."""
    return topologies.choose_device(request.config.getoption("--device"))


@pytest.fixture(scope="session")
def topology(device: torch.device) -> Iterator[Topology]:
    """One process without any parallelism."""
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
    yield topologies.start(ParallelConfig(), device)
    topologies.stop()


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """The processes for tests with more than one rank."""
    ranks = RankPool()
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's shards at a twentieth of their size."""
    folder = tmp_path_factory.mktemp("demo")
    make_demo(folder, scale=0.05)
    return folder


PLACES = pytest.StashKey[dict[str, str]]()
"""Of each test that was collected, the command that runs it."""


@pytest.hookimpl(tryfirst=True)  # before those that are not asked for go
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Note where each test runs, for the table of faults."""
    places = config.stash.setdefault(PLACES, {})
    for item in items:
        marks = {mark.name for mark in item.iter_markers()}
        places.setdefault(fault_rows.name_of(item.nodeid), fault_rows.place_of(marks))


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """The tables of `make faults`, and of `make proofs` and `make parity`."""
    if config.option.markexpr == "faults":
        outcomes: dict[str, set[str]] = {}
        for outcome in ("passed", "failed", "error", "skipped"):
            for report in terminalreporter.stats.get(outcome, []):
                name = fault_rows.name_of(report.nodeid)
                # A fixture that cannot be made is no proof either.
                outcomes.setdefault(name, set()).add(outcome.replace("error", "failed"))
        fault_rows.write_table(terminalreporter, outcomes, config.stash.get(PLACES, {}))
    write_layouts(terminalreporter)


def write_layouts(terminalreporter: pytest.TerminalReporter) -> None:
    """The table of `make proofs` and `make parity`: each layout's errors against one process."""
    reports = [
        report
        for outcome in ("passed", "failed")
        for report in terminalreporter.getreports(outcome)
    ]
    rows = [value for report in reports for key, value in report.user_properties if key == "row"]
    if not rows:
        return
    terminalreporter.section("layouts against one process (largest relative error)")
    terminalreporter.write_line(
        f"{'layout':<48} {'ranks':>5} {'loss':>8} {'gradient':>8} {'20 steps':>8}  in"
    )
    for name, ranks, loss, gradient, parameter, curve in rows:
        terminalreporter.write_line(
            f"{name:<48} {ranks:>5} {loss:>8.1e} {gradient:>8.1e} {curve:>8.1e}  {parameter}"
        )
