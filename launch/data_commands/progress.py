"""What a data command shows while it works: a bar for each part on a terminal, plain lines anywhere else."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from visionloom.common.progress import PartProgress
from visionloom.common.text import one_line, say


@contextmanager
def bars(unit: str = "samples") -> Iterator[PartProgress]:
    """Show a bar for each part on a terminal, else one line for each finished part."""
    if sys.stdout.isatty():
        with _live_bars() as show:
            yield show
        return

    def print_finished(part: str, done: int, total: int) -> None:
        if done == total:
            say(f"{part}: {total:,} {unit}")

    yield print_finished


@contextmanager
def _live_bars() -> Iterator[PartProgress]:
    # rich takes a tenth of a second to import, which help and wrong words need not wait for.
    from rich.progress import BarColumn, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    from visionloom.common.screen import PlainConsole

    with Bars(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=PlainConsole(),
    ) as shown:
        tasks: dict[str, TaskID] = {}

        def show(part: str, done: int, total: int) -> None:
            if part not in tasks:
                tasks[part] = shown.add_task(one_line(part), total=total)
            shown.update(tasks[part], completed=done, total=total)

        yield show
