"""What a data command shows while it works: a bar for each part on a terminal, plain lines anywhere else."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[str, int, int], None]
"""Called with the part's name, the units done and all its units."""


@contextmanager
def bars(unit: str = "samples") -> Iterator[Progress]:
    """A bar for each part on a terminal, else one line for each finished part."""
    if not sys.stdout.isatty():

        def print_finished(part: str, done: int, total: int) -> None:
            if done == total:
                print(f"{part}: {total:,} {unit}", flush=True)

        yield print_finished
        return
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

    with Bars() as shown:
        tasks: dict[str, TaskID] = {}

        def show(part: str, done: int, total: int) -> None:
            if part not in tasks:
                tasks[part] = shown.add_task(part, total=total)
            shown.update(tasks[part], completed=done, total=total)

        yield show
