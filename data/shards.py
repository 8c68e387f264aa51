"""Shards on disk: WebDataset tar files, their binary index, and random access to samples and media.

A dataset is a folder with `dataset.json`, `<name>-000000.tar` and `<name>-000000.tar.qidx`, and so on. Only the index
is read to know what is where; samples and media are read by offset and checked by CRC-32.
"""

import hashlib
import io
import json
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import numpy.typing as npt

from visionloom.data.atomic import replacing
from visionloom.data.sample import SCHEMA_VERSION, Sample, SampleError, parse_sample
from visionloom.parallel.errors import UserError

KEY: Final = re.compile(r"[A-Za-z0-9_-]{1,80}")
"""A sample's key in the tar: no dots, since WebDataset ends the key at the first one."""
INDEX_VERSION: Final = 1
MANIFEST: Final = "dataset.json"
_BLOCK: Final = 512
_MAGIC: Final = b"VLQIDX\0\0"
_LARGEST_MEMBER: Final = 2**31 - 4096
"""Bytes that one positional read of Linux returns at most."""
_OPEN_FILES: Final = 128
"""Shards kept open at once by a process: far below the usual limit of 1,024 file descriptors."""

_HEADER: Final = np.dtype(
    [("magic", "S8"), ("version", "<u4"), ("samples", "<u4"), ("members", "<u4"), ("names", "<u4"), ("tar_bytes", "<u8")]
)
_SAMPLE: Final = np.dtype(
    [
        ("json_offset", "<u8"),
        ("json_length", "<u4"),
        ("json_crc32", "<u4"),
        ("first_member", "<u4"),
        ("members", "<u4"),
        ("key_offset", "<u4"),
        ("key_length", "<u4"),
    ]
)
_MEMBER: Final = np.dtype(
    [("offset", "<u8"), ("length", "<u4"), ("crc32", "<u4"), ("name_offset", "<u4"), ("name_length", "<u4")]
)

Records = npt.NDArray[np.void]


@dataclass(frozen=True, slots=True)
class Location:
    """Where a sample lies: shard file name, row in the shard, key, and the JSON's bytes in the tar."""

    shard: str
    row: int
    key: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """What dataset.json says of one shard; `sha256` is the index file's."""

    file: str
    samples: int
    bytes: int
    sha256: str


# ---- indexing


def index_shards(folder: str | Path) -> None:
    """Index all tar files of a folder and write dataset.json: for shards made elsewhere.

    Every tar is read once from start to end. Raises UserError (one line: file, offset, what is wrong) for damaged or
    truncated tars, broken keys, samples without JSON, and missing media; SampleError for samples that break the schema.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no folder {folder}")
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise UserError(f"{folder} has no .tar files to index")
    write_manifest(folder, [index_shard(path) for path in paths])


@dataclass
class _Entry:
    """One file inside a tar."""

    name: str
    offset: int
    length: int
    crc32: int
    data: bytes
    """Kept for JSON members only."""


@dataclass
class _Group:
    """The members of one sample."""

    key: str
    document: _Entry | None = None
    members: list[_Entry] = field(default_factory=list)


def index_shard(path: Path) -> ShardInfo:
    """Read one tar from start to end, write its index beside it, and return its row of dataset.json.

    Raises UserError and SampleError as `index_shards` does.
    """
    groups = list(_groups(path))
    if not groups:
        raise UserError(f"{path} holds no samples: remove it or make it again")
    content = _index_bytes(groups, path.stat().st_size)
    with replacing(_index_path(path)) as file:
        file.write(content)
    return ShardInfo(path.name, len(groups), path.stat().st_size, hashlib.sha256(content).hexdigest())


def _index_path(tar: Path) -> Path:
    return tar.with_name(tar.name + ".qidx")


def _index_bytes(groups: list[_Group], tar_bytes: int) -> bytes:
    names, samples, members = bytearray(), list[tuple[int, ...]](), list[tuple[int, ...]]()

    def put(name: str) -> tuple[int, int]:
        names.extend(name.encode())
        return len(names) - len(name.encode()), len(name.encode())

    for group in groups:
        document = group.document
        assert document is not None
        samples.append((document.offset, document.length, document.crc32, len(members), len(group.members), *put(group.key)))
        members.extend((entry.offset, entry.length, entry.crc32, *put(entry.name)) for entry in group.members)
    header = np.array((_MAGIC, INDEX_VERSION, len(samples), len(members), len(names), tar_bytes), _HEADER)
    return header.tobytes() + np.array(samples, _SAMPLE).tobytes() + np.array(members, _MEMBER).tobytes() + bytes(names)


def _groups(path: Path) -> Iterator[_Group]:
    """The samples of a tar, each checked: one JSON, contiguous members, all refs present."""
    seen, group = set[str](), _Group("")
    for entry in _entries(path):
        key, _, name = entry.name.partition(".")
        if KEY.fullmatch(key) is None or not name:
            raise UserError(f"{path}: member {entry.name!r}: KEY.NAME expected, KEY of letters, digits, _ and - (at most 80)")
        if key != group.key:
            if key in seen:
                raise UserError(f"{path}: key {key!r} comes twice: the members of a sample must lie together")
            seen.add(key)
            yield from _complete(path, group)
            group = _Group(key)
        _add(path, group, name, entry)
    yield from _complete(path, group)


def _add(path: Path, group: _Group, name: str, entry: _Entry) -> None:
    if name in {"json", *(member.name for member in group.members)} and (name != "json" or group.document):
        raise UserError(f"{path}: member {entry.name!r} comes twice")
    if name == "json":
        group.document = entry
    else:
        entry.name = name
        group.members.append(entry)


def _complete(path: Path, group: _Group) -> Iterator[_Group]:
    if not group.key:
        return
    if group.document is None:
        raise UserError(f"{path}: sample {group.key!r} has no {group.key}.json")
    sample = parse_sample(group.document.data, origin=f"{path.name}:{group.key}")
    names = {member.name for member in group.members}
    if missing := [ref for ref in sample.refs if ref not in names]:
        raise SampleError(sample.id, "", f"media member {missing[0]!r} is missing in {path}")
    group.document.data = b""
    yield group


def _entries(path: Path) -> Iterator[_Entry]:
    """The regular files of a tar in order.

    Python's tarfile takes a damaged header for the end of the archive, and so would lose samples in silence; here
    anything but a good header or the two zero blocks of the end is an error.
    """
    size, long_name = path.stat().st_size, ""
    if not size:
        raise UserError(f"{path} is empty: remove it or make it again")
    with open(path, "rb") as file:
        while True:
            offset = file.tell()
            header = file.read(_BLOCK)
            if header == bytes(_BLOCK):
                return _check_end(path, file, offset)
            kind, name, length = _read_header(path, header, offset)
            if length > _LARGEST_MEMBER:
                raise UserError(f"{path}: member {name!r} has {length} bytes, at most {_LARGEST_MEMBER} are allowed")
            if file.tell() + length > size:
                raise UserError(f"{path}: truncated: member {name!r} at byte {offset} needs {length} bytes")
            start, data = file.tell(), file.read(length)
            file.seek(-length % _BLOCK, io.SEEK_CUR)
            if kind in b"xL":
                long_name = _long_name(kind, data) or long_name
            elif kind in b"0\0":
                name = (long_name or name).removeprefix("./")
                yield _Entry(name, start, length, zlib.crc32(data), data if name.endswith(".json") else b"")
                long_name = ""
            elif kind not in b"5g":
                raise UserError(f"{path}: member {name!r} is not a regular file (tar type {kind.decode()!r})")


def _read_header(path: Path, header: bytes, offset: int) -> tuple[bytes, str, int]:
    """Type, name and length of the member whose header this is (POSIX.1-1988 ustar; sizes also in GNU base-256)."""
    if len(header) < _BLOCK:
        raise UserError(f"{path}: truncated at byte {offset + len(header)}: the end of the archive is missing")
    stored = header[148:156].strip(b" \0")
    if not re.fullmatch(rb"[0-7]+", stored) or int(stored, 8) != sum(header) - sum(header[148:156]) + 8 * 32:
        raise UserError(f"{path}: damaged: no valid member header at byte {offset}")
    name = header[:100].rstrip(b"\0").decode(errors="replace")
    if header[257:262] == b"ustar" and header[345:500].strip(b"\0") and header[257:265] != b"ustar  \0":
        name = header[345:500].split(b"\0")[0].decode(errors="replace") + "/" + name
    if header[124] == 0x80:
        return header[156:157], name, int.from_bytes(header[125:136])
    return header[156:157], name, int(header[124:136].strip(b" \0") or b"0", 8)


def _long_name(kind: bytes, data: bytes) -> str:
    """The name in a GNU long-name member or a pax header."""
    if kind == b"L":
        return data.rstrip(b"\0").decode(errors="replace")
    match = re.search(rb"\d+ path=([^\n]*)\n", data)
    return match[1].decode(errors="replace") if match else ""


def _check_end(path: Path, file: BinaryIO, offset: int) -> None:
    rest = file.read()
    if len(rest) < _BLOCK:
        raise UserError(f"{path}: truncated at byte {offset + _BLOCK}: the end of the archive is incomplete")
    if rest.count(0) != len(rest):
        raise UserError(f"{path}: damaged: a zero block at byte {offset} with more data after it")


def write_manifest(folder: Path, shards: list[ShardInfo]) -> None:
    """Write dataset.json of a folder whose shards are indexed."""
    document = {
        "schema_version": SCHEMA_VERSION,
        "samples": sum(shard.samples for shard in shards),
        "shards": [
            {"file": shard.file, "samples": shard.samples, "bytes": shard.bytes, "sha256": shard.sha256} for shard in shards
        ],
    }
    with replacing(folder / MANIFEST) as file:
        file.write((json.dumps(document, indent=1) + "\n").encode())


# ---- reading


class _Shard:
    """The index of one shard, mapped into memory."""

    def __init__(self, tar: Path, info: ShardInfo) -> None:
        path = _index_path(tar)
        try:
            data = np.memmap(path, np.uint8, mode="r")
        except (FileNotFoundError, ValueError):
            raise UserError(f"{path} is missing or empty: run python launch/data.py index {tar.parent}") from None
        if hashlib.sha256(data.data).hexdigest() != info.sha256:
            raise UserError(f"{path} does not match {MANIFEST}: run python launch/data.py index {tar.parent}")
        header = data[: _HEADER.itemsize].view(_HEADER)[0]
        if header["magic"] != _MAGIC.rstrip(b"\0") or header["version"] != INDEX_VERSION:
            raise UserError(f"{path}: index version {INDEX_VERSION} expected: run python launch/data.py index {tar.parent}")
        if int(header["samples"]) != info.samples or int(header["tar_bytes"]) != info.bytes:
            raise UserError(f"{path}: {header['samples']} samples, but {MANIFEST} says {info.samples}: index it again")
        first = _HEADER.itemsize
        second = first + int(header["samples"]) * _SAMPLE.itemsize
        third = second + int(header["members"]) * _MEMBER.itemsize
        self.samples: Records = data[first:second].view(_SAMPLE)
        self.members: Records = data[second:third].view(_MEMBER)
        self._names = data[third:]
        self._last: tuple[int, dict[str, Any]] = -1, {}

    def name(self, offset: int, length: int) -> str:
        return self._names[offset : offset + length].tobytes().decode()

    def key(self, row: int) -> str:
        record = self.samples[row]
        return self.name(int(record["key_offset"]), int(record["key_length"]))

    def member(self, row: int, name: str) -> Any | None:
        """The record of a member, None if there is no such; a sample's names are decoded once for all its members."""
        last, records = self._last
        if last != row:
            first = int(self.samples[row]["first_member"])
            found = self.members[first : first + int(self.samples[row]["members"])]
            records = {self.name(int(record["name_offset"]), int(record["name_length"])): record for record in found}
            self._last = row, records
        return records.get(name)


class _File:
    """An open file descriptor, closed with its last reference: a reader keeps it alive while another evicts it."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class Dataset:
    """Random access to the samples of a folder of indexed shards.

    Safe in threads and after fork (positional reads, no shared file offset), and picklable (files open again on use).
    """

    def __init__(self, folder: Path, name: str, shards: tuple[ShardInfo, ...]) -> None:
        self.folder, self.name, self.shards = folder, name, shards
        self._starts = np.cumsum([0, *(shard.samples for shard in shards)], dtype=np.int64)
        self._indices: dict[int, _Shard] = {}
        self._files: dict[int, _File] = {}

    @classmethod
    def open(cls, path: str | Path, name: str, group: str = "data.datasets") -> "Dataset":
        """Open the dataset in folder `path`; errors name the option `group`.`name`.path.

        Raises UserError if the folder, dataset.json or a shard is missing, a shard's size differs from what was
        indexed, or there are no samples.
        """
        folder, option = Path(path), f"{group}.{name}.path"
        if not folder.is_dir():
            raise UserError(f"{option}: no folder {folder}")
        shards = _read_manifest(folder, option)
        for shard in shards:
            _check_shard(folder, option, shard)
        return cls(folder, name, shards)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_indices": {}, "_files": {}}

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the shards' names, sizes and indices, which hold the CRC-32 of every member."""
        rows = [[shard.file, shard.samples, shard.bytes, shard.sha256] for shard in self.shards]
        return hashlib.sha256(json.dumps([SCHEMA_VERSION, rows]).encode()).hexdigest()

    @property
    def keys(self) -> list[str]:
        """The samples' keys in order (reads every index)."""
        return [self._index(number).key(row) for number, shard in enumerate(self.shards) for row in range(shard.samples)]

    def location(self, index: int) -> Location:
        """Where sample `index` lies."""
        shard, row = self._find(index)
        record = self._index(shard).samples[row]
        key = self._index(shard).key(row)
        return Location(self.shards[shard].file, row, key, int(record["json_offset"]), int(record["json_length"]))

    def sample(self, index: int) -> Sample:
        """Read and check sample `index`; raises SampleError if its bytes changed or break the schema."""
        shard, row = self._find(index)
        record = self._index(shard).samples[row]
        origin = f"{self.shards[shard].file}:{self._index(shard).key(row)}"
        span = (int(record["json_offset"]), int(record["json_length"]), int(record["json_crc32"]))
        return parse_sample(self._read(shard, span, origin, "json"), origin=origin)

    def member(self, index: int, ref: str) -> bytes:
        """The bytes of media member `ref` of sample `index`; raises SampleError if missing or changed."""
        shard, row = self._find(index)
        origin = f"{self.shards[shard].file}:{self._index(shard).key(row)}"
        record = self._index(shard).member(row, ref)
        if record is None:
            raise SampleError(origin, ref, "no such media member")
        span = (int(record["offset"]), int(record["length"]), int(record["crc32"]))
        return self._read(shard, span, origin, ref)

    def _find(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return shard, index - int(self._starts[shard])

    def _index(self, shard: int) -> _Shard:
        if shard not in self._indices:
            info = self.shards[shard]
            self._indices[shard] = _Shard(self.folder / info.file, info)
        return self._indices[shard]

    def _file(self, shard: int) -> _File:
        file = self._files.get(shard)
        if file is None:
            file = self._files[shard] = _File(self.folder / self.shards[shard].file)
            for oldest in list(self._files)[:-_OPEN_FILES]:
                self._files.pop(oldest, None)
        return file

    def _read(self, shard: int, span: tuple[int, int, int], origin: str, what: str) -> bytes:
        offset, length, crc32 = span
        file = self._file(shard)
        data = os.pread(file.descriptor, length, offset)
        if len(data) != length or zlib.crc32(data) != crc32:
            raise SampleError(origin, what, f"the bytes changed since {self.folder} was indexed (CRC-32 differs)")
        return data


def _read_manifest(folder: Path, option: str) -> tuple[ShardInfo, ...]:
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"{option}: {folder} has no {MANIFEST}: run python launch/data.py index {folder}")
    try:
        document = json.loads(path.read_bytes())
        version = document["schema_version"]
        shards = tuple(ShardInfo(s["file"], int(s["samples"]), int(s["bytes"]), s["sha256"]) for s in document["shards"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{option}: {path} is damaged: run python launch/data.py index {folder}") from None
    if version != SCHEMA_VERSION:
        raise UserError(f"{option}: {path} has schema version {version!r}, this program reads {SCHEMA_VERSION}")
    if not sum(shard.samples for shard in shards):
        raise UserError(f"{option}: {folder} holds no samples")
    return shards


def _check_shard(folder: Path, option: str, shard: ShardInfo) -> None:
    path = folder / shard.file
    if Path(shard.file).name != shard.file:
        raise UserError(f"{option}: {folder / MANIFEST} names a shard outside its folder: {shard.file!r}")
    if not path.is_file():
        raise UserError(f"{option}: shard {path} is missing")
    if path.stat().st_size != shard.bytes:
        raise UserError(
            f"{option}: {path} has {path.stat().st_size} bytes, {shard.bytes} were indexed: "
            f"restore it or run python launch/data.py index {folder}"
        )
