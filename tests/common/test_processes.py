"""Work by several processes gives what `map` gives; what goes wrong in one arrives. Reference: the builtin map."""

import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from visionloom.common.processes import WAITING, as_finished, in_order
from visionloom.tests.common.work import fail_at_three, square, vanish_at_three


@pytest.mark.parametrize("workers", [1, 2])
def test_results_are_those_of_map(workers: int) -> None:
    items = list(range(7))
    assert list(in_order(square, items, workers)) == list(map(square, items))
    assert dict(as_finished(square, items, workers)) == dict(
        zip(items, map(square, items), strict=True)
    )


def test_items_are_read_as_workers_become_free() -> None:
    read: list[int] = []

    def items() -> Iterator[int]:
        for item in range(100):
            read.append(item)
            yield item

    for _ in as_finished(square, items(), 1):
        break
    assert len(read) == WAITING


def test_an_error_arrives_with_its_type() -> None:
    with pytest.raises(ValueError, match="three"):
        list(as_finished(fail_at_three, range(5), 2))
    with pytest.raises(ValueError, match="three"):
        list(in_order(fail_at_three, list(range(5)), 2))


def test_a_killed_worker_is_an_error() -> None:
    with pytest.raises(ChildProcessError, match="killed"):
        list(as_finished(vanish_at_three, range(5), 2))


def test_a_process_knows_when_it_began() -> None:
    """Reference: this process's clock before and after."""
    said = "import time; from visionloom.common.processes import seconds_alive as alive; print(-alive() + time.time())"
    before = time.time()
    child = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True)
    # The kernel counts hundredths.
    assert before - 0.02 <= float(child.stdout) <= time.time()
