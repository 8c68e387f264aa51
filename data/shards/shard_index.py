"""The index file of a shard: its layout, and reading it.

`<shard>.tar.qidx` holds, in this order: a header; a record for each sample, each member, and each member's media facts; all
names; and the shard's statistics as JSON. Integers are little-endian.
"""

import hashlib
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from visionloom.data.shards.manifest import Statistics, parse_statistics
from visionloom.data.shards.media_header import KINDS, MediaFacts

INDEX_VERSION: Final = 2
MAGIC: Final = b"VLQIDX\0\0"

HEADER: Final = np.dtype(
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
SAMPLE_ROW: Final = np.dtype(
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
MEMBER_ROW: Final = np.dtype(
    [
        ("offset", "<u8"),
        ("length", "<u4"),
        ("crc32", "<u4"),
        ("name_offset", "<u4"),
        ("name_length", "<u4"),
    ]
)
FACTS_ROW: Final = np.dtype(
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


def is_current(header: Any) -> bool:
    """Return whether a header is one of this version; numpy drops the zeros at the end of bytes."""
    is_index = header["magic"] == MAGIC.rstrip(b"\0")
    return bool(is_index and header["version"] == INDEX_VERSION)


def index_size(header: Any) -> int:
    """Return the bytes that an index with this header must have."""
    samples = int(header["samples"]) * SAMPLE_ROW.itemsize
    members = int(header["members"]) * (MEMBER_ROW.itemsize + FACTS_ROW.itemsize)
    tail = int(header["names"]) + int(header["statistics"])
    return HEADER.itemsize + samples + members + tail


class ShardIndex:
    """The index of one shard over its bytes, uint8 [n], usually mapped into memory. Raises ValueError if they are none."""

    def __init__(self, data: npt.NDArray[np.uint8]) -> None:
        # A memmap's own indexing would cost a sample 15 microseconds.
        data = np.asarray(data)
        if len(data) < HEADER.itemsize:
            raise ValueError("too short")
        header = data[: HEADER.itemsize].view(HEADER)[0]
        if not is_current(header):
            raise ValueError(f"index version {INDEX_VERSION} expected")
        if len(data) != index_size(header):
            raise ValueError(f"{index_size(header)} bytes expected, {len(data)} found")

        samples, members = int(header["samples"]), int(header["members"])
        self._samples_end = HEADER.itemsize + samples * SAMPLE_ROW.itemsize
        self._members_end = self._samples_end + members * MEMBER_ROW.itemsize
        self._facts_end = self._members_end + members * FACTS_ROW.itemsize
        self._names_end = self._facts_end + int(header["names"])

        self.samples: Records = data[HEADER.itemsize : self._samples_end].view(SAMPLE_ROW)
        self.members: Records = data[self._samples_end : self._members_end].view(MEMBER_ROW)
        self.facts: Records = data[self._members_end : self._facts_end].view(FACTS_ROW)
        self._names = data[self._facts_end : self._names_end]
        self._data = data
        self.bytes = len(data)
        self.tar_bytes = int(header["tar_bytes"])
        self.tar_edges: bytes = header["tar_edges"].tobytes()
        self._last: tuple[int, dict[str, int]] = -1, {}
        self._check()

    def _check(self) -> None:
        """Raise ValueError if a row leads out of the tar, the members or the names: anybody may have made the index."""
        names, members = len(self._names), len(self.members)
        _check_spans(self.samples, "key_offset", "key_length", names)
        _check_spans(self.members, "name_offset", "name_length", names)
        _check_spans(self.samples, "json_offset", "json_length", self.tar_bytes)
        _check_spans(self.members, "offset", "length", self.tar_bytes)
        _check_spans(self.samples, "first_member", "members", members)

        self._check_facts()

    def _check_facts(self) -> None:
        """Raise ValueError for a kind or a number that no header has."""
        numbers = np.concatenate([self.facts["fps"], self.facts["duration"]])
        are_numbers = np.all(np.isfinite(numbers) & (numbers >= 0))
        if not are_numbers or np.any(self.facts["kind"] >= len(KINDS)):
            raise ValueError("a row's facts are none")

    @property
    def statistics(self) -> Statistics:
        """Return counts over the shard's samples; raises JsonError if they are none."""
        tail = self._data[self._names_end :].tobytes()
        return parse_statistics(tail, "statistics of the index")

    @property
    def content(self) -> str:
        """Return the SHA-256 over places, CRC-32s and names: the same with or without PyAV, unlike the file's own."""
        # Without the header and the facts of media: PyAV may be missing here.
        places = self._data[HEADER.itemsize : self._members_end].tobytes()
        return hashlib.sha256(places + self._names.tobytes()).hexdigest()

    def key(self, row: int) -> str:
        """Return the key of the row-th sample."""
        record = self.samples[row]
        return self._name(int(record["key_offset"]), int(record["key_length"]))

    def document(self, row: int) -> ByteSpan:
        """Return the place of the row-th sample's JSON."""
        offset, length, crc32, _, _, _, _ = self.samples[row].item()
        return ByteSpan(offset, length, crc32)

    def extent(self, row: int) -> tuple[int, int]:
        """Return the first byte of the row-th sample's JSON and members, and the first after the last of them."""
        # One call for the whole row: seven single ones cost several times as much.
        start, length, _, first, count, _, _ = self.samples[row].item()
        if not count:
            return start, start + length
        last_start, last_length, *_ = self.members[first + count - 1].item()
        first_start = int(self.members["offset"][first])
        return min(start, first_start), max(start + length, last_start + last_length)

    @property
    def ends(self) -> npt.NDArray[np.int64]:
        """Return, int64 [samples], the first byte after each sample's JSON and members."""
        # Members follow their JSON in the tar, but for foreign tars with the JSON last.
        ends = (self.samples["json_offset"] + self.samples["json_length"]).astype(np.int64)
        last = self.samples["first_member"].astype(np.int64) + self.samples["members"] - 1
        some = self.samples["members"] > 0
        members = self.members[last[some]]
        ends[some] = np.maximum(ends[some], members["offset"] + members["length"])
        return ends

    def names(self, row: int) -> dict[str, int]:
        """Return the numbers, in `members` and `facts`, of the row-th sample's members by name.

        The last sample's are kept: several calls in turn ask for the same.
        """
        last, numbers = self._last
        if last != row:
            first = int(self.samples[row]["first_member"])
            members = self.members[first : first + int(self.samples[row]["members"])]
            offsets = members["name_offset"].tolist()
            lengths = members["name_length"].tolist()
            names = map(self._name, offsets, lengths)
            numbers = {name: number for number, name in enumerate(names, start=first)}
            self._last = row, numbers
        return numbers

    def span(self, member: int) -> ByteSpan:
        """Return the place of a member's bytes."""
        offset, length, crc32, _, _ = self.members[member].tolist()
        return ByteSpan(offset, length, crc32)

    def media(self, member: int) -> MediaFacts:
        """Return what a member's header said when it was indexed."""
        kind, *numbers = self.facts[member].tolist()
        return MediaFacts(KINDS[kind], *numbers)

    def _name(self, offset: int, length: int) -> str:
        # Damaged names are found by their CRC elsewhere; here they only must not fail.
        return self._names[offset : offset + length].tobytes().decode(errors="replace")


def _check_spans(rows: Records, offset: str, length: str, most: int) -> None:
    """Raise ValueError if a row's bytes or members end after `most`; compared without sums, which may overflow."""
    starts = rows[offset].astype(np.uint64)
    room = most - np.minimum(starts, most)
    if np.any(starts > most) or np.any(rows[length] > room):
        raise ValueError("a row leads out of what is there")
