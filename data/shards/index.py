"""Indexing a shard in one pass: the place of every sample and member, its CRC-32, and what its header says.

The index is written next to its tar, complete or not at all.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

from visionloom.common.atomic import replacing
from visionloom.common.errors import UserError
from visionloom.common.places import PlaceError, read_located
from visionloom.data.shards.manifest import ShardInfo, Statistics
from visionloom.data.shards.media_header import KINDS, MediaFacts, kind_of, probe
from visionloom.data.shards.sample import Image, Sample, SampleError, Video
from visionloom.data.shards.sample_json import parse_sample, to_json
from visionloom.data.shards.shard_index import (
    FACTS_ROW,
    HEADER,
    INDEX_VERSION,
    MAGIC,
    MEMBER_ROW,
    SAMPLE_ROW,
    ShardIndex,
    index_size,
    is_current,
)
from visionloom.data.shards.tar import BLOCK, Entry, Fault, FaultHandler, entries, refuse

KEY: Final = re.compile(r"[A-Za-z0-9_-]{1,80}")
"""A sample's key in the tar: no dots, since WebDataset ends the key at the first one."""
LARGEST_INDEX: Final = 1 << 32
"""Bytes of an index file."""
_SCATTERED: Final = "key {!r} comes twice: the members of a sample must lie together"
_SURROGATE: Final = re.compile(rb"\\u[dD][89a-fA-F]")


@dataclass
class _Group:
    """The members of one sample while a tar is read."""

    key: str
    offset: int = 0
    document: Entry | None = None
    members: dict[str, tuple[Entry, MediaFacts]] = field(default_factory=dict)
    sample: Sample | None = None
    problem: str = ""

    @classmethod
    def begin(cls, key: str, offset: int, seen: set[str]) -> "_Group":
        """Begin the group of a key, which is at fault if the tar had one of this key before."""
        problem = _SCATTERED.format(key) if key in seen else ""
        seen.add(key)
        return cls(key, offset, problem=problem)

    def suspects(self) -> int:
        """Count the members whose headers differ from what the sample says."""
        assert self.sample is not None
        # By name: a member that is shown twice counts once.
        declared = dict(declared_media(self.sample))
        count = 0
        for ref, facts in declared.items():
            _, header = self.members[ref]
            count += bool(difference(facts, header))
        return count

    def missing(self) -> str:
        """Return, as a sentence, the first media member that the sample lacks; empty if all are there."""
        assert self.sample is not None
        for ref in self.sample.refs:
            if ref not in self.members:
                return f"sample {self.sample.id}: media member {ref!r} is missing"
        return ""


def index_path(tar: Path) -> Path:
    """Return the path of a shard's index."""
    return tar.with_name(tar.name + ".qidx")


def index_shard(path: Path, skip_bad: bool = False) -> ShardInfo:
    """Read one tar from start to end, write its index next to it, and return its row of dataset.json.

    Raises UserError (one line: file, byte offset, what is wrong) for damaged or truncated tars, broken names, samples
    without JSON, that break the schema or lack a member. With `skip_bad` such samples are left out of the index instead
    and listed in the row; it is an error still if no sample remains.
    """
    faults: list[Fault] = []
    groups = list(_groups(path, faults.append if skip_bad else refuse))
    if not groups:
        raise NoSamples(f"{path} holds no samples: remove it or make it again", faults)

    statistics = Statistics.of(group.sample for group in groups)
    statistics.suspect_media = sum(group.suspects() for group in groups)
    statistics.left_out = [(fault.offset, fault.key, fault.error) for fault in faults]
    content = _index_bytes(groups, statistics, path)
    # Last: an index that is there is complete.
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
    """Return the row of an indexed shard whose size, first header and last block are unchanged; None for any other.

    A tar that is newer than its index is indexed anew.
    """
    index = index_path(path)
    try:
        # Equal times count as known: copies keep or round them.
        if index.stat().st_mtime_ns < path.stat().st_mtime_ns:
            return None
        content = read_located(index.parent, index.name, LARGEST_INDEX)
    except (FileNotFoundError, PlaceError):
        return None

    start = content[: HEADER.itemsize].ljust(HEADER.itemsize, b"\0")
    header = np.frombuffer(start, HEADER)[0]
    if (
        not is_current(header)
        or len(content) != index_size(header)
        or header["tar_edges"].tobytes() != tar_edges(path, int(header["tar_bytes"]))
    ):
        return None
    try:
        return _info(path, content)
    except ValueError:
        # Its contents cannot be true.
        return None


def tar_edges(path: Path, size: int) -> bytes:
    """Return the SHA-256 of the first header and the last block of a tar of `size` bytes; empty if it has another size."""
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size != size:
            return b""
        start = file.read(BLOCK)
        # The two ends change with any rewriting, and cost two reads of 512 bytes.
        file.seek(max(0, size - BLOCK))
        return hashlib.sha256(start + file.read(BLOCK)).digest()


def _info(path: Path, content: bytes) -> ShardInfo:
    index = ShardIndex(np.frombuffer(content, np.uint8))
    digest = hashlib.sha256(content).hexdigest()
    return ShardInfo(
        path.name, len(index.samples), index.tar_bytes, digest, index.content, index.statistics
    )


def _index_bytes(groups: list[_Group], statistics: Statistics, path: Path) -> bytes:
    """Return the whole index of a tar in the layout of shard_index.py."""
    tables = _Tables()
    for group in groups:
        tables.add(group)
    names = bytes(tables.names)
    # As JSON: a new count does not change the layout.
    tail = json.dumps(dataclasses.asdict(statistics), ensure_ascii=False).encode()

    size = path.stat().st_size
    counts = (len(tables.samples), len(tables.members), len(names), len(tail))
    header = np.array((MAGIC, INDEX_VERSION, *counts, size, tar_edges(path, size)), HEADER)
    samples = np.array(tables.samples, SAMPLE_ROW)
    members = np.array(tables.members, MEMBER_ROW)
    facts = np.array(tables.facts, FACTS_ROW)
    arrays = [header, samples, members, facts]
    return b"".join([*(array.tobytes() for array in arrays), names, tail])


class _Tables:
    """The rows of an index, in the order of their columns, and the names that they point to."""

    def __init__(self) -> None:
        self.samples: list[tuple[int, ...]] = []
        self.members: list[tuple[int, ...]] = []
        self.facts: list[tuple[float, ...]] = []
        self.names = bytearray()

    def add(self, group: _Group) -> None:
        """Add a sample with its members."""
        document = group.document
        assert document is not None
        first, count = len(self.members), len(group.members)
        key = self._put(group.key)
        span = (document.offset, document.length, document.crc32)
        self.samples.append((*span, first, count, *key))
        self._add_members(group)

    def _add_members(self, group: _Group) -> None:
        for name, (entry, media) in group.members.items():
            place = self._put(name)
            self.members.append((entry.offset, entry.length, entry.crc32, *place))
            picture = (media.width, media.height, media.frames)
            self.facts.append((KINDS.index(media.kind), *picture, media.fps, media.duration))

    def _put(self, name: str) -> tuple[int, int]:
        """Append a name; return its offset and length in bytes."""
        content = name.encode()
        self.names.extend(content)
        return len(self.names) - len(content), len(content)


# ---- from a tar to groups


def _groups(path: Path, report: FaultHandler) -> Iterator[_Group]:
    """Yield the samples of a tar, each checked: one JSON, contiguous members, all refs present."""
    seen, group = set[str](), _Group("")
    for entry in entries(path, report):
        # The key ends at the first dot, as in WebDataset.
        key, _, name = entry.name.partition(".")
        problem = _name_problem(entry.name, key, name)
        if problem:
            report(Fault(str(path), entry.offset, entry.name, problem))
            continue

        if key != group.key:
            yield from _complete(path, group, report)
            group = _Group.begin(key, entry.offset, seen)
        _add(group, name, entry)
    yield from _complete(path, group, report)


def _name_problem(whole: str, key: str, name: str) -> str:
    """Return the fault of a member's name, as a sentence; empty if it has none."""
    if whole.startswith("/"):
        return f"member {whole!r} has an absolute path"
    if ".." in whole.split("/"):
        return f"member {whole!r} leads out of its folder"
    if KEY.fullmatch(key) is None or not _is_plain(name):
        return f"member {whole!r}: KEY.NAME expected, KEY of letters, digits, _ and - (at most 80), NAME without folders"
    return ""


def _is_plain(name: str) -> bool:
    """Return whether a name is printable and has no folder; U+FFFD stands for bytes that were no UTF-8."""
    return bool(name) and name.isprintable() and not set(name) & set("/\\\ufffd")


def _add(group: _Group, name: str, entry: Entry) -> None:
    """Add a member to its group; media are kept without their bytes, once their header is read."""
    if (name == "json" and group.document) or name in group.members:
        group.problem = group.problem or f"member {entry.name!r} comes twice"
    elif name == "json":
        group.document, group.offset = entry, entry.offset
    else:
        facts = _facts(name, entry.data)
        group.members[name] = dataclasses.replace(entry, data=b""), facts


def _facts(name: str, data: bytes) -> MediaFacts:
    """Return the facts of a header; one that cannot be read has no numbers and counts as suspect: a training run judges it."""
    try:
        return probe(name, data)
    # A strange picture is no reason to lose a sample.
    except ValueError:
        return MediaFacts(kind_of(name))


def _complete(path: Path, group: _Group, report: FaultHandler) -> Iterator[_Group]:
    """Yield the group of a finished sample, or report what is wrong with it."""
    # The first group of a tar is empty.
    if not group.key:
        return
    problem = group.problem or _parse(path, group)
    if problem:
        report(Fault(str(path), group.offset, group.key, problem))
    else:
        yield group


def _parse(path: Path, group: _Group) -> str:
    """Read the sample of a group; return its fault as a sentence, or an empty text."""
    if group.document is None:
        return f"sample {group.key!r} has no {group.key}.json"
    content = group.document.data
    try:
        group.sample = parse_sample(content, origin=f"{path.name}:{group.key}")
        # JSON can hold half a surrogate pair, which no UTF-8 text can.
        if _SURROGATE.search(content):
            to_json(group.sample).encode()
    except SampleError as error:
        return str(error)
    except UnicodeEncodeError:
        return f"sample {group.key}: its text is no valid Unicode: half of a surrogate pair"

    # The bytes are not needed again; a shard may hold gigabytes of them.
    group.document = dataclasses.replace(group.document, data=b"")
    return group.missing()


def declared_media(sample: Sample) -> Iterator[tuple[str, MediaFacts]]:
    """Yield what a sample says of each of its media members, with the member's name."""
    for element in sample.elements:
        if not isinstance(element, Image | Video):
            continue
        size = (element.width, element.height)
        if isinstance(element, Image):
            yield element.ref, MediaFacts("image", *size, 1)
        elif element.ref is not None:
            frames, fps = element.file_frames, element.fps
            yield element.ref, MediaFacts("video", *size, frames, fps, element.duration)
        else:
            for ref in element.frames:
                yield ref, MediaFacts("image", *size, 1)


def difference(declared: MediaFacts, header: MediaFacts) -> str:
    """Return, as a sentence, how a member's header differs from what its sample says; empty if it agrees.

    A video whose header was not read (no PyAV) agrees with anything. Frame rate and duration agree to 1 %: containers
    and converters round them differently.
    """
    is_video = declared.kind == "video"
    if not header.width:
        unread = header.kind == "video" and is_video
        return "" if unread else "its header cannot be read"
    if (header.width, header.height) != (declared.width, declared.height):
        size = f"{header.width}x{header.height} pixels"
        return f"{size}, the sample says {declared.width}x{declared.height}"
    if not is_video:
        return ""

    if header.frames != declared.frames:
        return f"{header.frames} frames, the sample says {declared.frames}"
    for name in ("fps", "duration"):
        one, other = getattr(header, name), getattr(declared, name)
        # 0 is a number that the header does not have.
        if one and abs(one - other) > 0.01 * max(one, other):
            return f"{name} {one:g}, the sample says {other:g}"
    return ""
