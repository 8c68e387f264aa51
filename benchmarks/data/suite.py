"""All goals of the data system in one table, ours beside the peers', measured in this run: make bench-data

    python benchmarks/data/suite.py [--quick] [--out benchmarks/results]

N1 to N14, of which media.py, read.py, plan.py, end_to_end.py and exact.py measure some each and can be run alone. Writes
data-DATE.json and data-DATE.md. Some four minutes on two cores; --quick takes half as long, and its figures are rough. The figures are
CPU time, not wall time, but for N8, so that other work on the machine changes them little. Needs the extra `bench`.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2] / ".link")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from visionloom.benchmarks.data import end_to_end, exact, media, plan, read
from visionloom.benchmarks.data.end_to_end import energon
from visionloom.benchmarks.data.table import Row, as_json, machine, markdown, show

SAMPLES, CAPTIONS, IMAGES, REPETITIONS = (40_000, 12_000), (20_000, 2_000), (600, 200), (7, 2)
"""Of a mixture, indexed and counted, through both loaders, of each measurement; and with --quick."""


def measure(folder: Path, quick: bool) -> Iterator[Row]:
    """All rows; those of one goal come together, goals in the order in which they are measured."""
    images, repetitions = IMAGES[quick], REPETITIONS[quick]
    end_to_end.exported(folder, images)
    captions, tokenizer = str(folder / "captions"), f"--tokenizer={folder / 'tokenizer'}"
    seconds = energon("read", captions, f"--images={images}")["seconds"]
    yield from read.rows(folder, repetitions, seconds * 1e6, images)
    yield from media.rows(repetitions)
    state = energon("resume", captions, tokenizer, "--buffer=64")
    peer = plan.Peer(state["seconds"], state["bytes"])
    yield from plan.rows(SAMPLES[quick], CAPTIONS[quick], peer)
    yield from end_to_end.rows(folder, images)
    yield from exact.rows(energon("order", captions, "--images=256"))


def main() -> None:
    """Measure, print and write the table; exits with 1 if a goal is not met."""
    parser = argparse.ArgumentParser(
        description="all goals of the data system, ours beside the peers'"
    )
    parser.add_argument("--quick", action="store_true", help="rough figures in half the time")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("benchmarks/results"),
        help="folder for data-DATE.json and .md",
    )
    arguments = parser.parse_args()
    started, facts, rows = time.perf_counter(), machine(), list[Row]()
    with tempfile.TemporaryDirectory() as folder:
        for row in measure(Path(folder), arguments.quick):
            rows.append(row)
            print(
                f"{time.perf_counter() - started:4.0f} s  {row.goal:4}{row.what}: {row.ours}",
                file=sys.stderr,
                flush=True,
            )
    number = {row.goal: int(row.goal[1:]) for row in rows if row.goal}
    rows = [row for _, row in sorted(_placed(rows, number), key=lambda pair: pair[0])]
    facts |= {"command": " ".join(["make bench-data", *["QUICK=1"] * arguments.quick])}
    facts |= {"load after": " ".join(f"{load:.1f}" for load in os.getloadavg())}
    facts |= {"wall time": f"{time.perf_counter() - started:.0f} s"}
    show(rows)
    arguments.out.mkdir(parents=True, exist_ok=True)
    name = f"data-{facts['date'][:10]}{'-quick' * arguments.quick}"
    (arguments.out / f"{name}.json").write_text(json.dumps(as_json(rows, facts), indent=1) + "\n")
    (arguments.out / f"{name}.md").write_text(markdown(rows, facts))
    print(f"{arguments.out / name}.md and .json")
    sys.exit(any(row.met is False for row in rows))


def _placed(rows: list[Row], numbers: dict[str, int]) -> Iterator[tuple[int, Row]]:
    """Each row with the number of its goal; one without a goal belongs to the one above."""
    last = 0
    for row in rows:
        last = numbers.get(row.goal, last)
        yield last, row


if __name__ == "__main__":
    main()
