"""The index of a shard: where every sample and member lies, its CRC-32, and what its header says. Made in one pass.

`<shard>.tar.qidx` holds, in this order: a header; a record for each sample, each member, and each member's media facts; all
names; and the shard's statistics as JSON. Integers are little-endian. It is written beside its tar, complete or not at all.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from visionloom.common.atomic import replacing
from visionloom.common.errors import UserError
from visionloom.common.places import PlaceError, read_located
from visionloom.data.shards.manifest import ShardInfo, Statistics, parse_statistics
from visionloom.data.shards.media_header import KINDS, MediaFacts, kind_of, probe
from visionloom.data.shards.sample import Image, Sample, SampleError, Video
from visionloom.data.shards.sample_json import parse_sample, to_json
from visionloom.data.shards.tar import BLOCK, Entry, Fault, FaultHandler, entries, refuse

KEY: Final = re.compile(r"[A-Za-z0-9_-]{1,80}")
"""A sample's key in the tar: no dots, since WebDataset ends the key at the first one."""
INDEX_VERSION: Final = 2
LARGEST_INDEX: Final = 1 << 32
"""Bytes of an index file."""
_MAGIC: Final = b"VLQIDX\0\0"
_SURROGATE: Final = re.compile(rb"\\u[dD][89a-fA-F]")

_HEADER: Final = np.dtype(
    [
        ("magic", "S8"),
        ("version", "<u4"),
        ("samples", "<u4"),
        ("members", "<u4"),
        ("names", "<u4"),
        ("statistics", "<u4"),
        ("tar_bytes", "<u8"),
        ("tar_edges", "V32"),
    ]
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
    [
        ("offset", "<u8"),
        ("length", "<u4"),
        ("crc32", "<u4"),
        ("name_offset", "<u4"),
        ("name_length", "<u4"),
    ]
)
_FACTS: Final = np.dtype(
    [
        ("kind", "<u4"),
        ("width", "<u4"),
        ("height", "<u4"),
        ("frames", "<u4"),
        ("fps", "<f8"),
        ("duration", "<f8"),
    ]
)

Records = npt.NDArray[np.void]


@dataclass(frozen=True, slots=True)
class ByteSpan:
    """Bytes of a shard, and the CRC-32 that they had when they were indexed."""

    offset: int
    length: int
    crc32: int


@dataclass
class _Group:
    """The members of one sample while a tar is read."""

    key: str
    offset: int = 0
    document: Entry | None = None
    members: dict[str, tuple[Entry, MediaFacts]] = field(default_factory=dict)
    sample: Sample | None = None
    problem: str = ""


def index_path(tar: Path) -> Path:
    """The index file of a shard."""
    return tar.with_name(tar.name + ".qidx")


def index_shard(path: Path, skip_bad: bool = False) -> ShardInfo:
    """Read one tar from start to end, write its index beside it, and return its row of dataset.json.

    Raises UserError (one line: file, byte offset, what is wrong) for damaged or truncated tars, broken names, samples
    without JSON, that break the schema or lack a member. With `skip_bad` such samples are left out of the index instead
    and listed in the row; it is an error still if no sample remains.
    """
    faults: list[Fault] = []
    groups = list(_groups(path, faults.append if skip_bad else refuse))
    if not groups:
        raise NoSamples(f"{path} holds no samples: remove it or make it again", faults)
    statistics = Statistics.of(group.sample for group in groups)
    statistics.suspect_media = sum(_suspects(group) for group in groups)
    statistics.left_out = [(fault.offset, fault.key, fault.error) for fault in faults]
    content = _index_bytes(groups, statistics, path)
    with replacing(index_path(path)) as file:
        file.write(content)
    return _info(path, content)


class NoSamples(UserError):
    """No sample of a shard can be used; `faults` says why."""

    def __init__(self, message: str, faults: list[Fault]) -> None:
        super().__init__(message)
        self.faults = faults

    def __reduce__(self) -> tuple[type["NoSamples"], tuple[str, list[Fault]]]:
        return NoSamples, (str(self), self.faults)


def known_shard(path: Path) -> ShardInfo | None:
    """The row of a shard that is indexed already: the tar has the size and ends of then, and is not newer than its index."""
    index = index_path(path)
    try:
        if index.stat().st_mtime_ns < path.stat().st_mtime_ns:
            return None
        content = read_located(index.parent, index.name, LARGEST_INDEX)
    except (FileNotFoundError, PlaceError):
        return None
    header = np.frombuffer(content[: _HEADER.itemsize].ljust(_HEADER.itemsize, b"\0"), _HEADER)[0]
    if (
        header["magic"] != _MAGIC.rstrip(b"\0")
        or header["version"] != INDEX_VERSION
        or len(content) != _size(header)
    ):
        return None
    if header["tar_edges"].tobytes() != tar_edges(path, int(header["tar_bytes"])):
        return None
    try:
        return _info(path, content)
    except ValueError:  # what it says cannot be true: it is made anew
        return None


def tar_edges(path: Path, size: int) -> bytes:
    """SHA-256 of the first header and the last block of a tar of `size` bytes; empty if it has another size."""
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size != size:
            return b""
        start = file.read(BLOCK)
        file.seek(max(0, size - BLOCK))
        return hashlib.sha256(start + file.read(BLOCK)).digest()


def _info(path: Path, content: bytes) -> ShardInfo:
    index = ShardIndex(np.frombuffer(content, np.uint8))
    digest = hashlib.sha256(content).hexdigest()
    return ShardInfo(
        path.name, len(index.samples), index.tar_bytes, digest, index.content, index.statistics
    )


def _size(header: Any) -> int:
    rows = int(header["samples"]) * _SAMPLE.itemsize + int(header["members"]) * (
        _MEMBER.itemsize + _FACTS.itemsize
    )
    return _HEADER.itemsize + rows + int(header["names"]) + int(header["statistics"])


def _index_bytes(groups: list[_Group], statistics: Statistics, path: Path) -> bytes:
    names, samples, members, facts = bytearray(), list[Any](), list[Any](), list[Any]()

    def put(name: str) -> tuple[int, int]:
        names.extend(name.encode())
        return len(names) - len(name.encode()), len(name.encode())

    for group in groups:
        document = group.document
        assert document is not None
        samples.append(
            (
                document.offset,
                document.length,
                document.crc32,
                len(members),
                len(group.members),
                *put(group.key),
            )
        )
        for name, (entry, found) in group.members.items():
            members.append((entry.offset, entry.length, entry.crc32, *put(name)))
            facts.append(
                (
                    KINDS.index(found.kind),
                    found.width,
                    found.height,
                    found.frames,
                    found.fps,
                    found.duration,
                )
            )
    tail = json.dumps(dataclasses.asdict(statistics), ensure_ascii=False).encode()
    size = path.stat().st_size
    counts = (len(samples), len(members), len(names), len(tail))
    header = np.array((_MAGIC, INDEX_VERSION, *counts, size, tar_edges(path, size)), _HEADER)
    rows = [np.array(samples, _SAMPLE), np.array(members, _MEMBER), np.array(facts, _FACTS)]
    return b"".join([header.tobytes(), *(table.tobytes() for table in rows), bytes(names), tail])


# ---- from a tar to groups


def _groups(path: Path, report: FaultHandler) -> Iterator[_Group]:
    """The samples of a tar, each checked: one JSON, contiguous members, all refs present."""
    seen, group = set[str](), _Group("")
    for entry in entries(path, report):
        key, _, name = entry.name.partition(".")
        if problem := _name_problem(entry.name, key, name):
            report(Fault(str(path), entry.offset, entry.name, problem))
            continue
        if key != group.key:
            yield from _complete(path, group, report)
            group = _Group(key, entry.offset)
            if key in seen:
                group.problem = (
                    f"key {key!r} comes twice: the members of a sample must lie together"
                )
            seen.add(key)
        _add(group, name, entry)
    yield from _complete(path, group, report)


def _name_problem(whole: str, key: str, name: str) -> str:
    if whole.startswith("/"):
        return f"member {whole!r} has an absolute path"
    if ".." in whole.split("/"):
        return f"member {whole!r} leads out of its folder"
    if (
        KEY.fullmatch(key) is None
        or not name
        or not name.isprintable()
        or set(name) & set("/\\\ufffd")
    ):
        return f"member {whole!r}: KEY.NAME expected, KEY of letters, digits, _ and - (at most 80), NAME without folders"
    return ""


def _add(group: _Group, name: str, entry: Entry) -> None:
    if (name == "json" and group.document) or name in group.members:
        group.problem = group.problem or f"member {entry.name!r} comes twice"
    elif name == "json":
        group.document, group.offset = entry, entry.offset
    else:
        group.members[name] = dataclasses.replace(entry, data=b""), _facts(name, entry.data)


def _facts(name: str, data: bytes) -> MediaFacts:
    """Header facts, without numbers if the header cannot be read: it is a suspect then, and the training run's to judge."""
    try:
        return probe(name, data)
    except ValueError:
        return MediaFacts(kind_of(name))


def _complete(path: Path, group: _Group, report: FaultHandler) -> Iterator[_Group]:
    if not group.key:
        return
    if problem := group.problem or _parse(path, group):
        report(Fault(str(path), group.offset, group.key, problem))
        return
    yield group


def _parse(path: Path, group: _Group) -> str:
    """Read the sample of a group; returns what is wrong with it."""
    if group.document is None:
        return f"sample {group.key!r} has no {group.key}.json"
    try:
        group.sample = parse_sample(group.document.data, origin=f"{path.name}:{group.key}")
        if _SURROGATE.search(group.document.data):
            to_json(group.sample).encode()
    except SampleError as error:
        return str(error)
    except UnicodeEncodeError:
        return f"sample {group.key}: its text is no valid Unicode: half of a surrogate pair"
    group.document = dataclasses.replace(group.document, data=b"")
    missing = [ref for ref in group.sample.refs if ref not in group.members]
    return f"sample {group.sample.id}: media member {missing[0]!r} is missing" if missing else ""


def _suspects(group: _Group) -> int:
    assert group.sample is not None
    declared = dict(declared_media(group.sample))
    return sum(bool(difference(declared[ref], group.members[ref][1])) for ref in declared)


def declared_media(sample: Sample) -> Iterator[tuple[str, MediaFacts]]:
    """What a sample says of each of its media members."""
    for element in sample.elements:
        if isinstance(element, Image):
            yield element.ref, MediaFacts("image", element.width, element.height, 1)
        elif isinstance(element, Video) and element.ref is not None:
            numbers = (
                element.width,
                element.height,
                element.file_frames,
                element.fps,
                element.duration,
            )
            yield element.ref, MediaFacts("video", *numbers)
        elif isinstance(element, Video):
            yield from (
                (ref, MediaFacts("image", element.width, element.height, 1))
                for ref in element.frames
            )


def difference(declared: MediaFacts, found: MediaFacts) -> str:
    """How a member's header differs from what its sample says, as a sentence; empty if it agrees.

    A video whose header was not read (no PyAV) agrees with anything. Frame rate and duration agree to 1 %: containers
    and converters round them differently.
    """
    if found.kind == "video" and not found.width and declared.kind == "video":
        return ""
    if not found.width:
        return "its header cannot be read"
    if (found.width, found.height) != (declared.width, declared.height):
        return f"{found.width}x{found.height} pixels, the sample says {declared.width}x{declared.height}"
    if declared.kind == "video" and found.frames != declared.frames:
        return f"{found.frames} frames, the sample says {declared.frames}"
    for name in ("fps", "duration"):
        one, other = getattr(found, name), getattr(declared, name)
        if declared.kind == "video" and one and abs(one - other) > 0.01 * max(one, other):
            return f"{name} {one:g}, the sample says {other:g}"
    return ""


# ---- reading


class ShardIndex:
    """The index of one shard over its bytes, uint8 [n], usually mapped into memory. Raises ValueError if they are none."""

    def __init__(self, data: npt.NDArray[np.uint8]) -> None:
        data = np.asarray(data)  # a memmap's own indexing would cost a sample 15 microseconds
        if len(data) < _HEADER.itemsize:
            raise ValueError("too short")
        header = data[: _HEADER.itemsize].view(_HEADER)[0]
        if header["magic"] != _MAGIC.rstrip(b"\0") or header["version"] != INDEX_VERSION:
            raise ValueError(f"index version {INDEX_VERSION} expected")
        if len(data) != _size(header):
            raise ValueError(f"{_size(header)} bytes expected, {len(data)} found")
        rows = (header["samples"], header["members"], header["members"])
        sizes = [
            int(count) * table.itemsize
            for count, table in zip(rows, (_SAMPLE, _MEMBER, _FACTS), strict=True)
        ]
        ends = np.cumsum([_HEADER.itemsize, *sizes, int(header["names"])]).tolist()
        self.samples: Records = data[ends[0] : ends[1]].view(_SAMPLE)
        self.members: Records = data[ends[1] : ends[2]].view(_MEMBER)
        self.facts: Records = data[ends[2] : ends[3]].view(_FACTS)
        self._names, self._tail, self._data, self._located = (
            data[ends[3] : ends[4]],
            data[ends[4] :],
            data,
            ends,
        )
        self.bytes, self.tar_bytes, self.tar_edges = (
            len(data),
            int(header["tar_bytes"]),
            header["tar_edges"].tobytes(),
        )
        self._last: tuple[int, dict[str, int]] = -1, {}
        self._check()

    def _check(self) -> None:
        """Raise ValueError if a row leads out of the tar, the members or the names: who made the index is not known."""
        first, count = (
            self.samples[name].astype(np.uint64) for name in ("first_member", "members")
        )
        ends = [
            (self.samples[name], self.samples[length])
            for name, length in (("key_offset", "key_length"),)
        ]
        ends += [(self.members["name_offset"], self.members["name_length"])]
        bytes_of = [
            (self.samples["json_offset"], self.samples["json_length"]),
            (self.members["offset"], self.members["length"]),
        ]
        for spans, most in (
            (ends, len(self._names)),
            (bytes_of, self.tar_bytes),
            ([(first, count)], len(self.members)),
        ):
            for start, length in spans:  # compared without sums, which may overflow
                if np.any(start.astype(np.uint64) > most) or np.any(
                    length > most - np.minimum(start.astype(np.uint64), most)
                ):
                    raise ValueError("a row leads out of what is there")
        numbers = np.concatenate([self.facts["fps"], self.facts["duration"]])
        if np.any(self.facts["kind"] >= len(KINDS)) or not np.all(
            np.isfinite(numbers) & (numbers >= 0)
        ):
            raise ValueError("a row's facts are none")

    @property
    def statistics(self) -> Statistics:
        """Counts over the shard's samples; raises JsonError if they are none."""
        return parse_statistics(self._tail.tobytes(), "statistics of the index")

    @property
    def content(self) -> str:
        """SHA-256 over places, CRC-32s and names: the same with or without PyAV, unlike the file's own."""
        start, members_end, names, end = (self._located[place] for place in (0, 2, 3, 4))
        return hashlib.sha256(
            self._data[start:members_end].tobytes() + self._data[names:end].tobytes()
        ).hexdigest()

    def key(self, row: int) -> str:
        """Key of the row-th sample."""
        record = self.samples[row]
        return self._name(int(record["key_offset"]), int(record["key_length"]))

    def document(self, row: int) -> ByteSpan:
        """Where the JSON of the row-th sample lies."""
        record = self.samples[row]
        return ByteSpan(
            int(record["json_offset"]), int(record["json_length"]), int(record["json_crc32"])
        )

    def extent(self, row: int) -> tuple[int, int]:
        """First byte of the row-th sample's JSON and members, and the first behind the last of them."""
        start, length, _, first, count, _, _ = self.samples[row].item()
        if not count:
            return start, start + length
        last = self.members[first + count - 1].item()
        return min(start, int(self.members["offset"][first])), max(
            start + length, last[0] + last[1]
        )

    @property
    def ends(self) -> npt.NDArray[np.int64]:
        """int64 [samples]: the first byte behind each sample's JSON and members."""
        ends = (self.samples["json_offset"] + self.samples["json_length"]).astype(np.int64)
        last = self.samples["first_member"].astype(np.int64) + self.samples["members"] - 1
        some = self.samples["members"] > 0
        found = self.members[last[some]]
        ends[some] = np.maximum(ends[some], found["offset"] + found["length"])
        return ends

    def names(self, row: int) -> dict[str, int]:
        """Members of the row-th sample by name: their numbers in `members` and `facts`. Decoded once for neighbouring calls."""
        last, numbers = self._last
        if last != row:
            first = int(self.samples[row]["first_member"])
            places = range(first, first + int(self.samples[row]["members"]))
            found = self.members[places.start : places.stop]
            spans = zip(
                found["name_offset"].tolist(), found["name_length"].tolist(), places, strict=True
            )
            numbers = {self._name(offset, length): number for offset, length, number in spans}
            self._last = row, numbers
        return numbers

    def span(self, member: int) -> ByteSpan:
        """Where a member's bytes lie."""
        offset, length, crc32, _, _ = self.members[member].tolist()
        return ByteSpan(offset, length, crc32)

    def media(self, member: int) -> MediaFacts:
        """What a member's header said when it was indexed."""
        kind, *numbers = self.facts[member].tolist()
        return MediaFacts(KINDS[kind], *numbers)

    def _name(self, offset: int, length: int) -> str:
        return self._names[offset : offset + length].tobytes().decode(errors="replace")
