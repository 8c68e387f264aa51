"""Reading samples without decoding, ours beside webdataset's: python benchmarks/data/read.py [--folder DIR] [--samples 1000]

N1  a sample in random order (JSON parsed and checked, the JPEG's bytes, both verified by CRC-32), against webdataset
    streaming the same shards in order (JSON parsed, nothing checked); then what encoding adds, stage by stage

CPU time on one core, the median of the repetitions. The photographs have 50 KB.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any, Final

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2] / ".link")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import webdataset

from visionloom.benchmarks.data.synthetic import make
from visionloom.benchmarks.data.table import Row, show
from visionloom.data.config import MediaConfig
from visionloom.data.encode.chat import render
from visionloom.data.encode.encode import encode_all
from visionloom.data.encode.tokenizer import Tokenizer
from visionloom.data.shards.dataset import Dataset

RULES: Final = MediaConfig()
MICROSECONDS: Final = 60.0
BATCH: Final = 32
"""Samples encoded together, as the reader does for a step."""


def measure(repetitions: int, samples: int, work: Callable[[], Any]) -> float:
    """Median CPU microseconds a sample; the first run warms up."""
    seconds = []
    for _ in range(repetitions + 1):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return median(seconds[1:]) / samples * 1e6


def rows(
    folder: Path, repetitions: int, energon: float | None = None, most: int = 1000
) -> Iterator[Row]:
    """N1, of the first captions in this folder; `energon`: microseconds of a sample, if measured on the same shards."""
    dataset, tokenizer = (
        Dataset.open(folder / "captions", "captions"),
        Tokenizer(str(folder / "tokenizer")),
    )
    count = min(most, len(dataset))
    order = np.random.default_rng(0).permutation(count).tolist()
    samples = [dataset.sample(index) for index in order]

    def timed(work: Callable[[], Any]) -> float:
        return measure(repetitions, count, work)

    def read() -> None:
        for index in order:
            sample = dataset.sample(index)
            for ref in sample.refs:
                dataset.member(index, ref)

    def stream() -> None:
        urls = [str(path) for path in sorted((folder / "captions").glob("*.tar"))]
        found = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
        assert sum(1 for sample in islice(found, count) if json.loads(sample["json"])) == count

    def encode() -> None:
        for start in range(0, count, BATCH):
            part = samples[start : start + BATCH]
            encode_all(part, tokenizer, RULES, ["captions"] * len(part))

    ours, peer = timed(read), timed(stream)
    peers = f"{peer:.0f} (webdataset, in order, JSON parsed, nothing checked)"
    numbers = {"ours_us": ours, "webdataset_us": peer}
    if energon is not None:
        peers, numbers = (
            f"{peers}, {energon:.0f} (energon, likewise)",
            {**numbers, "energon_us": energon},
        )
    what = "sample and picture in random order, both checked, not decoded"
    yield Row(
        "N1",
        what,
        f"{ours:.0f} \u00b5s",
        peers,
        f"<= {MICROSECONDS:g} \u00b5s",
        ours <= MICROSECONDS,
        numbers,
    )
    yield _part(
        "of it the sample: read, checked, parsed",
        timed(lambda: [dataset.sample(index) for index in order]),
    )
    yield _part(
        "rendering: template, grids, loss weights",
        timed(lambda: [render(sample, RULES) for sample in samples]),
    )
    yield _part("rendering, tokenising, positions (kept for small datasets)", timed(encode))


def _part(what: str, microseconds: float) -> Row:
    return Row("", what, f"{microseconds:.0f} \u00b5s", numbers={"ours_us": microseconds})


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        description="reading samples without decoding, against webdataset"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        help="shards made by synthetic.py; without it they are made for this run",
    )
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--repetitions", type=int, default=7)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = make(arguments.folder or Path(scratch), captions=arguments.samples)
        show(rows(folder, arguments.repetitions))


if __name__ == "__main__":
    main()
