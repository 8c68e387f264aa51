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
from visionloom.data.shards.index import tar_edges
from visionloom.data.shards.manifest import MANIFEST, ShardInfo, parse_manifest
from visionloom.data.shards.media_header import MediaFacts
from visionloom.data.shards.open_store import is_url, open_store
from visionloom.data.shards.sample import SCHEMA_VERSION, Sample, SampleError
from visionloom.data.shards.sample_json import parse_sample
from visionloom.data.shards.shard_index import ByteSpan, ShardIndex
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
    """The place of a sample or of one of its members: shard file, row in the shard, key, and its bytes in the tar."""

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

    def widened(self, ref: str, span: ByteSpan) -> "ReadRange | None":
        """Return the range with one more member, or None where that is too far away or makes it too long."""
        gap = span.offset - self.offset - self.length
        length = span.offset + span.length - self.offset
        if not 0 <= gap <= LARGEST_GAP or length > LONGEST_RUN:
            return None
        return ReadRange(self.index, self.offset, length, (*self.members, (ref, span)))


class _Opened:
    """The open parts of a dataset in one process: its store, and the indexes that it has read.

    Those of a folder are mapped and all stay; those of a remote store are in memory, at most REMOTE_INDEX_BYTES of them.
    """

    def __init__(self, process: int, store: Store) -> None:
        self.process, self.store = process, store
        self.indices: dict[int, ShardIndex] = {}
        # Starts no thread before a remote sample is read.
        self.threads = ThreadPoolExecutor(REQUESTS, "visionloom-json")
        self._locks: dict[int, Lock] = {}
        self._lock = Lock()

    def lock_of(self, shard: int) -> Lock:
        """Return the lock to hold while a shard's index is opened."""
        with self._lock:
            return self._locks.setdefault(shard, Lock())

    def keep(self, shard: int, index: ShardIndex) -> None:
        """Keep an index for later, in the place of those that came first."""
        with self._lock:
            self.indices[shard] = index
            # Mapped indexes cost no memory, so that those of a folder are not counted.
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
        counts = [shard.samples for shard in shards]
        self._starts = np.cumsum([0, *counts], dtype=np.int64)
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
        indexed, or there are no samples. The shards of a URL are checked when they are first read.
        """
        option = f"{group}.{name}.path"
        where = str(path)
        config = config or StoreConfig()
        if not is_url(where) and not Path(where).is_dir():
            raise UserError(f"{option}: no folder {where}")
        store = open_store(where, option, config)
        where = shown(where) if store.remote else where
        shards = _read_shards(store, where, option)
        return cls(str(path), name, shards, store, config)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        # Descriptors, maps and threads belong to one process.
        return {**self.__dict__, "_opened": None}

    @property
    def fingerprint(self) -> str:
        """Return the SHA-256 over the shards' names, sizes and contents, which include the CRC-32 of every member."""
        rows = [[shard.file, shard.samples, shard.bytes, shard.content] for shard in self.shards]
        document = json.dumps([SCHEMA_VERSION, rows])
        return hashlib.sha256(document.encode()).hexdigest()

    @property
    def keys(self) -> list[str]:
        """Return the samples' keys in order (reads every index)."""
        keys: list[str] = []
        for number, shard in enumerate(self.shards):
            index = self.index(number)
            keys += [index.key(row) for row in range(shard.samples)]
        return keys

    def location(self, index: int, ref: str = "") -> Location:
        """Return the place of sample `index`: of its JSON, or of its media member `ref` if it has it."""
        shard, row = self._find(index)
        shard_index = self.index(shard)
        member = shard_index.names(row).get(ref)
        span = shard_index.document(row) if member is None else shard_index.span(member)
        file, key = self.shards[shard].file, shard_index.key(row)
        return Location(file, row, key, span.offset, span.length, span.crc32)

    def sample(self, index: int) -> Sample:
        """Read and check sample `index`; raises SampleError if its bytes changed or break the schema."""
        shard, row = self._find(index)
        shard_index = self.index(shard)
        origin = f"{self.shards[shard].file}:{shard_index.key(row)}"
        document = self._read(shard, shard_index.document(row), origin, "json")
        return parse_sample(document, origin=origin)

    def samples(self, indices: Sequence[int]) -> list[Sample | SampleError]:
        """Read several samples; in the place of one that is at fault stands its error."""
        if self.remote:
            # Each read takes a network round trip: many at a time.
            return list(self._here.threads.map(self._sample, indices))
        return [self._sample(index) for index in indices]

    def _sample(self, index: int) -> Sample | SampleError:
        try:
            return self.sample(index)
        except SampleError as error:
            return error

    def member(self, index: int, ref: str) -> bytes:
        """Read media member `ref` of sample `index`; raises SampleError if missing or changed."""
        shard, row = self._find(index)
        shard_index = self.index(shard)
        origin = f"{self.shards[shard].file}:{shard_index.key(row)}"
        member = shard_index.names(row).get(ref)
        if member is None:
            raise SampleError(origin, ref, "no such media member")
        return self._read(shard, shard_index.span(member), origin, ref)

    def media(self, index: int) -> dict[str, MediaFacts]:
        """Return what the headers of the sample's members said when they were indexed, by name."""
        shard, row = self._find(index)
        shard_index = self.index(shard)
        members = shard_index.names(row).items()
        return {name: shard_index.media(member) for name, member in members}

    def runs(self, index: int, refs: Sequence[str]) -> list[ReadRange]:
        """Plan the reads that bring these members of a sample, in the order of `refs`; names that it lacks are left out."""
        shard, row = self._find(index)
        shard_index = self.index(shard)
        numbers = shard_index.names(row)
        runs: list[ReadRange] = []
        # A member that is shown twice is read once.
        for ref in dict.fromkeys(ref for ref in refs if ref in numbers):
            span = shard_index.span(numbers[ref])
            widened = runs[-1].widened(ref, span) if runs else None
            if widened is not None:
                runs[-1] = widened
            else:
                runs.append(ReadRange(index, span.offset, span.length, ((ref, span),)))
        return runs

    def read_run(self, run: ReadRange) -> dict[str, bytes | SampleError]:
        """Read the members of a run; in the place of one that is at fault stands its error."""
        shard, row = self._find(run.index)
        file = self.shards[shard].file
        origin = f"{file}:{self.index(shard).key(row)}"
        try:
            data = memoryview(self._store.read(file, run.offset, run.length))
        except MissingBytes as error:
            return {ref: SampleError(origin, ref, str(error)) for ref, _ in run.members}

        members: dict[str, bytes | SampleError] = {}
        for ref, span in run.members:
            start = span.offset - run.offset
            member = bytes(data[start : start + span.length])
            try:
                # Read alone once more, past the cache: one bad member does not cost its neighbours.
                if zlib.crc32(member) != span.crc32:
                    member = self._read(shard, span, origin, ref, fresh=True)
                members[ref] = member
            except SampleError as error:
                members[ref] = error
        return members

    def will_read(self, index: int) -> None:
        """Announce that a sample will be read soon, so that a local disk begins now."""
        shard, row = self._find(index)
        start, end = self.index(shard).extent(row)
        self._store.will_read(self.shards[shard].file, start, end - start)

    def _find(self, index: int) -> tuple[int, int]:
        # A negative index would silently be another sample.
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        # Starts are the first sample of each shard, and the number of all.
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return shard, index - int(self._starts[shard])

    @property
    def _here(self) -> "_Opened":
        """Return what this process has open; it shares nothing with the one that it was forked from."""
        opened = self._opened
        if opened is None or opened.process != os.getpid():
            store = open_store(self.path, f"dataset {self.name}", self.config)
            opened = self._opened = _Opened(os.getpid(), store)
        return opened

    @property
    def _store(self) -> Store:
        return self._here.store

    def index(self, shard: int) -> ShardIndex:
        """Return the index of a shard, by its number in `shards`; raises UserError if it or the tar is not the right one."""
        opened = self._here
        index = opened.indices.get(shard)
        if index is None:
            # Many threads may want the same one, which is read once.
            with opened.lock_of(shard):
                index = opened.indices.get(shard) or self._open_index(self.shards[shard])
            opened.keep(shard, index)
        return index

    def _open_index(self, info: ShardInfo) -> ShardIndex:
        """Open the index of a shard; check it against dataset.json, and the shard's size and ends against the index."""
        where = shown(self.path) if self.remote else self.path
        name = f"{where}/{info.file}.qidx"
        fix = f"run python launch/data.py index {where}"
        data = self._checked_index_bytes(info, name, fix)
        try:
            index = ShardIndex(data)
        except ValueError as error:
            raise UserError(f"{name}: {error}: {fix}") from None

        samples = len(index.samples)
        if samples != info.samples or index.tar_bytes != info.bytes:
            problem = f"{samples} samples, but {MANIFEST} says {info.samples}"
            raise UserError(f"{name}: {problem}: {fix}")

        # A remote tar is not looked at here: that would cost a round trip for each shard.
        store = self._store
        if isinstance(store, LocalStore) and not self._is_indexed_tar(store, info.file, index):
            problem = "its header at byte 0, or its end, is not that of the indexed tar"
            raise UserError(f"{where}/{info.file}: {problem}: {fix}")
        return index

    @staticmethod
    def _is_indexed_tar(store: LocalStore, file: str, index: ShardIndex) -> bool:
        """Return False if the tar was replaced or its first header damaged; reads notice if it is gone or cut short."""
        try:
            return tar_edges(store.place(file), index.tar_bytes) in (index.tar_edges, b"")
        except FileNotFoundError:
            return True

    def _checked_index_bytes(self, info: ShardInfo, name: str, fix: str) -> Any:
        """Return the bytes, uint8 [n], of the index that dataset.json means."""
        file = f"{info.file}.qidx"
        data = self._index_bytes(file, f"{name} is missing or empty: {fix}")
        digest = hashlib.sha256(data.data).hexdigest()
        if digest != info.sha256 and self.remote:
            # The cache may hold the index of a dataset that was at this URL before.
            data = self._index_bytes(file, f"{name} is missing: {fix}", fresh=True)
            digest = hashlib.sha256(data.data).hexdigest()
        if digest != info.sha256:
            raise UserError(f"{name} does not match {MANIFEST}: {fix}")
        return data

    def _index_bytes(self, name: str, problem: str, fresh: bool = False) -> Any:
        store = self._store
        try:
            if isinstance(store, LocalStore):
                return np.memmap(store.place(name), np.uint8, mode="r")
            return np.frombuffer(store.whole(name, fresh), np.uint8)
        # A ValueError: an empty file cannot be mapped.
        except (FileNotFoundError, ValueError):
            raise UserError(problem) from None

    def _read(
        self, shard: int, span: ByteSpan, origin: str, what: str, fresh: bool = False
    ) -> bytes:
        """Read a member and compare its CRC-32; errors name it as `what` of the sample `origin`."""
        file = self.shards[shard].file
        try:
            data = self._store.read(file, span.offset, span.length, fresh)
        except MissingBytes as error:
            raise SampleError(origin, what, str(error)) from None

        crc32 = zlib.crc32(data)
        if crc32 == span.crc32:
            return data
        if not fresh:
            # What came through a network or out of a cache may be right the second time.
            return self._read(shard, span, origin, what, fresh=True)
        raise SampleError(origin, what, self._changed(crc32, span))

    def _changed(self, crc32: int, span: ByteSpan) -> str:
        where = shown(self.path) if self.remote else self.path
        sums = f"CRC-32 {crc32:08x}, {span.crc32:08x} was indexed"
        return f"the bytes changed since {where} was indexed ({sums})"


def _read_shards(store: Store, where: str, option: str) -> tuple[ShardInfo, ...]:
    """Read dataset.json, and check the shards of a local folder against it.

    Raises UserError where there is none or a shard differs, StoreError where a remote store does not answer.
    """
    try:
        content = store.whole(MANIFEST)
    except StoreError as error:
        if store.remote:
            raise
        raise UserError(f"{option}: {error}") from None
    except FileNotFoundError:
        # Nothing can be indexed through a URL.
        fix = "" if store.remote else f": run python launch/data.py index {where}"
        raise UserError(f"{option}: {where} has no {MANIFEST}{fix}") from None

    shards = parse_manifest(content, f"{where}/{MANIFEST}", option)
    # Those of a URL are checked when they are first read: a round trip for each would take minutes.
    if isinstance(store, LocalStore):
        _check_shards(store, option, shards)
    return shards


def _check_shards(store: LocalStore, option: str, shards: tuple[ShardInfo, ...]) -> None:
    """Compare the size of each shard of a local folder with what was indexed; raises UserError."""
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
            sizes = f"{size} bytes, {shard.bytes} were indexed"
            raise UserError(f"{option}: {path} has {sizes}: {fix}")
