"""Writing a store of a teacher, unit by unit, so that an interrupted command goes on; see teacher_store.py.

A unit is a run of a dataset's samples. Each copy of the teacher writes a shard of it with an index of its own, and when all have,
one rank marks the unit as done. At the end the indexes become one.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from visionloom.common.atomic import replacing
from visionloom.common.errors import UserError
from visionloom.common.jsonfile import JsonError, read_json
from visionloom.data.encode.encode import EncodedSample
from visionloom.data.shards.dataset import Location
from visionloom.data.shards.tar import entries
from visionloom.data.shards.write import tar_writer
from visionloom.data.stream.teacher_store import (
    ENTRY,
    FACTS,
    INDEX,
    KEY,
    StoredRows,
    StoreFacts,
    content_of,
    read_facts,
    sample_key,
)

UNIT_SAMPLES: Final = 1024
"""Samples of a unit: what an interruption costs at most."""
STAGING: Final = ".storing"
"""Folder of what is finished so far; gone when the store is complete."""
SETTINGS: Final = "settings.json"
KEYED: Final = np.dtype([("key", KEY), ("entry", ENTRY)])
"""A row of a shard's own index."""


class StoreUnit(NamedTuple):
    """A run of the samples of a dataset."""

    dataset: str
    number: int
    samples: range

    @property
    def name(self) -> str:
        """Return the beginning of the names of its files."""
        return f"{self.dataset}-{self.number:06d}"


def units_of(dataset: str, samples: int) -> Iterator[StoreUnit]:
    """Yield the units of a dataset with so many samples."""
    for number, start in enumerate(range(0, samples, UNIT_SAMPLES)):
        yield StoreUnit(dataset, number, range(start, min(samples, start + UNIT_SAMPLES)))


@dataclass(frozen=True)
class Named:
    """A sample, or a part of one, with its place."""

    sample: EncodedSample
    location: Location
    part_number: int


class StoreWriter:
    """Writes the shards of a store; all ranks have one, and agree outside of it who does what."""

    def __init__(self, folder: Path, facts: StoreFacts) -> None:
        """Begin a store, or go on with one, that has these facts but for its shards."""
        self.folder, self.facts, self.staging = folder, facts, folder / STAGING

    def is_complete(self) -> bool:
        """Return whether the store is written already; raises UserError if another one is there."""
        if not (self.folder / FACTS).exists():
            return False
        self._check_same(replace(read_facts(self.folder, "out"), shards=[]), self.folder)
        return True

    def begin(self) -> None:
        """Make the folder, by one rank; raises UserError if a store with other facts was begun in it."""
        path = self.staging / SETTINGS
        if path.exists():
            try:
                begun = read_json(self.staging, SETTINGS, StoreFacts)
            except (JsonError, OSError) as error:
                raise UserError(f"{error}: remove {self.staging} and start again") from None
            self._check_same(begun, self.staging)
            return
        self.staging.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(json.dumps(asdict(self.facts)).encode())

    def _check_same(self, begun: StoreFacts, where: Path) -> None:
        before, now = asdict(begun), asdict(self.facts)
        for name, value in now.items():
            if before[name] != value:
                raise UserError(
                    f"out={self.folder} holds a store with {name}={before[name]}, now it is {value}: use the same words again,"
                    f" another out=DIR, or remove {where}"
                )

    def is_done(self, unit: StoreUnit) -> bool:
        """Return whether all of a unit is written."""
        return self._mark(unit).exists()

    @contextmanager
    def shard(self, unit: StoreUnit, copy: int) -> Iterator["ShardWriter"]:
        """Open the shard of a unit that one copy of the teacher writes; it appears with its index, complete or not at all."""
        name = _shard_name(unit, copy)
        with replacing(self.folder / name) as file, tar_writer(file) as tar:
            writer = ShardWriter(tar)
            yield writer
        with replacing(self.staging / f"{name}.index") as file:
            file.write(writer.index(self.folder / name).tobytes())

    def mark_done(self, unit: StoreUnit, copies: int) -> None:
        """Note, by one rank, that all copies have written their shards of a unit."""
        with replacing(self._mark(unit)) as file:
            file.write(json.dumps(copies).encode())

    def finish(self, units: Sequence[StoreUnit]) -> StoreFacts:
        """Put the indexes together, by one rank, and write how the store was made last."""
        shards: list[str] = []
        rows: list[NDArray[np.void]] = []
        for unit in units:
            for copy in range(read_json(self.staging, self._mark(unit).name, int)):
                name = _shard_name(unit, copy)
                own = np.frombuffer((self.staging / f"{name}.index").read_bytes(), KEYED).copy()
                own["entry"]["shard"] = len(shards)
                shards.append(name)
                rows.append(own)
        # All in memory, by one rank: 70 bytes a sample.
        index = np.concatenate(rows)
        index = index[np.argsort(index["key"], kind="stable")]
        with replacing(self.folder / INDEX) as file:
            file.write(index["key"].tobytes() + index["entry"].tobytes())
        # Of an earlier attempt in another layout there may be more shards.
        for leftover in {path.name for path in self.folder.glob("*.tar")} - set(shards):
            (self.folder / leftover).unlink()
        facts = replace(self.facts, shards=shards)
        with replacing(self.folder / FACTS) as file:
            file.write((json.dumps(asdict(facts), indent=1) + "\n").encode())
        # Last: without the facts the same command would go on from here.
        shutil.rmtree(self.staging)
        return facts

    def _mark(self, unit: StoreUnit) -> Path:
        return self.staging / f"{unit.name}.json"


def _shard_name(unit: StoreUnit, copy: int) -> str:
    return f"{unit.name}-{copy:04d}.tar"


class ShardWriter:
    """The open shard of a unit, and what its index will hold."""

    def __init__(self, tar: object) -> None:
        """Write into a webdataset.TarWriter."""
        self._tar, self._rows = tar, dict[str, tuple[bytes, bytes, int]]()

    def put(self, named: Named, rows: StoredRows | None) -> None:
        """Write the rows of a sample; None: it could not be read."""
        place, part_number = named.location, named.part_number
        name = f"{place.shard.removesuffix('.tar')}-{place.key}-{part_number}"
        key = sample_key(named.sample.dataset, place, part_number)
        count = 0 if rows is None else len(rows.ids)
        self._rows[name] = key, content_of(named.sample), count
        content = b"" if rows is None else rows.packed()
        self._tar.write({"__key__": name, "npz": content})  # type: ignore[attr-defined]

    def index(self, path: Path) -> NDArray[np.void]:
        """Return the shard's own index (dtype KEYED), by what is read back from the disk."""
        index = np.zeros(len(self._rows), KEYED)
        # A copy with packs of padding alone has an archive without a file.
        written = entries(path) if len(index) else ()
        # Read back: what is on the disk is what a student will be given.
        for row, entry in zip(index, written, strict=True):
            row["key"], content, count = self._rows[entry.name.removesuffix(".npz")]
            place = (content, 0, count, entry.offset, entry.length, entry.crc32)
            row["entry"] = place
        return index
