"""From shards to packs of 8,192 tokens, beside megatron-energon with transformers' processor, on the same shards.

    python benchmarks/data/end_to_end.py [--folder DIR] [--images 1000]

N10  pictures a core-second and memory, workers included; N11 bytes of a patch; N1, N8, N9, N13: energon's part of other rows

Each loader runs in a process of its own. CPU time of all its processes counts, from the tenth pack on; memory is the most
that they hold at one moment, without the pages of libraries. Ours: `python benchmarks/data/end_to_end.py --ours FOLDER` prints JSON.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2] / ".link")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from visionloom.benchmarks.data.processes import run_apart, steady
from visionloom.benchmarks.data.synthetic import make
from visionloom.benchmarks.data.table import Row, show

WARM: Final = 10
"""Packs before the counting begins."""
BUFFERS: Final = (16, 64)
"""Samples of the peer's packing buffer: as in its examples, and where it is fastest."""
RATIO, MEMORY = 3.0, 0.6
GIB: Final = 2**30
energon: Final = partial(run_apart, Path(__file__).with_name("energon_peer.py"))


def ours(folder: Path, workers: int, images: int, dataset: str) -> dict[str, float]:
    """The cost of our packs: one pack a step, in the plan's order."""
    import torch

    from visionloom.data.config import DataConfig, DatasetConfig
    from visionloom.data.plan.open import StreamOptions
    from visionloom.data.stream.train_stream import PackStream
    from visionloom.data.stream.workers import iterate
    from visionloom.parallel.share import ALONE

    torch.set_num_threads(1)
    data = DataConfig(
        str(folder / "tokenizer"),
        {dataset: DatasetConfig(str(folder / dataset), over_length="drop")},
    )
    stream = PackStream(StreamOptions(data, "bench", 8192, 1, {}, "sqrt", 1))
    row = 0.0

    def counted() -> Iterator[tuple[int, int]]:
        nonlocal row
        for (batch,) in iterate(stream, range(10_000), ALONE, 1, workers):
            row = batch.patches.nbytes / len(batch.patches)
            yield len(batch.grid_thw), int((~batch.padding_mask).sum())

    return {**steady(counted(), WARM, images), "bytes_a_patch": row}


def exported(folder: Path, images: int) -> Path:
    """Shards of captions that both can read, more than are counted, their lengths counted before."""
    from visionloom.data.config import DataConfig, DatasetConfig
    from visionloom.data.plan.open import StreamOptions
    from visionloom.data.shards.energon import export_energon
    from visionloom.data.stream.train_stream import PackStream

    make(folder, captions=images + 2000, clips=4)
    export_energon(folder / "captions")
    for name in ("captions", "clips"):
        data = DataConfig(
            str(folder / "tokenizer"), {name: DatasetConfig(str(folder / name), over_length="drop")}
        )
        PackStream(StreamOptions(data, "bench", 8192, 1, {}, "sqrt", 1))
    return folder


def rows(folder: Path, images: int) -> Iterator[Row]:
    """N10 and N11."""
    captions, tokenizer = str(folder / "captions"), str(folder / "tokenizer")
    found: dict[str, Any] = {}
    for workers in (0, 2):
        mine = run_apart(
            Path(__file__), "--ours", str(folder), f"--workers={workers}", f"--images={images}"
        )
        for buffer in BUFFERS:
            words = (
                f"--tokenizer={tokenizer}",
                f"--buffer={buffer}",
                f"--workers={workers}",
                f"--images={images}",
            )
            peer = energon("packs", captions, *words)
            yield _compared(mine, peer, workers, buffer)
        found = {"ours": mine["bytes_a_patch"], "peer": peer["bytes_a_patch"]}
    clips = run_apart(Path(__file__), "--ours", str(folder), "--images=12", "--dataset=clips")
    said = f"{found['ours']:,.0f} of an image, {clips['bytes_a_patch']:,.0f} of a video"
    met = found["ours"] == 768 and clips["bytes_a_patch"] == 1536
    yield Row(
        "N11",
        "bytes of a patch on the host",
        said,
        f"{found['peer']:,.0f} (energon, HF)",
        "768, 1,536",
        met,
        found,
    )


def _compared(mine: dict[str, Any], peer: dict[str, Any], workers: int, buffer: int) -> Row:
    speeds = [one["images"] / one["cpu"] for one in (mine, peer)]
    fills = [one["tokens"] / one["packs"] / 8192 for one in (mine, peer)]
    memory = [one["memory"] / GIB for one in (mine, peer)]
    ratio, share = speeds[0] / speeds[1], memory[0] / memory[1]
    resident = [one["resident"] / GIB for one in (mine, peer)]
    said = [
        f"{speed:.0f} images/core-s, {held:.2f} GiB ({all_:.2f} resident), {fill:.1%} full"
        for speed, held, all_, fill in zip(speeds, memory, resident, fills, strict=True)
    ]
    names = ("images_per_cpu_second", "memory_gib", "resident_gib", "fill")
    numbers = {
        f"{who}_{name}": value
        for name, pair in zip(names, (speeds, memory, resident, fills), strict=True)
        for who, value in zip(("ours", "peer"), pair, strict=True)
    }
    what = f"shards to packs of 8K, {workers} workers, energon's buffer {buffer}: {ratio:.2f}x at {share:.2f}x memory"
    target = f">= {RATIO:g}x at <= {MEMORY:g}x memory"
    return Row(
        "N10",
        what,
        said[0],
        said[1] + " (energon)",
        target,
        ratio >= RATIO and share <= MEMORY,
        numbers,
    )


def main() -> None:
    """Measure and print the table, or be one side of it."""
    parser = argparse.ArgumentParser(
        description="from shards to packs, against megatron-energon (extra `bench`)"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        help="shards that an earlier run made here; without it they are made for this run",
    )
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--ours", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--dataset", default="captions", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.ours:
        print(
            json.dumps(ours(arguments.ours, arguments.workers, arguments.images, arguments.dataset))
        )
        return
    with tempfile.TemporaryDirectory() as scratch:
        show(rows(exported(arguments.folder or Path(scratch), arguments.images), arguments.images))


if __name__ == "__main__":
    main()
