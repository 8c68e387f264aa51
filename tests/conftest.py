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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The table of `make parity`: each layout's errors against one process."""
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
