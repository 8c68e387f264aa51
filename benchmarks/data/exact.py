"""Nothing lost, nothing changed: planted faults, and other numbers of ranks and workers: python benchmarks/data/exact.py

N12  the faults of tests/data/stream/test_faults.py: how many are written down, and whether other packs keep their bytes; beside
     webdataset with `warn_and_continue` on the same shards
N13  packs of each step while the run goes on with 8, 4 and 6 data-parallel ranks, and with 0 to 2 workers
"""

import io
import json
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2] / ".link")

import webdataset
from PIL import Image as Pillow

from visionloom.benchmarks.data import synthetic
from visionloom.benchmarks.data.table import Row, show
from visionloom.data.config import DataConfig, DatasetConfig
from visionloom.data.plan.open import StreamOptions
from visionloom.data.shards.dataset import Dataset
from visionloom.data.shards.write import write_shards
from visionloom.data.stream.batch import PackedBatch
from visionloom.data.stream.train_stream import PackStream
from visionloom.data.stream.workers import iterate
from visionloom.parallel.share import ALONE, Share
from visionloom.tests.data.samples import RULES
from visionloom.tests.data.stream.test_faults import (
    CHANGED_LATER,
    PLANTED,
    SAME,
    SAMPLES,
    damage_later,
    digest,
    keys,
    pairs,
)

PACKS, STEPS, BATCH = 60, 9, 24
BROKEN: dict[int, str] = {number: fault[0] for number, fault in PLANTED.items()} | {
    number: fault[0] for number, fault in CHANGED_LATER.items()
}
"""Samples that cannot be used, and why."""


def stream(
    folder: Path, name: str, length: int, batch: int, quarantine: Path | None = None
) -> PackStream:
    """Packs of one dataset, whatever share of it is bad."""
    data = DataConfig(
        str(folder / "tokenizer"), {name: DatasetConfig(str(folder / name))}, media=replace(RULES)
    )
    data.max_bad_fraction = 1.0
    return PackStream(
        StreamOptions(data, "bench", length, batch, {}, "sqrt", 7), quarantine=quarantine
    )


def faults(folder: Path) -> Row:
    """N12."""
    synthetic.make(folder)
    for name in ("good", "bad"):
        write_shards(folder / name, name, pairs(name == "bad"), 25)
    log = folder / "quarantine.jsonl"
    with patch.object(Dataset, "fingerprint", SAME):  # orders follow the content: one name for both
        good, bad = (
            stream(folder, "good", 256, 1, folder / "unused.jsonl"),
            stream(folder, "bad", 256, 1, log),
        )
        damage_later(folder / "bad")
        expected, found = (list(_packs(one)) for one in (good, bad))
    names = {f"s:{number}" for number in BROKEN}
    clean = [
        pair for pair in zip(expected, found, strict=True) if not names & set(pair[0].sample_ids)
    ]
    same = sum(digest(one) == digest(two) for one, two in clean)
    logged = keys(log)
    served, lost, told = lossy(folder / "bad")
    peers = f"webdataset: {told} told, {served} served as if good (2 are videos, left undecoded), {lost} good samples lost"
    ours = f"{len(set(logged) & set(BROKEN))} of {len(BROKEN)} logged, {same} of {len(clean)} other packs equal"
    met = logged == sorted(BROKEN) and same == len(clean)
    numbers = {
        "planted": len(BROKEN),
        "logged": len(logged),
        "clean_packs": len(clean),
        "equal_packs": same,
    }
    numbers |= {"peer_served": served, "peer_lost": lost, "peer_told": told}
    return Row(
        "N12", "planted faults, a damaged tar header beside", ours, peers, "all, all", met, numbers
    )


def _packs(one: PackStream) -> Iterator[PackedBatch]:
    return (batch for step in iterate(one, range(PACKS), ALONE, 1, 0) for batch in step)


def lossy(folder: Path) -> tuple[int, int, int]:
    """What webdataset, decoding pictures with Pillow, makes of it: (bad samples served, good ones not served, warnings)."""
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        handler = webdataset.warn_and_continue
        found = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False, handler=handler)
        served = {
            int(sample["__key__"].rpartition("/")[2])
            for sample in found.map(_decoded, handler=handler)
        }
    good = set(range(SAMPLES)) - set(BROKEN)
    return len(served & set(BROKEN)), len(good - served), len(told)


def _decoded(sample: Mapping[str, bytes]) -> Mapping[str, bytes]:
    json.loads(sample["json"])
    for name, data in sample.items():
        if name.endswith((".jpg", ".png")):
            Pillow.open(io.BytesIO(data)).convert("RGB")
    return sample


def layouts(folder: Path, energon: Mapping[str, float] | None = None) -> Row:
    """N13: packs of each step while ranks change under way, and with workers."""
    synthetic.make(folder, captions=600)
    whole = [_of_step(stream(folder, "captions", 2048, BATCH), step, 1) for step in range(STEPS)]
    changed, state = [], None
    for first, ranks in ((0, 8), (3, 4), (6, 6)):
        excerpt = stream(folder, "captions", 2048, BATCH)
        if state is not None:
            excerpt.load_state(json.loads(state))
        changed += [_of_step(excerpt, step, ranks) for step in range(first, first + 3)]
        state = json.dumps(excerpt.state(first + 3))
    kinds = []
    for workers in range(3):
        steps = iterate(stream(folder, "captions", 2048, BATCH), range(3), Share(1, 4), 1, workers)
        kinds.append([digest(batch) for step in steps for batch in step])
    equal = sum(one == two for one, two in zip(whole, changed, strict=True))
    workers = sum(kind == kinds[0] for kind in kinds)
    ours = f"{equal} of {STEPS} steps equal over 8, 4, 6 ranks, {workers} of 3 worker counts"
    peers, numbers = "", {"equal_steps": float(equal), "equal_workers": float(workers)}
    if energon:
        peers = f"energon's first samples that stay: {energon['two_ranks']:.0%} on 2 ranks, {energon['two_workers']:.0%} with 2 workers"
        numbers |= {f"energon_{name}": value for name, value in energon.items()}
    return Row(
        "N13",
        "other ranks and workers",
        ours,
        peers,
        "all, all",
        equal == STEPS and workers == 3,
        numbers,
    )


def _of_step(made: PackStream, step: int, ranks: int) -> list[str]:
    """Digests of the step's packs, in no rank's order."""
    return sorted(
        digest(batch)
        for rank in range(ranks)
        for batch in made.micro_batches(step, Share(rank, ranks), 1)
    )


def rows(energon: Mapping[str, float] | None = None) -> Iterator[Row]:
    """N12 and N13; `energon`: shares of samples that stay with other ranks and workers, if measured."""
    with tempfile.TemporaryDirectory() as folder:
        yield faults(Path(folder))
        yield layouts(Path(folder), energon)


def main() -> None:
    """Measure and print the table."""
    show(rows())


if __name__ == "__main__":
    main()
