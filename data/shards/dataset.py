"""Datasets on disk or behind a URL: random access to samples and media of indexed WebDataset tar files.

A dataset is a folder with `dataset.json`, `<name>-000000.tar` and `<name>-000000.tar.qidx`, and so on. Only the index
is read to know what is where; samples and media are read by offset and checked by CRC-32.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Final

import numpy as np

from visionloom.common.errors import UserError
from visionloom.data.config import StoreConfig
from visionloom.data.shards.index import ByteSpan, ShardIndex, tar_edges
from visionloom.data.shards.manifest import MANIFEST, ShardInfo, parse_manifest
from visionloom.data.shards.media_header import MediaFacts
from visionloom.data.shards.open_store import is_url, open_store
from visionloom.data.shards.sample import SCHEMA_VERSION, Sample, SampleError
from visionloom.data.shards.sample_json import parse_sample
from visionloom.data.shards.store import LocalStore, MissingBytes, Store, StoreError
from visionloom.data.shards.transports import shown

LONGEST_RUN: Final = 8 * 2**20
"""Bytes up to which neighbouring members are read at once."""
LARGEST_GAP: Final = 64 * 2**10
"""Bytes between two members that are read along with them rather than asked for twice."""

REQUESTS: Final = 16
"""Reads of a remote store in flight at once: enough to hide the time of a round trip to an object store."""
REMOTE_INDEX_BYTES: Final = 256 * 2**20
"""Indexes of a remote dataset that a process keeps in memory: of some 2 million samples with a picture each."""


@dataclass(frozen=True, slots=True)
class Location:
    """Where a sample or one of its members lies: shard file, row in the shard, key, and its bytes in the tar."""

    shard: str
    row: int
    key: str
    offset: int
    length: int
    crc32: int


@dataclass(frozen=True, slots=True)
class ReadRange:
    """Neighbouring members of one sample, read at once: bytes of the shard, and the names in them with their spans."""

    index: int
    offset: int
    length: int
    members: tuple[tuple[str, ByteSpan], ...]


class _Opened:
    """What one process has open of a dataset: its store, and the indexes that it met.

    Those of a folder are mapped and all stay; those of a remote store are in memory, at most REMOTE_INDEX_BYTES of them.
    """

    def __init__(self, process: int, store: Store) -> None:
        self.process, self.store = process, store
        self.indices: dict[int, ShardIndex] = {}
        self.threads = ThreadPoolExecutor(
            REQUESTS, "visionloom-json"
        )  # starts none before a remote sample is read
        self._locks: dict[int, Lock] = {}
        self._lock = Lock()

    def lock_of(self, shard: int) -> Lock:
        """The lock to hold while a shard's index is opened."""
        with self._lock:
            return self._locks.setdefault(shard, Lock())

    def keep(self, shard: int, index: ShardIndex) -> None:
        """Keep an index for later, in the place of those that came first."""
        with self._lock:
            self.indices[shard] = index
            total = sum(one.bytes for one in self.indices.values()) if self.store.remote else 0
            for oldest in list(self.indices)[:-1]:
                if total <= REMOTE_INDEX_BYTES:
                    return
                total -= self.indices.pop(oldest).bytes


class Dataset:
    """Random access to the samples of a folder of indexed shards.

    Safe in threads and after fork (positional reads, no shared file offset), and picklable (files open again on use).
    """

    def __init__(
        self, path: str, name: str, shards: tuple[ShardInfo, ...], store: Store, config: StoreConfig
    ) -> None:
        self.path, self.name, self.shards, self.config = path, name, shards, config
        self.remote = store.remote
        self._starts = np.cumsum([0, *(shard.samples for shard in shards)], dtype=np.int64)
        self._opened: _Opened | None = _Opened(os.getpid(), store)

    @classmethod
    def open(
        cls,
        path: str | Path,
        name: str,
        group: str = "data.datasets",
        config: StoreConfig | None = None,
    ) -> "Dataset":
        """Open the dataset in a folder or URL; errors name the option `group`.`name`.path.

        Raises UserError if the folder, dataset.json or a shard is missing, a shard's size differs from what was
        indexed, or there are no samples. The shards of a URL are looked at when they are first read.
        """
        option, where, config = f"{group}.{name}.path", str(path), config or StoreConfig()
        if not is_url(where) and not Path(where).is_dir():
            raise UserError(f"{option}: no folder {where}")
        store = open_store(where, option, config)
        where = shown(where) if store.remote else where
        try:
            content = store.whole(MANIFEST)
        except StoreError as error:
            if store.remote:
                raise
            raise UserError(f"{option}: {error}") from None
        except FileNotFoundError:
            fix = "" if store.remote else f": run python launch/data.py index {where}"
            raise UserError(f"{option}: {where} has no {MANIFEST}{fix}") from None
        shards = parse_manifest(content, f"{where}/{MANIFEST}", option)
        if not store.remote:
            _check_shards(store, option, shards)
        return cls(str(path), name, shards, store, config)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the shards' names, sizes and contents, the CRC-32 of every member among them."""
        rows = [[shard.file, shard.samples, shard.bytes, shard.content] for shard in self.shards]
        return hashlib.sha256(json.dumps([SCHEMA_VERSION, rows]).encode()).hexdigest()

    @property
    def keys(self) -> list[str]:
        """The samples' keys in order (reads every index)."""
        return [
            self.index(number).key(row)
            for number, shard in enumerate(self.shards)
            for row in range(shard.samples)
        ]

    def location(self, index: int, ref: str = "") -> Location:
        """Where sample `index` lies: its JSON, or its media member `ref` if it has it."""
        shard, row = self._find(index)
        found = self.index(shard)
        number = found.names(row).get(ref)
        span = found.document(row) if number is None else found.span(number)
        return Location(
            self.shards[shard].file, row, found.key(row), span.offset, span.length, span.crc32
        )

    def sample(self, index: int) -> Sample:
        """Read and check sample `index`; raises SampleError if its bytes changed or break the schema."""
        shard, row = self._find(index)
        found = self.index(shard)
        origin = f"{self.shards[shard].file}:{found.key(row)}"
        return parse_sample(self._read(shard, found.document(row), origin, "json"), origin=origin)

    def samples(self, indices: Sequence[int]) -> list[Sample | SampleError]:
        """Several samples, each read or what is wrong with it; many at a time where a read takes a network round trip."""
        if self.remote:
            return list(self._here.threads.map(self._sample, indices))
        return [self._sample(index) for index in indices]

    def _sample(self, index: int) -> Sample | SampleError:
        try:
            return self.sample(index)
        except SampleError as error:
            return error

    def member(self, index: int, ref: str) -> bytes:
        """The bytes of media member `ref` of sample `index`; raises SampleError if missing or changed."""
        shard, row = self._find(index)
        found = self.index(shard)
        origin = f"{self.shards[shard].file}:{found.key(row)}"
        return self._read(shard, self._span(found, row, ref, origin), origin, ref)

    def media(self, index: int) -> dict[str, MediaFacts]:
        """What the headers of the sample's members said when they were indexed, by name."""
        shard, row = self._find(index)
        found = self.index(shard)
        return {name: found.media(number) for name, number in found.names(row).items()}

    def runs(self, index: int, refs: Sequence[str]) -> list[ReadRange]:
        """The reads that bring these members of a sample, in the order of `refs`; names that it lacks are left out."""
        shard, row = self._find(index)
        found = self.index(shard)
        numbers = found.names(row)
        runs: list[ReadRange] = []
        for ref in dict.fromkeys(ref for ref in refs if ref in numbers):
            span = found.span(numbers[ref])
            last = runs[-1] if runs else ReadRange(index, 0, -LARGEST_GAP - 1, ())
            gap, length = (
                span.offset - last.offset - last.length,
                span.offset + span.length - last.offset,
            )
            if 0 <= gap <= LARGEST_GAP and length <= LONGEST_RUN:
                runs[-1] = ReadRange(index, last.offset, length, (*last.members, (ref, span)))
            else:
                runs.append(ReadRange(index, span.offset, span.length, ((ref, span),)))
        return runs

    def read_run(self, run: ReadRange) -> dict[str, bytes | SampleError]:
        """The members of a run, each its bytes or what is wrong with it."""
        shard, row = self._find(run.index)
        origin = f"{self.shards[shard].file}:{self.index(shard).key(row)}"
        try:
            data = memoryview(self._store.read(self.shards[shard].file, run.offset, run.length))
        except MissingBytes as error:
            return {ref: SampleError(origin, ref, str(error)) for ref, _ in run.members}
        found: dict[str, bytes | SampleError] = {}
        for ref, span in run.members:
            part = bytes(data[span.offset - run.offset :][: span.length])
            try:
                found[ref] = (
                    part
                    if zlib.crc32(part) == span.crc32
                    else self._read(shard, span, origin, ref, fresh=True)
                )
            except SampleError as error:
                found[ref] = error
        return found

    def will_read(self, index: int) -> None:
        """Say that a sample is about to be read, so that a local disk begins now."""
        shard, row = self._find(index)
        start, end = self.index(shard).extent(row)
        self._store.will_read(self.shards[shard].file, start, end - start)

    def _find(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return shard, index - int(self._starts[shard])

    def _span(self, found: ShardIndex, row: int, ref: str, origin: str) -> ByteSpan:
        number = found.names(row).get(ref)
        if number is None:
            raise SampleError(origin, ref, "no such media member")
        return found.span(number)

    @property
    def _here(self) -> "_Opened":
        """What this process has open: nothing is shared with the one that it was forked from."""
        opened = self._opened
        if opened is None or opened.process != os.getpid():
            opened = self._opened = _Opened(
                os.getpid(), open_store(self.path, f"dataset {self.name}", self.config)
            )
        return opened

    @property
    def _store(self) -> Store:
        return self._here.store

    def index(self, shard: int) -> ShardIndex:
        """The index of a shard, by its number in `shards`; raises UserError if it or the tar is not the right one."""
        opened = self._here
        found = opened.indices.get(shard)
        if found is None:
            with opened.lock_of(
                shard
            ):  # many threads may want the same one, and it is to be read once
                found = opened.indices.get(shard) or self._open_index(self.shards[shard])
            opened.keep(shard, found)
        return found

    def _open_index(self, info: ShardInfo) -> ShardIndex:
        """The index of a shard, checked against dataset.json, and the shard's size and ends against the index."""
        name = f"{info.file}.qidx"
        where = shown(self.path) if self.remote else self.path
        fix = f"run python launch/data.py index {where}"
        data = self._index_bytes(name, f"{where}/{name} is missing or empty: {fix}")
        if (
            hashlib.sha256(data.data).hexdigest() != info.sha256 and self.remote
        ):  # of a dataset that was here before
            data = self._index_bytes(name, f"{where}/{name} is missing: {fix}", fresh=True)
        if hashlib.sha256(data.data).hexdigest() != info.sha256:
            raise UserError(f"{where}/{name} does not match {MANIFEST}: {fix}")
        try:
            found = ShardIndex(data)
        except ValueError as error:
            raise UserError(f"{where}/{name}: {error}: {fix}") from None
        if len(found.samples) != info.samples or found.tar_bytes != info.bytes:
            raise UserError(
                f"{where}/{name}: {len(found.samples)} samples, but {MANIFEST} says {info.samples}: {fix}"
            )
        if isinstance(self._store, LocalStore) and not _is_indexed_tar(
            self._store, info.file, found
        ):
            raise UserError(
                f"{where}/{info.file}: its header at byte 0, or its end, is not that of the indexed tar: {fix}"
            )
        return found

    def _index_bytes(self, name: str, problem: str, fresh: bool = False) -> Any:
        store = self._store
        try:
            if isinstance(store, LocalStore):
                return np.memmap(store.place(name), np.uint8, mode="r")
            return np.frombuffer(store.whole(name, fresh), np.uint8)
        except (FileNotFoundError, ValueError):  # an empty file cannot be mapped
            raise UserError(problem) from None

    def _read(
        self, shard: int, span: ByteSpan, origin: str, what: str, fresh: bool = False
    ) -> bytes:
        file = self.shards[shard].file
        try:
            data = self._store.read(file, span.offset, span.length, fresh)
        except MissingBytes as error:
            raise SampleError(origin, what, str(error)) from None
        if (found := zlib.crc32(data)) == span.crc32:
            return data
        if not fresh:  # what came through a network or out of a cache may be right the second time
            return self._read(shard, span, origin, what, fresh=True)
        raise SampleError(
            origin,
            what,
            f"the bytes changed since {shown(self.path) if self.remote else self.path} was indexed"
            f" (CRC-32 {found:08x}, {span.crc32:08x} was indexed)",
        )


def _check_shards(store: Store, option: str, shards: tuple[ShardInfo, ...]) -> None:
    assert isinstance(store, LocalStore)
    fix = f"restore it or run python launch/data.py index {store.folder}"
    for shard in shards:
        path = store.folder / shard.file
        try:
            size = os.stat(store.place(shard.file)).st_size
        except FileNotFoundError:
            raise UserError(f"{option}: shard {path} is missing: {fix}") from None
        except StoreError as error:
            raise UserError(f"{option}: shard {error}") from None
        if size != shard.bytes:
            raise UserError(f"{option}: {path} has {size} bytes, {shard.bytes} were indexed: {fix}")


def _is_indexed_tar(store: LocalStore, file: str, index: ShardIndex) -> bool:
    """False if the tar was replaced or its first header damaged; reads tell soon enough if it is gone or cut short."""
    try:
        return tar_edges(store.place(file), index.tar_bytes) in (index.tar_edges, b"")
    except FileNotFoundError:
        return True
